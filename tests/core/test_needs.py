"""What passes run beside weights: what they declare, what they do, and the estimate before it."""

import contextlib
from typing import Any

import pytest
import torch

from diffopt.core import Context, Pass, Pipeline, find_pass, pass_names
from diffopt.core.estimate import duration, seconds_a_run
from diffopt.core.instruments import Estimate
from diffopt.errors import DiffoptError
from diffopt.execution import trajectories
from diffopt.ir.program import Program
from tests import sampler
from tests.zoo import traced

NOTHING = (
    "cast(bf16,islands=norms)",
    "cast(bf16,islands=none)",
    "quantize(int8,activations=rows)",
    "quantize(int8,activations=dynamic)",
    "quantize(int4,activations=none)",
    "prune(mlp)",
    "prune(2:4)",
    "low-rank(rank=0.5)",
    "merge-tokens",
    "hoist,simplify,fuse",
)
MEASURED = {
    "cast": "one run",
    "cast(fp16,islands=norms)": "one run",
    "quantize(int8)": "calibration",
    "quantize(int8,activations=rows,smooth=true)": "calibration",
    "quantize(auto)": "calibration",
    "prune(mlp,importance=taylor)": "calibration",
    "prune(auto,flops=0.7)": "calibration",
    "low-rank(data=true)": "calibration",
    "recover": "calibration",
    "cache(auto,speedup=2)": "calibration",
    "cache(smoothcache)": "calibration",
    "cache(magcache)": "calibration",
}


def last(text: str) -> Pass:
    return Pipeline.parse(text).passes[-1]


@pytest.mark.parametrize("name", pass_names())
def test_every_pass_says_what_it_needs(name: str) -> None:
    step = find_pass(name)()
    assert step.needs() in ("nothing", "one run", "calibration")
    assert (step.needs() == "nothing") == (step.runs(sampler.program()) == 0)


@pytest.mark.parametrize("text", MEASURED)
def test_what_follows_from_values_is_measured(text: str) -> None:
    assert last(text).needs() == MEASURED[text]
    assert last(text).runs(sampler.program()) >= 1


@pytest.fixture(scope="module", params=["sd", "dit"])
def unrolled(request: pytest.FixtureRequest) -> Program:
    return Pipeline.parse("unroll").run(traced(request.param), compare=False)


@pytest.mark.parametrize("text", NOTHING)
def test_what_follows_from_weights_runs_nothing(
    text: str, unrolled: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*args: Any, **options: Any) -> Any:
        raise AssertionError("the program was run")

    for name in ("steps", "run_root", "root_values"):
        monkeypatch.setattr(trajectories, name, run)
    monkeypatch.setattr(Program, "run", run)
    assert all(step.needs() == "nothing" for step in Pipeline.parse(text).passes)
    with contextlib.suppress(DiffoptError):  # where a pass finds nothing to do
        Pipeline.parse(text).run(unrolled, compare=False)


def test_named_islands_are_those_that_a_measurement_takes(unrolled: Program) -> None:
    """Compare the bodies that are cast with and without a run."""
    measured = Pipeline.parse("cast(fp16,islands=norms)").run(unrolled)
    fixed = Pipeline.parse("cast(fp16,islands=norms)").run(unrolled, compare=False)
    assert str(fixed) == str(measured)
    inputs = unrolled.sample_inputs()
    assert all(map(torch.equal, fixed.run(inputs), measured.run(inputs)))
    notes = fixed.history[-1]["notes"]
    assert all(set(note) == {"islands"} for note in notes.values())


def test_operators_without_a_kernel_stay_in_float32_without_a_run() -> None:
    """Cast a component with an operator that torch has in float32 alone."""
    from tests.passes.build import body, parameter, randn
    from tests.passes.build import program as written

    aten = torch.ops.aten

    def make(make: Any, x: Any) -> Any:
        x = make(aten.linear.default, x, parameter(4, 4))
        x = make(aten.inverse.default, x)
        return make(aten.linear.default, x, parameter(4, 4, seed=1))

    x = randn(4, 4)
    program = written(lambda make, x: make.call("part", x), x, part=body(make, x))
    for dtype in ("bf16", "fp16"):
        done = Pipeline.parse(f"cast({dtype},islands=none)").run(program, compare=False)
        (node,) = done.components["part"].graph.find_nodes(
            op="call_function", target=aten.inverse.default
        )
        assert node.meta["val"].dtype == torch.float32
        (skipped,) = [text for text in done.history[-1]["skipped"] if "float32" in text]
        assert skipped.startswith("part.inverse_default: stays in float32: ")
        assert done.run([x])[0].isfinite().all()


class _Long(Pass):
    def needs(self) -> Any:
        return "calibration"

    def runs(self, program: Program) -> float:
        return 3.0

    def run(self, program: Program, ctx: Context) -> None:
        assert not ctx.compare


def test_a_long_pass_is_announced() -> None:
    lines: list[str] = []
    program = sampler.program()
    Pipeline((_Long(),)).run(program, compare=False, instruments=[Estimate(lines.append, 0.0)])
    (line,) = lines
    assert (
        line == "test-needs: calibration, 3 runs of the program, less than a second on this machine"
    )
    Pipeline((_Long(),)).run(program, compare=False, instruments=[Estimate(lines.append)])
    assert len(lines) == 1


def test_the_estimate_grows_with_the_program() -> None:
    small, large = sampler.program(), traced("sd")
    assert 0 < seconds_a_run(small) < seconds_a_run(large)
    assert duration(seconds_a_run(small)) == "less than a second"
