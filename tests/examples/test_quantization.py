"""The benchmark of quantization: its document from made-up numbers, and one tiny real run."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffopt.core import Pipeline
from diffopt.errors import DiffoptError
from diffopt.execution import trajectories
from diffopt.ir.sampling_loop import find_loop
from diffopt.quantization.ranges import Ranges
from examples.quantization import __main__ as command
from examples.quantization import document, findings, peers
from examples.quantization.configurations import (
    BF16,
    CACHE,
    CACHE_INT8,
    CONFIGS,
    EMULATED,
    FEWER,
    INT4,
    INT4_ADAROUND,
    INT8,
    INT8_ONE_STEP,
    PAIRS,
    SUMS,
    beginning,
    fewer,
    split,
)
from examples.quantization.programs import middle
from examples.study import large, measure
from examples.study.document import BEGIN, END, milliseconds, rewrite
from examples.study.study import REFERENCE, Study
from tests import loops
from tests.rows import quality

MACHINE = {"cpu": "a CPU", "capability": "AVX2", "cores": 2, "threads": 2, "torch": "2.13"}


def row(
    distance: float, weights: int = 200, kid: float = 0.1, seconds: float | None = None
) -> dict[str, Any]:
    results: dict[str, Any] = {
        "cost": {"weights": {"bytes": weights, "fp16 bytes": 200}, "seconds": 1.0, "notes": {}},
        "quality": quality(distance, kid),
    }
    if seconds is not None:
        results["time"] = {
            "target": "cpu",
            "images": 4,
            "seconds": [seconds] * 3,
            REFERENCE: [0.4, 0.5, 0.3],
            BF16: [0.2] * 3,
            "engine": [distance * 1.1, 0.001],
            "emulated": [distance, 0.001],
            "file": int(1e6 * weights / 100),
            "compressed": int(1e6 * weights / 125),
        }
    return results


ROWS = {
    REFERENCE: row(0, 400, seconds=0.4),
    BF16: row(0.01, seconds=0.2),
    INT8: row(0.03, 110, kid=0.104, seconds=0.125),
    INT8_ONE_STEP: row(0.06, 110),
    INT4: row(0.09, 62),
    INT4_ADAROUND: row(0.054, 62),
    CACHE: row(0.04),
    CACHE_INT8: row(0.05, 110),
    fewer(20, BF16): row(0.07, seconds=0.16),
    fewer(17, BF16): row(0.02, seconds=0.1),  # nearer, but it has less time
}


def test_the_sentences_follow_the_numbers() -> None:
    assert findings.quality_goals(ROWS, 25) == [
        "- Met: KID to held-out images of W8A8 is 104.00 ± 1.00, the reference's 100.00 ± 1.00;"
        " asked is at most 5% more.",
        "- Met: KID to other seeds of W8A8 is -2.00 ± 3.00, the reference's -2.00 ± 3.00;"
        " asked is at most one deviation more.",
        "- Met: ranges for each group of steps, not of one step: the distance is 0.50 times that"
        " without, +8.7 standard errors ahead (2 count as measurable).",
        f"- Met: weights of 4 bits have 1.80 times the distance of W8A8 with `{INT4_ADAROUND}`;"
        " the nearest ones have 3.00 times. Asked is at most 2.",
        f"- Not met: the weights take 31% of fp16's bytes with `{INT4}`; asked is at most 30%.",
        "- W8A8 is nearer to the reference than bf16 with 20 of 25 steps, which takes 1.28 times"
        " as long: 0.0300 and 0.0700.",
    ]


def test_what_is_missed_is_said() -> None:
    rows = copy.deepcopy(ROWS)
    rows[INT8] = row(0.03, kid=0.106, seconds=0.125)
    rows[INT8_ONE_STEP]["quality"]["distances"] = [0.024, 0.06, 0.036]
    rows[INT4_ADAROUND] = row(0.061, 60)
    rows[fewer(20, BF16)] = row(0.02, seconds=0.16)
    kid, _, steps, ratio, size, rival = findings.quality_goals(rows, 25)
    assert kid.startswith("- Not met: KID to held-out images of W8A8 is 106.00")
    assert steps.startswith("- Not met:")
    assert "+1.0 standard errors" in steps
    assert ratio.startswith("- Not met: weights of 4 bits have 2.03 times")
    assert size.startswith("- Met: the weights take 30%")
    assert rival.startswith("- W8A8 is behind bf16 with 20 of 25 steps")


def test_no_sentence_without_its_numbers() -> None:
    assert findings.quality_goals({REFERENCE: row(0)}, 25) == []
    assert findings.ablations({REFERENCE: row(0)}) == []
    assert findings.sums({CACHE: row(0.04)}) == []


def test_the_whole_is_beside_the_sum_of_its_parts() -> None:
    assert findings.sums(ROWS)[-1] == (
        f"| `{CACHE_INT8}` | 0.0500 ± 0.0030 | 0.0700 | 0.0500"
        f" | `{CACHE}` 0.0400, `{INT8}` 0.0300 |"
    )


def test_ablations() -> None:
    lines = findings.ablations(ROWS)
    assert (
        "| rounding learned, W4A8 | 0.0540 ± 0.0030 | 0.0900 ± 0.0030 | 0.60 | +8.7 | 1.80 |"
        in lines
    )
    assert len(lines) == 4 + 2


def test_sentences_about_speed() -> None:
    weights = {"weights": {"bytes": 29, "fp16 bytes": 100}, "file": 40}

    def times(int8: float) -> dict[str, Any]:
        seconds = {
            f"{BF16} on cpu": 0.3,
            f"{BF16} on cpu(freeze=true)": 0.2,
            f"{INT8} on cpu": int8,
            f"{INT4} on cpu": 0.3,
        }
        return {"a": {"times": {key: {"seconds": [s]} | weights for key, s in seconds.items()}}}

    met, missed = (findings.speed_goals(times(int8)) for int8 in (0.15, 0.17))
    assert met == [
        f"- Met: a: the weights of `{INT4}` take 29% of fp16's bytes, its file 100% of bf16's;"
        " asked is at most 30%.",
        "- Met: a: int8 is 1.33× as fast as bf16 end to end, each on its fastest target; asked is"
        " 1.25×.",
    ]
    assert missed[1].startswith("- Not met: a: int8 is 1.18×")
    contenders = {
        f"{kind}, {side}": {"seconds": [seconds], "error": 0.01 * seconds}
        for kind in ("bf16", "int8")
        for side, seconds in (("cpu", 0.2), ("cpu(freeze=true)", 0.1), (peers.THEIRS, 0.15))
    }
    contenders[f"int8, {peers.THEIRS}"]["seconds"] = [0.05]
    assert findings.peer_goals({"a": {"contenders": contenders}}) == [
        "- a, bf16: the engine (cpu(freeze=true)) is faster: 1.50× the speed of OpenVINO, with"
        " 0.67 times its error.",
        "- a, int8: the engine (cpu(freeze=true)) is not faster: 0.50× the speed of OpenVINO, with"
        " 0.67 times its error.",
    ]


def test_the_document_is_written_between_the_markers(tmp_path: Path) -> None:
    path = tmp_path / "quantization.md"
    path.write_text(f"before\n{BEGIN}\nstale\n{END}\nafter\n")
    configs = ROWS | {"cast(bf16),quantize(int3)": {"left out": "there is no int3"}}
    entry = {"seconds": [0.1, 0.2, 0.3], "psnr": 40.0, "file": 10**7}
    weights = {"weights": {"bytes": 10**7, "fp16 bytes": 2 * 10**7}}
    contenders = {f"int8, {side}": {"seconds": [0.1] * 3, "error": 0.01} for side in ("cpu",)}
    contenders |= {
        f"{kind}, {side}": {"seconds": [0.2] * 3, "error": 0.02}
        for kind in ("bf16", "int8")
        for side in ("cpu", peers.THEIRS)
    }
    data = {
        "setup": {"images": 4},
        "machine": MACHINE,
        "models": {"fashion-sd, 25 steps": {"configs": configs}},
        "large": {
            "unet, 25 steps": {
                "parameters": 17_800_000,
                "times": {f"{config} on cpu": entry | weights for config in (BF16, INT8)},
                "configs": {INT4: {"failed": "no such kernel"}},
            }
        },
        "peers": {
            "unet, 25 steps": {
                "parameters": 17_800_000,
                "shape": [2, 4, 32, 32],
                "packages": {"openvino": "1", "nncf": "2"},
                "contenders": contenders,
            }
        },
    }
    rewrite(path, document.section(data, tmp_path))
    text = path.read_text()
    assert text.startswith(f"before\n{BEGIN}\n`make bench-quantization` writes")
    assert text.endswith(f"{END}\nafter\n")
    assert "stale" not in text
    for line in (
        f"| `{INT8}` | 0.00 | 55% | 0.0300 ± 0.0030 | 0.0150 ± 0.0010 | 104.00 ± 1.00"
        " | -2.00 ± 3.00 |",
        f"| `{INT8}` | 125.0 (0.0) | 3.20× | 1.60× | 0.0330 ± 0.0010 | 0.0300 ± 0.0010 | 1.10"
        " | 55% | 0.88 |",
        "- Left out: `cast(bf16),quantize(int3)`: there is no int3.",
        f"| `{INT8}` on `cpu` | 200.0 (100.0) | 1.00× | 10.0 | 50% | 10.0 | 40.0 |",
        f"- Failed: `{INT4}`: no such kernel.",
        "| int8 | engine, `cpu` | 200.0 (0.0) | 1.00× | 0.02000 |",
        "openvino 1, nncf 2. One call of the denoiser",
    ):
        assert line in text, line


def test_the_document_has_the_markers() -> None:
    text = document.DOCUMENT.read_text()
    assert 0 < text.index("## Measurements") < text.index(BEGIN) < text.index(END)


def test_all_that_is_compared_is_measured() -> None:
    for steps, configs in CONFIGS.items():
        assert len(set(configs)) == len(configs)
        assert {fewer(n, BF16) for n in FEWER[steps]} <= set(configs)
        assert set(document.PICTURED) <= set(configs)
    assert {c for pair in PAIRS for c in (pair.having, pair.lacking)} <= set(CONFIGS[25])
    assert {c for whole, parts in SUMS for c in (whole, *parts)} <= set(CONFIGS[25])
    assert set(EMULATED) <= set(CONFIGS[25])


def test_where_a_configuration_begins() -> None:
    assert split(REFERENCE) == (REFERENCE, "")
    assert split(INT8_ONE_STEP) == (REFERENCE, INT8)
    assert split(CACHE_INT8) == (CACHE, INT8)
    assert beginning(REFERENCE) == "unroll,hoist,simplify,fuse"
    assert beginning(CACHE) == f"unroll,hoist,{CACHE},simplify,fuse"
    few = "unroll(steps=5,scheduler=UniPCMultistep)"
    assert split(f"{few},{CACHE},{BF16}") == (f"{few},{CACHE}", BF16)
    assert beginning(f"{few},{CACHE}") == f"{few},hoist,{CACHE},simplify,fuse"


def test_a_configuration_that_means_nothing_is_refused() -> None:
    with pytest.raises(DiffoptError, match="grops"):
        command.arguments(["--configs", "quantize(int8,grops=1)"])


def test_the_ranges_of_one_step() -> None:
    inf = torch.inf
    ranges = Ranges(torch.tensor([inf, -1, -2, -3]), torch.tensor([-inf, 1, 2, 3]))
    one = middle(ranges)
    assert one.low.tolist() == [inf, -2, -2, -2]
    assert one.high.tolist() == [-inf, 2, 2, 2]
    never = Ranges(torch.tensor([inf]), torch.tensor([-inf]))
    assert middle(never) is never


def test_a_call_is_the_same_on_both_sides() -> None:
    plain = Pipeline.parse("unroll,hoist,simplify").run(loops.program())
    loop = find_loop(plain)
    visits = list(trajectories.steps(plain, loop.calls, plain.sample))
    truth = [list(loop.body(*visit.arguments)) for visit in visits]
    errors = []
    for config in (REFERENCE, BF16, "quantize(int8,ends=true)"):
        rewritten = large.rewritten(plain, config)
        make = peers.calls_of(rewritten, loop, plain.sample, "eager")
        outputs = [make(i, visit.arguments)() for i, visit in enumerate(visits)]
        errors.append(max(map(peers.error, outputs, truth)))
    assert errors[0] == 0
    assert all(0 < wrong < 0.05 for wrong in errors[1:])


def test_one_time_has_no_range() -> None:
    assert milliseconds([0.1]) == "100.0 (-)"
    assert milliseconds([0.1, 0.2, 0.3]) == "200.0 (100.0)"


def test_contenders_take_turns() -> None:
    order = []
    runs: dict[str, peers.Run] = {key: lambda k=key: order.append(k) or [] for key in "ab"}  # type: ignore[misc]
    seconds = peers.take_turns(runs, 2)
    assert order == [*"abababab"]
    assert [len(times) for times in seconds.values()] == [2, 2]


def test_a_tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "DEBIAN", tmp_path / "missing")  # 10,000 images take minutes
    monkeypatch.setattr(command, "CONFIGS", {2: ()})
    monkeypatch.setattr("examples.quantization.measure.LEVEL", 1)  # 19 takes seconds a file
    path = tmp_path / "quantization.md"
    path.write_text(f"{BEGIN}\n{END}\n")
    words = "--only fashion-dit --images 2 --engine-images 2 --steps 2 --phase quality time"
    words += f" --threads 1 --rounds 1 --target eager --work {tmp_path} --document {path} --configs"
    configs = [REFERENCE, BF16, INT8, INT8_ONE_STEP, "quantize(int8,layers=nothing)"]
    command.main([*words.split(), *configs])
    results = json.loads(path.with_suffix(".json").read_text())["models"]["fashion-dit, 2 steps"]
    reference, bf16, int8, one, nothing = (results["configs"][config] for config in configs)
    assert reference["quality"]["distance"] == [0, 0]
    assert reference["cost"]["weights"]["bytes"] > 1.9 * bf16["cost"]["weights"]["bytes"]
    assert bf16["cost"]["weights"]["bytes"] > int8["cost"]["weights"]["bytes"]
    assert 0 < bf16["quality"]["distance"][0] < int8["quality"]["distance"][0]
    assert int8["quality"]["distance"] != one["quality"]["distance"]
    assert "time" not in one
    assert int8["time"]["engine"] == pytest.approx(int8["time"]["emulated"], abs=0.02)
    assert int8["time"]["compressed"] < int8["time"]["file"]
    assert "matches 'nothing'" in nothing["left out"]
    assert (tmp_path / "quantization-fashion-dit-2.png").exists()
    assert "Left out: `quantize(int8,layers=nothing)`" in path.read_text()

    def refuse(*_: object) -> None:
        raise AssertionError("measured twice")

    monkeypatch.setattr(Study, "_need", refuse)
    command.main([*words.split(), *configs])
    with pytest.raises(DiffoptError, match="remove it, or ask for the same"):
        command.main([*words.replace("--images 2", "--images 3").split(), *configs])
