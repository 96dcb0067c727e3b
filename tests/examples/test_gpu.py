"""The benchmark for GPUs: run whole on the CPU with tiny sizes, and what goes wrong in it."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffopt.core import Pipeline
from diffopt.errors import DiffoptError
from diffopt.lowering.target import parse_target
from examples.gpu import __main__ as command
from examples.gpu import document, measure, models, savings, worker
from examples.gpu.measure import Settings
from examples.gpu.models import MODELS
from examples.gpu.rows import ROWS
from examples.gpu.worker import Answer, Engines, Worker
from examples.study.document import BEGIN, END


@pytest.fixture
def paper(tmp_path: Path) -> Path:
    path = tmp_path / "gpu.md"
    path.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    return path


def settings(work: Path, **changes: Any) -> Settings:
    defaults: dict[str, Any] = {
        "model": "flux",
        "tiny": True,
        "steps": 2,
        "target": "eager",
        "device": "cpu",
        "rounds": 1,
        "work": work,
    }
    return Settings(**defaults | changes)


# --- the command ----------------------------------------------------------------------------------


def test_the_whole_of_it_on_the_cpu(paper: Path, tmp_path: Path) -> None:
    words = ["--tiny", "--only", "flux", "--steps", "3", "--rounds", "2", "--target", "eager"]
    words += ["--document", str(paper), "--work", str(tmp_path / "work")]
    command.main([*words, "--phase", "eager", "exact", "compile", "all", "no-graph"])
    results = paper.with_suffix(".json")
    rows = json.loads(results.read_text())["models"]["flux"]["rows"]
    assert [*rows] == ["eager", "exact", "compile", "all", "no-graph"]
    assert rows["no-graph"] == {"left out": "it needs a GPU"}
    assert rows["eager"]["errors"] == rows["compile"]["errors"] == [0, 0]
    assert 0 < max(rows["exact"]["errors"]) < 0.05  # bfloat16, in another order of sums
    assert min(rows["all"]["errors"]) > max(
        rows["exact"]["errors"]
    )  # of three steps, two take features of the first
    assert len(rows["eager"]["seconds of steps"]) == 3
    for name in ("eager", "exact", "compile", "all"):
        assert len(rows[name]["seconds"]) == 2
    full, *cached = rows["all"]["flops of steps"]
    assert rows["exact"]["flops of steps"] == [full] * 3
    assert len(set(cached)) == 1
    assert cached[0] < full
    text = paper.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert "\n### FLUX.1-dev, tiny, 3 steps\n" in text
    assert "\n- exact passes, no CUDA graph: left out: it needs a GPU\n" in text
    assert not [*(tmp_path / "work").glob("tmp*")]

    # What is there is not measured again, and not lost when the time is over.
    before = json.loads(results.read_text())
    command.main([*words, "--phase", "eager", "exact"])
    assert json.loads(results.read_text()) == before
    command.main([*words, "--phase", "exact", "fp8", "--again", "--minutes", "1e-9"])
    stopped = {"stopped": "the time was over before it began"}
    before["models"]["flux"]["rows"]["fp8"] = stopped
    assert json.loads(results.read_text()) == before
    with pytest.raises(DiffoptError) as caught:
        command.main([*words, "--rounds", "3", "--steps", "4"])
    assert str(caught.value).endswith(": remove it, or ask for the same")


@pytest.mark.gpu
def test_the_rows_of_a_gpu(paper: Path, tmp_path: Path) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wants the GPU that h100 is")
    words = ["--tiny", "--only", "flux", "--steps", "3", "--rounds", "2", "--target", "h100"]
    words += ["--document", str(paper), "--work", str(tmp_path / "work")]
    command.main([*words, "--phase", "eager", "exact", "no-graph"])
    rows = json.loads(paper.with_suffix(".json").read_text())["models"]["flux"]["rows"]
    for name in ("exact", "no-graph"):
        assert max(rows[name]["errors"]) < 0.05
        assert rows[name]["memory"] > 0
        assert rows[name]["limit"] > 0


def test_results_go_on_from_those_of_the_document(paper: Path, tmp_path: Path) -> None:
    known = {"weights": {}}
    paper.with_suffix(".json").write_text(json.dumps(known))
    out = tmp_path / "out.json"
    words = ["--phase", "--document", str(paper), "--work", str(tmp_path), "--out", str(out)]
    command.main(words)
    assert json.loads(out.read_text()) == known
    out.write_text("{}")
    command.main(words)
    assert out.read_text() == "{}"
    assert "No times have been taken yet" in paper.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--minutes", "0"], "--minutes: wants more than 0"),
        (["--rounds", "0"], "--rounds: wants 1 or more"),
        (["--steps", "1"], "--steps: wants 2 or more, there is no loop in one"),
        (["--tiny"], "--tiny: give a --document of its own, this one is about full sizes"),
    ],
)
def test_bad_arguments(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(words)
    assert capsys.readouterr().err.endswith(f"error: {message}\n")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("h10", "there is no target 'h10'; did you mean 'h100'?"),
        (
            "h100",
            "target h100 needs a GPU, and torch finds none here; to try the command without one,"
            " write --tiny --target cpu",
        ),
    ],
)
def test_targets_that_cannot_be_had(
    target: str, message: str, paper: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DiffoptError) as caught:
        command.main(["--target", target, "--document", str(paper), "--work", str(paper.parent)])
    assert caught.value.message == message
    assert not paper.with_suffix(".json").exists()


def test_a_row_of_little_worth_does_not_stop_the_others(
    paper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def measured(team: worker.Team, row: Any, seconds: float) -> Answer:
        asked.append(row.title)
        assert seconds <= 60 * row.minutes
        return {"failed": "no memory"} if len(asked) == 1 else {"errors": [0.5]}

    monkeypatch.setattr(worker.Team, "measure", measured)
    words = ["--tiny", "--only", "flux", "--target", "eager", "--phase", "eager", "float32"]
    words += ["--document", str(paper), "--work", str(tmp_path)]
    command.main(words)
    rows = json.loads(paper.with_suffix(".json").read_text())["models"]["flux"]["rows"]
    assert rows == {"eager": {"failed": "no memory"}, "float32": {"errors": [0.5]}}
    assert "- diffusers, eager: failed: no memory\n" in paper.read_text()
    command.main(words)  # what has failed is tried again
    assert asked == [ROWS[name].title for name in ("eager", "float32", "eager")]


def test_rows_are_of_passes_and_targets_that_there_are() -> None:
    for row in ROWS.values():
        for model in MODELS.values():
            Pipeline.parse(row.pipeline(model))
        parse_target(f"h100({row.options})")


# --- processes ------------------------------------------------------------------------------------


class Obeys:
    """Does what it is asked for."""

    def prepare(self) -> None:
        raise RuntimeError("this is said with the first answer")

    def __call__(self, what: str) -> Answer:
        if what.startswith("/"):
            compiler = subprocess.Popen(["sleep", "600"])
            Path(what).write_text(str(compiler.pid))
            time.sleep(600)
        if what == "die":
            os._exit(3)
        if what == "break":
            raise RuntimeError("CUDA error: an illegal memory access\nmore lines")
        if what == "refuse":
            raise DiffoptError("there is no such format")
        return {"heard": what}


def test_a_process_answers_and_says_what_is_wrong() -> None:
    one = Worker(Obeys())
    assert one.ask("a", 60) == {"heard": "a"}
    assert one.ask("refuse", 60) == {"failed": "there is no such format"}
    assert one.ask("break", 60) == {
        "failed": "RuntimeError: CUDA error: an illegal memory access",
        "spoiled": True,
    }
    assert one.ask("b", 60) == {"heard": "b"}
    assert one.ask("die", 60) == {
        "failed": "its process ended with exit code 3",
        "spoiled": True,
    }
    one.close()


def test_a_process_that_takes_too_long_is_ended_with_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "PATIENCE", 0.1)
    one = Worker(Obeys())
    assert one.ask("a", 60) == {"heard": "a"}
    number = tmp_path / "pid"
    assert one.ask(str(number), 4.0) == {"stopped": "took longer than 4 s", "spoiled": True}
    one.close()
    assert one._process.exitcode == -signal.SIGKILL
    stat = Path("/proc", number.read_text(), "stat")
    until = time.monotonic() + 10
    while stat.exists() and stat.read_text().split()[2] != "Z":  # one that nobody waits for
        assert time.monotonic() < until
        time.sleep(0.05)


def test_after_a_broken_row_the_engines_get_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    class Fake:
        def __init__(self, answers: Any) -> None:
            events.append(f"start {type(answers).__name__}")

        def ask(self, what: Any, seconds: float) -> Answer:
            if what is None:
                return {"failed": "out of memory", "spoiled": True}
            return {"failed": "broken", "spoiled": True}

        def close(self) -> None:
            events.append("end")

    monkeypatch.setattr(worker, "Worker", Fake)
    options = settings(tmp_path)
    with worker.Team(options, ahead=True) as team:
        assert team.measure(ROWS["exact"], 9) == {
            "failed": "there is nothing to compare with: out of memory"
        }
        torch.save(torch.zeros(2, 1), options.reference)
        assert team.measure(ROWS["exact"], 9) == {"failed": "broken"}
        assert team.measure(ROWS["exact"], 9) == {"failed": "broken"}
    assert events == [
        "start Engines",
        "start Diffusers",
        "end",
        "end",
        "start Engines",
        "end",
    ]


def test_an_engine_that_a_target_refuses_is_a_failed_row(tmp_path: Path) -> None:
    engines = Engines(settings(tmp_path, target="cpu"))
    answer = worker._answer(engines, ROWS["fp8"])
    assert answer == {
        "failed": "target cpu cannot take this program: in transformer_step the input of"
        " linear_default is in fp8, and cpu has no fp8 products: they need a GPU of compute"
        " capability 8.9; quantize activations to int8, or weights alone"
    }


# --- what is measured -----------------------------------------------------------------------------


def test_errors_are_relative_and_finite(tmp_path: Path) -> None:
    options = settings(tmp_path)
    torch.save(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), options.reference)
    result = measure.errors(options, torch.tensor([[3.0, 3.0], [0.0, 2.0]]))
    assert result["errors"] == pytest.approx([0.2, 0])
    with pytest.raises(DiffoptError, match="its latents are not finite"):
        measure.errors(options, torch.tensor([[3.0, float("nan")], [0.0, 2.0]]))


def test_random_weights_are_the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "POOL", 1000)  # smaller than the matrix: it begins anew
    monkeypatch.setattr(models, "FEW", 10)

    def network(sparse: bool) -> nn.Sequential:
        net = nn.Sequential(nn.Linear(100, 30), nn.LayerNorm(30))
        models.fill(net, "cpu", sparse)
        return net

    one, two, sparse = network(False), network(False), network(True)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    matrix = one[0].weight
    assert matrix.dtype == torch.bfloat16
    assert float(matrix.float().std()) == pytest.approx(0.1, rel=0.05)  # 1 / sqrt(100)
    assert torch.equal(matrix.view(-1)[:1000], matrix.view(-1)[1000:2000])
    assert not torch.equal(one[0].bias, torch.zeros(30))
    assert float(one[1].weight.float().mean()) == pytest.approx(1, abs=0.1)
    assert float(one[1].bias.float().mean()) == pytest.approx(0, abs=0.1)
    assert int((sparse[0].weight != 0).sum()) == 10


def test_weights_that_the_loop_does_not_need_are_counted() -> None:
    counts = savings.count("flux", tiny=True, steps=3)
    net = MODELS["flux"].build(tiny=True, device="cpu").transformer
    early = [net.time_text_embed, net.context_embedder, net.norm_out.linear]
    double, single = net.transformer_blocks[0], net.single_transformer_blocks[0]
    early += [double.norm1, double.norm1_context, single.norm]
    # The text in front of the first block is the same in all steps, but for its modulation.
    first = double.attn
    early += [first.add_q_proj, first.add_k_proj, first.add_v_proj, first.norm_added_q]
    early += [first.norm_added_k]
    hoisted = sum(2 * weight.numel() for part in early for weight in part.parameters())
    assert counts["before"] == sum(2 * weight.numel() for weight in net.parameters())
    tables = 2 * 4 * (8 + 16) * 16  # sines and cosines of the positions of 8 words, 16 patches
    assert counts["before"] - counts["after"] == hoisted - tables
    assert counts["values"] > 0
    assert counts["flops"]["after"] < counts["flops"]["before"]


# --- the document ---------------------------------------------------------------------------------


def row(seconds: float, **more: Any) -> dict[str, Any]:
    return {
        "build": {"passes": 20.0, "compile": 80.0},
        "first": 3.0,
        "seconds": [seconds, seconds - 0.1, seconds + 0.1],
        "memory": 9_000_000_000,
        "errors": [0.01, 0.03],
        **more,
    }


def test_the_section_of_made_up_results() -> None:
    rows = {
        "eager": row(4.0, **{"seconds of steps": [0.1, 0.2]}),
        "exact": row(2.0, **{"flops of steps": [2e12, 1e12, 1e12], "flops before": 5e11}),
        "compile": row(3.0),
        "all": {"stopped": "took longer than 360 s"},
        "float32": {"errors": [0.2, 0.4]},
    }
    rows["exact"]["limit"] = 1.5
    setup = {"target": "h100", "device": "H100", "torch": "2.11", "tiny": False, "steps": None}
    weights = {
        "parameters": 2_000_000_000,
        "steps": 30,
        "before": 4_000_000_000,
        "after": 3_000_000_000,
        "values": 200_000_000,
        "flops": {"before": 9e12, "after": 8e12},
    }
    models = {"sdxl": {"steps": 30, "rows": rows}}
    text = document.section({"setup": setup, "models": models, "weights": {"sdxl": weights}})
    assert text.splitlines()[2:] == [
        "H100, torch 2.11, target `h100`.",
        "",
        "### SDXL, 1024², guidance 5, Euler, 30 steps",
        "",
        "|  | ms a run | × eager | × compiled | ms a step | build, s | first run, s | memory, GB |"
        " error |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| diffusers, eager | 4000.0 (100.0) | 1.00 | 0.75 | 133.3 | 100 | 3.0 | 9.0 | 2.0e-02 |",
        "| exact passes | 2000.0 (100.0) | 2.00 | 1.50 | 66.7 | 100 | 3.0 | 9.0 | 2.0e-02 |",
        "| torch.compile, max-autotune | 3000.0 (100.0) | 1.33 | 1.00 | 100.0 | 100 | 3.0 | 9.0 |"
        " 2.0e-02 |",
        "| diffusers, eager, float32 | - | - | - | - | - | - | - | 3.0e-01 |",
        "",
        "- exact passes, cache, fp8: stopped: took longer than 360 s",
        "- exact passes against torch.compile, max-autotune: 1.50×, the goal is 1.15×.",
        "- diffusers, eager: steps take 100.0 to 200.0 ms, the device waiting after each.",
        "- exact passes: 1 × 2 and 2 × 1 TFLOP a step, and 0.5 before the first, at best 1500 ms a"
        " run.",
        "",
        "### Weights that the loop needs",
        "",
        "| model, steps | parameters | weights, GB | read in the loop, GB |  | kept for all steps,"
        " GB | all together | TFLOP a run |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| SDXL, 30 | 2.00 B | 4.00 | 3.00 | -25.0 % | 0.20 | -20.0 % | 9.0 to 8.0 |",
    ]


def test_without_a_gpu_the_section_says_so() -> None:
    assert document.section({}).splitlines()[2:] == [
        "No times have been taken yet: no GPU was at hand."
    ]
