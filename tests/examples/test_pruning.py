"""The benchmark of pruning: its document from made-up numbers, and one tiny real run."""

import json
from pathlib import Path
from typing import Any

import pytest

from diffopt.core import Pipeline
from diffopt.errors import DiffoptError
from examples.pruning import __main__ as command
from examples.pruning import configurations, document, findings
from examples.pruning.configurations import (
    AUTO,
    BY_IMPORTANCE,
    CACHE,
    COMPOSED,
    GOAL,
    INT8,
    PARTS,
    PEERS,
    THEIRS,
    UNIFORM,
    fewer,
    pipeline,
    recovered,
    split,
    untrained,
)
from examples.study import measure
from examples.study.document import BEGIN, END
from examples.study.study import REFERENCE, Study
from tests.rows import quality

MODEL = "fashion-dit"
MAGNITUDE, DIFF = (BY_IMPORTANCE[GOAL][m] for m in ("magnitude", "diff-pruning"))


def row(
    distance: float, flops: int = 100, kid: float = 0.1, seconds: float | None = None
) -> dict[str, Any]:
    results: dict[str, Any] = {
        "cost": {"flops": flops, "parameters": flops, "seconds": {}, "notes": {}},
        "quality": quality(distance, kid),
    }
    if seconds is not None:
        results["time"] = {"target": "cpu", "seconds": [seconds] * 3, REFERENCE: [0.4, 0.5, 0.3]}
    return results


ROWS = {
    REFERENCE: row(0, seconds=0.4),
    MAGNITUDE: row(0.4, 70, seconds=0.3),
    recovered(MAGNITUDE): row(0.08, 70, kid=0.112),
    DIFF: row(0.3, 70),
    recovered(DIFF): row(0.09, 70, kid=0.109),
    AUTO: row(0.2, 70, seconds=0.34),
    recovered(AUTO): row(0.06, 70),
    UNIFORM: row(0.3, 69),
    fewer(18): row(0.05, 72),
    fewer(16): row(0.07, 64),
    CACHE: row(0.03),
    INT8: row(0.04),
    COMPOSED: row(0.08),
}


def test_the_sentences_follow_the_numbers() -> None:
    lines = findings.goals(ROWS)
    assert lines[:2] == [
        f"- Not met: KID to held-out images of `{recovered(MAGNITUDE)}` is 112.00 ± 1.00, the"
        " reference's 100.00 ± 1.00; asked is at most 10% more, 110.00. Over the same subsets of"
        " seeds it is 12.00 ± 2.00 above, which is -1.0 standard errors within that.",
        f"- Met: KID to held-out images of `{recovered(DIFF)}` is 109.00 ± 1.00, the reference's"
        " 100.00 ± 1.00; asked is at most 10% more, 110.00. Over the same subsets of seeds it is"
        " 9.00 ± 2.00 above, which is +0.5 standard errors within that.",
    ]
    assert lines[2:4] == [
        f"- Met: `{MAGNITUDE}` leaves 70% of the FLOPs and 75% of the time, 83% of what that"
        " promises; asked is 80%.",
        f"- Not met: `{AUTO}` leaves 70% of the FLOPs and 85% of the time, 50% of what that"
        " promises; asked is 80%.",
    ]
    assert lines[4:7] == [
        "- Met: Diff-Pruning's importance is ahead of magnitude (channels, ratio=0.3, before"
        " training): the distance is 0.75 times the other's, +8.7 standard errors ahead.",
        "- Not met: Diff-Pruning's importance is ahead of magnitude (channels, ratio=0.3,"
        " trained): the distance is 1.12 times the other's, -8.7 standard errors ahead.",
        "- Met: `auto` is ahead of a uniform share (auto, flops=0.7, before training): the"
        " distance is 0.67 times the other's, +8.7 standard errors ahead.",
    ]


def test_the_rival_has_as_many_flops() -> None:
    assert findings.rival(ROWS, recovered(AUTO)) == fewer(18)
    (line, *_) = [line for line in findings.rivals(ROWS, MODEL) if f"| `{recovered(AUTO)}`" in line]
    assert line == (
        f"| `{recovered(AUTO)}` | `{fewer(18)}` | 1.03 | 0.0600 ± 0.0030 | 0.0500 ± 0.0030"
        " | 100.00 ± 1.00 | 100.00 ± 1.00 |"
    )
    assert findings.rival({**ROWS, AUTO: row(0.2, 80)}, AUTO) is None


def test_tables() -> None:
    assert findings.importances(ROWS)[-1] == "| diff-pruning, 30% | 0.75 (+8.7) | 1.12 (-8.7) |"
    (line,) = findings.composed(ROWS)
    assert "distance 0.0800 ± 0.0030; alone" in line
    assert "their sum is 0.1300, the root of the sum of their squares 0.0781." in line
    ours, theirs = PEERS[MODEL]
    assert findings.peer({**ROWS, theirs: row(0.25, 70)}, ours, theirs) == [
        f"`{AUTO}`, with 0.70 of the FLOPs, has 0.80 times its distance before training"
        f" (+8.7 standard errors ahead); `{theirs}` leaves 0.70."
    ]


def test_times_of_larger_models() -> None:
    times = {
        "unroll on cpu": {"flops": 100, "seconds": [1.0, 1.1, 0.9]},
        "prune on cpu": {"flops": 70, "seconds": [0.75]},
        "prune more on cpu": {"flops": 50, "seconds": [0.7]},
    }
    data = {"large": {"unet, 5 steps": {"parameters": 2_000_000, "times": times}}}
    text = document.section({**data, "setup": {"images": 2}}, Path())
    assert "| `prune` | 0.70 | 750.0 (-) | 83% |" in text
    assert "unet, 5 steps, denoiser of 2.0 M parameters:" in text
    assert findings.large_goals(data["large"]) == [
        "- Met: unet, 5 steps, `prune`: 70% of the FLOPs, 83% of what that promises.",
        "- Not met: unet, 5 steps, `prune more`: 50% of the FLOPs, 60% of what that promises.",
    ]


def test_no_sentence_without_its_numbers() -> None:
    assert findings.goals({REFERENCE: row(0)}) == []
    assert findings.rivals({REFERENCE: row(0)}, MODEL) == []
    assert findings.importances({REFERENCE: row(0)}) == []
    assert findings.composed({REFERENCE: row(0)}) == []
    assert findings.peer({REFERENCE: row(0)}, *PEERS[MODEL]) == []


def test_groups_of_both() -> None:
    def group(
        layer: str, ours: list[str], theirs: list[str], only_ours: list[str]
    ) -> dict[str, Any]:
        return {"layer": layer, "ours": ours, "only theirs": theirs, "only ours": only_ours}

    groups = [
        group("a", ["a"], [], []),
        group("time", [], ["time out"], []),
        group("b", ["b"], ["time in"], []),
        group("c", ["b", "c"], [], ["b out"]),
    ]
    lines = findings.grouped(groups)
    assert lines[0].startswith("Of its 4 groups 1 are the same weights and axes as ours. 2 have")
    assert lines[1].startswith("1 go together with more here (`c`)")


@pytest.mark.parametrize("model", ["fashion-sd", "fashion-dit"])
def test_configurations_are_pipelines(model: str) -> None:
    configs = configurations.configurations(model, 25)
    assert {*configurations.configurations(model, 8)} - {*map(fewer, (4, 5, 6, 7))} < {*configs}
    assert len(set(configs)) == len(configs)
    for config in configs:
        calls = [call for call in split(config) if not call.startswith(THEIRS)]
        Pipeline.parse(pipeline(calls))
    assert {*PARTS, COMPOSED} < {*configs}
    assert {*map(untrained, configs)} < {*configs}
    timed = [*filter(configurations.is_timed, configs)]
    assert {*PARTS[1:], COMPOSED, AUTO, MAGNITUDE, fewer(18)} < {*timed}
    assert not {REFERENCE, DIFF, recovered(AUTO)} & {*timed}
    with pytest.raises(DiffoptError, match=r"fuse: a configuration is made of unroll, prune"):
        pipeline(["fuse"])


def test_a_tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "DEBIAN", tmp_path / "missing")  # 10,000 images take minutes
    monkeypatch.setattr(configurations, "RECOVER", "recover(steps=2,samples=2,batch=1)")
    path = tmp_path / "pruning.md"
    path.write_text(f"{BEGIN}\n{END}\n")
    words = "--only fashion-dit --images 2 --steps 2 --threads 1 --rounds 1 --target eager"
    words += f" --work {tmp_path} --document {path} --phase quality time peers --configs"
    small = UNIFORM
    chosen = [REFERENCE, fewer(1), small, recovered(small), "prune(mlp,layers=nothing)"]
    command.main([*words.split(), *chosen])
    results = json.loads(path.with_suffix(".json").read_text())["models"]["fashion-dit, 2 steps"]
    reference, one, pruned, trained, nothing = (results["configs"][c] for c in chosen)
    assert reference["quality"]["distance"] == [0, 0]
    assert reference["cost"]["flops"] > pruned["cost"]["flops"] == trained["cost"]["flops"]
    assert reference["cost"]["parameters"] > pruned["cost"]["parameters"]
    assert one["quality"]["distance"][0] > 0
    assert trained["quality"]["distance"] != pruned["quality"]["distance"]
    assert "time" in pruned
    assert "time" not in trained
    assert "matches 'nothing'" in nothing["left out"]
    text = path.read_text()
    assert f"| `{small}` | 0." in text
    assert f"`{recovered(small)}` |" not in text
    assert "Left out: `prune(mlp,layers=nothing)`" in text
    assert document.pictured(results["configs"]) == [REFERENCE]

    def refuse(*_: object) -> None:
        raise AssertionError("measured twice")

    monkeypatch.setattr(Study, "_need", refuse)
    command.main([*words.replace("quality time peers", "quality time").split(), *chosen])
