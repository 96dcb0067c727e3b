"""Every example runs."""

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from diffopt import plugins
from diffopt.caching import policy
from diffopt.core import Pipeline
from examples import custom_loop, optimize_pipeline, pyramid_attention

MODELS = Path(__file__).parents[2] / "examples" / "models"


def test_custom_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    custom_loop.main(str(tmp_path / "ring.engine"))
    last = capsys.readouterr().out.splitlines()[-1]
    assert float(last.rpartition(" ")[2]) < 1e-5


def test_optimize_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "dit.engine"
    optimize_pipeline.main(str(MODELS / "fashion-dit"), str(path), steps=2, target="eager")
    assert capsys.readouterr().out.splitlines()[-1] == f"{path}: an image of (32, 32)"


def test_pyramid_attention(capsys: pytest.CaptureFixture[str]) -> None:
    pyramid_attention.main(str(MODELS / "fashion-dit"), steps=5)
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("cache(pyramid-attention,own=3): relative error ")
    assert 0 < float(first.rpartition(" ")[2]) < 1


def test_an_installed_policy_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint(
        "pyramid-attention", "examples.pyramid_attention:PyramidAttention", "diffopt.policies"
    )
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry])
    monkeypatch.setattr(policy, "_sources", policy._sources.__wrapped__)
    text = "cache(pyramid-attention,own=3)"
    (step,) = Pipeline.parse(text).passes
    assert str(step) == text
