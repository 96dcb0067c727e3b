"""Every example runs."""

from pathlib import Path

import pytest

from examples import custom_loop, optimize_pipeline

MODELS = Path(__file__).parents[1] / "examples" / "models"


def test_custom_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    custom_loop.main(str(tmp_path / "ring.engine"))
    last = capsys.readouterr().out.splitlines()[-1]
    assert float(last.rpartition(" ")[2]) < 1e-5


def test_optimize_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "dit.engine"
    optimize_pipeline.main(str(MODELS / "fashion-dit"), str(path), steps=2, target="eager")
    assert capsys.readouterr().out.splitlines()[-1] == f"{path}: an image of (32, 32)"
