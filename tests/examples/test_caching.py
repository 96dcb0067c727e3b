"""The benchmark of cache policies: its document from made-up numbers, and one tiny real run."""

import copy
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from diffopt.errors import DiffoptError
from examples.caching import __main__ as command
from examples.caching import document, ranking
from examples.caching.configurations import CONFIGS
from examples.study import measure
from examples.study.document import BEGIN, END, rewrite
from examples.study.results import Results
from examples.study.study import CALIBRATION, OTHER_SEEDS, Study

DPM = "unroll(steps=25,scheduler=DPMSolverMultistep)"
SLOW = "unroll(steps=33,scheduler=DDIM)"


def row(denoiser: float, distance: float, seconds: float | None = None) -> dict[str, Any]:
    results: dict[str, Any] = {
        "cost": {"denoiser": denoiser, "program": denoiser + 0.1, "seconds": 1.0, "notes": {}},
        "quality": {
            "distance": [distance, 0.01],
            "pixels": [distance / 2, 0.005],
            "kid other seeds": [distance / 100, 0.0002],
        },
    }
    if seconds is not None:
        results["time"] = {"seconds": [seconds] * 3, "reference": [0.4, 0.3, 0.5]}
    return results


ROWS = {
    "reference": row(1, 0),
    "auto,speedup=2": row(0.5, 0.2, 0.2),
    "auto,speedup=3": row(0.33, 0.4, 0.4),
    "fora,interval=2": row(0.505, 0.3),
    "fora,interval=3": row(0.34, 0.35),
    DPM: row(0.5, 0.25),
    SLOW: row(0.66, 0.1),
}


def test_the_front() -> None:
    assert ranking.pareto_front(ROWS) == {
        "auto,speedup=2",
        "auto,speedup=3",
        "fora,interval=3",
        SLOW,
    }


def test_rivals_may_cost_a_little_more() -> None:
    assert ranking.duels(ROWS) == {
        2: ("auto,speedup=2", "fora,interval=2", DPM),
        3: ("auto,speedup=3", "fora,interval=3", None),  # 0.34 is 2 % over a third
    }
    dearer = {**ROWS, "fora,interval=2": row(0.516, 0.1)}
    assert ranking.best_of(dearer, "policy", 2) == "fora,interval=3"


def test_the_sentences_follow_the_numbers() -> None:
    ahead, behind, times = document.verdicts(ROWS)
    assert ahead == "- At 2× `auto` is ahead of every fixed policy and of fewer steps."
    assert behind == (
        "- At 3× `auto` is behind: `cache(fora,interval=3)` is nearer to the reference."
    )
    assert times == (
        "- 1 of 2 engines reach 85 % of the speedup that their FLOPs promise;"
        " the least is 43%, of `cache(auto,speedup=3)`."
    )
    other = {**ROWS, DPM: row(0.5, 0.2)}  # a draw is not ahead
    assert document.verdicts(other)[0] == (
        f"- At 2× `auto` is behind: `{DPM}` is nearer to the reference."
    )


def test_the_table() -> None:
    lines = document.table(ROWS)
    assert [line.split("`")[1] for line in lines[2:]] == [
        "reference",
        SLOW,
        "cache(fora,interval=2)",
        "cache(auto,speedup=2)",
        DPM,
        "cache(fora,interval=3)",
        "cache(auto,speedup=3)",
    ]
    assert lines[5] == (
        "| **`cache(auto,speedup=2)`** | 0.500 | 2.00× | 200.0 (0.0) | 2.00× | 1.67×"
        " | 0.2000 ± 0.0100 | 0.1000 ± 0.0050 | - | 2.00 ± 0.20 |"
    )


def test_the_document_is_rewritten_between_the_markers(tmp_path: Path) -> None:
    path = tmp_path / "caching.md"
    path.write_text(f"before\n{BEGIN}\nstale\n{END}\nafter\n")
    configs = copy.deepcopy(ROWS) | {"deepcache,interval=2": {"left out": "it has no skips"}}
    data = {"setup": {"images": 4, "steps": 50}, "models": {"a": {"configs": configs}}}
    for _ in range(2):
        rewrite(path, document.section(data, tmp_path))
        text = path.read_text()
        assert text.startswith(f"before\n{BEGIN}\n`make bench-caching` writes")
        assert text.endswith(f"{END}\nafter\n")
        assert "stale" not in text
        assert "- Left out: `cache(deepcache,interval=2)`: it has no skips." in text
    path.write_text("nothing")
    with pytest.raises(DiffoptError, match="has no lines"):
        rewrite(path, document.section(data, tmp_path))


def test_the_document_has_the_markers() -> None:
    text = document.DOCUMENT.read_text()
    assert 0 < text.index(BEGIN) < text.index(END)


def test_seeds_of_calibration_are_of_no_image() -> None:
    assert CALIBRATION - 1 > 2 * OTHER_SEEDS
    with pytest.raises(SystemExit):
        command.arguments(["--images", "1001"])


def test_a_configuration_that_means_nothing_is_refused() -> None:
    with pytest.raises(DiffoptError, match="intervall"):
        command.arguments(["--configs", "fora,intervall=2"])
    assert list(command.arguments([]).configs) == list(CONFIGS)
    assert all(CONFIGS.count(config) == 1 for config in CONFIGS)


def test_two_processes_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "DEBIAN", tmp_path / "missing")
    results = Results(tmp_path / "results.json", tmp_path / "lock")
    generated = []

    class Fake:
        name = "a"
        folder = tmp_path / "work" / "a"

        def images(self, config: str, count: int, first: int, tell: object) -> torch.Tensor:
            generated.append(config)
            if config == "fora,interval=2":  # meanwhile the other process is done with the next
                results.put({}, "models", "a", "configs", "fora,interval=3", "quality")
            return torch.rand(count, 1, 2, 2)

        def features(self, config: str, images: torch.Tensor, first: int) -> torch.Tensor:
            return images.flatten(1)

        def pipeline_error(self, images: torch.Tensor) -> float:
            return 0.0

    configs = ["fora,interval=2", "fora,interval=3", "fora,interval=4"]
    keys = "models", "a"
    model = measure.Measurements(cast(Study, Fake()), results, keys, lambda study, config: {})
    model.quality(configs, 2)
    assert generated == ["reference", "reference", "fora,interval=2", "fora,interval=4"]
    assert model.remaining(configs, "quality") == []


def test_a_tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "DEBIAN", tmp_path / "missing")  # 10,000 images take minutes
    path = tmp_path / "caching.md"
    path.write_text(f"{BEGIN}\n{END}\n")
    words = "--only fashion-dit --images 2 --steps 3 --phase quality --threads 1"
    places = ["--work", str(tmp_path / "work"), "--document", str(path), "--configs"]
    configs = ["reference", "fora,interval=2", "deepcache,interval=2"]
    command.main([*words.split(), *places, *configs])
    results = json.loads(path.with_suffix(".json").read_text())["models"]["fashion-dit"]
    reference, fora, deepcache = (results["configs"][config] for config in configs)
    assert reference["quality"]["distance"] == [0, 0]
    assert reference["cost"]["denoiser"] == 1
    assert 0.6 < fora["cost"]["denoiser"] < 0.7
    assert fora["quality"]["distance"][0] > 0
    assert deepcache["left out"].startswith("deepcache needs skip connections")
    assert results["floors"]["pipeline"] < 1e-4
    assert (tmp_path / "caching-fashion-dit.png").exists()

    def refuse(*_: object) -> None:
        raise AssertionError("measured twice")

    for name in ("images", "_need"):
        monkeypatch.setattr(Study, name, refuse)
    command.main([*words.split(), *places, *configs])
    assert torch.get_num_threads() == 1
