"""The capture of whole pipelines: a replay has the bits of the call that it replaces.

A run of all rows writes docs/capture.md. Then come the exact passes, on what was captured, in more
than one order.
"""

import random
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import diffusers
import pytest
import torch

import diffopt
from diffopt.capture.trace import Session
from diffopt.core import Pipeline, Record
from diffopt.core.equivalence import difference
from diffopt.ir.program import Program
from tests.zoo import (
    CASES,
    LEFT_OUT,
    SCHEDULERS,
    call,
    missing_package,
    scheduler_case,
    session,
    traced,
)

DOCUMENT = Path(__file__).parents[2] / "docs" / "capture.md"
EXACT = "bit-exact"
DENOISERS = ("transformer", "unet", "prior")

# Rows that are known not to be captured, and the whole message of the error that says so.
LIMITS: dict[str, str] = {}
SCHEDULER_LIMITS: dict[str, str] = {}

Results = dict[str, tuple[str, str]]  # row -> what the document says of its pipeline, result


@pytest.fixture(scope="session")
def results():
    """Collect what the rows give, and write the document if none was left out."""
    pipelines: Results = {}
    schedulers: Results = {}
    yield pipelines, schedulers
    if pipelines.keys() == CASES.keys() and schedulers.keys() == {row[0] for row in SCHEDULERS}:
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(document(pipelines, schedulers), encoding="utf-8", newline="\n")


@pytest.fixture(scope="session")
def sessions():
    """Return the captures of a pipeline whose scheduler is replaced, by the pipeline's name."""
    return cache(lambda name: Session(CASES[name].build()))


def document(pipelines: Results, schedulers: Results) -> str:
    """Return the document; the order is that of the zoo, so that a second run changes nothing."""
    lines = [
        "# What is captured",
        "",
        "`tests/capture/test_pipelines.py` writes this file. Each row is a pipeline with random",
        "weights. It is captured with one prompt and seed; bit-exact means that the replay gives",
        "the tensors of the pipeline, to the last bit, for that prompt and seed and for new ones.",
        "A prompt of another number of tokens, where the pipeline does not pad to a fixed one, is",
        "captured when it comes; [how capture works](how-capture-works.md) has the mechanism.",
        "",
        "| pipeline | class | denoiser | result |",
        "| --- | --- | --- | --- |",
    ]
    for name in CASES:
        about, result = pipelines[name]
        lines.append(f"| {name} | {about} | {cell(result)} |")
    lines += ["", "| row | scheduler | pipeline | result |", "| --- | --- | --- | --- |"]
    for name, scheduler, _, base in SCHEDULERS:
        about, result = schedulers[name]
        lines.append(f"| {name} | {scheduler} | {base}{about} | {cell(result)} |")
    lines += ["", "| scheduler without a row | why |", "| --- | --- |"]
    lines += [f"| {name} | {why} |" for name, why in sorted(LEFT_OUT.items())]
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    """Return the first line of a message as it can stand in a table, without addresses."""
    first = text.strip().partition("\n")[0]
    return re.sub(r"0x[0-9a-f]+", "0x...", first).replace("|", "\\|")


def describe(pipe) -> str:
    """Return the class of a pipeline and of the network that it calls in its loop."""
    parts = [pipe.components[name] for name in DENOISERS if pipe.components.get(name)]
    return f"{type(pipe).__name__} | {type(parts[0]).__name__}"


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True)
    )


Capture = Callable[[], Program]
"""Returns the program of a pipeline with its seed 0."""


def check(pipe, case, capture: Capture) -> None:
    """Compare replays with the pipeline, whose results are taken before it is captured."""
    expected = [call(pipe, case.inputs(seed)) for seed in (0, 1)]
    program = capture()
    program.verify()
    for seed, result in enumerate(expected):
        assert same(call(program, case.inputs(seed)), result), f"other bits for seed {seed}"
    assert same(call(pipe, case.inputs(0)), expected[0]), "the capture changed the pipeline"


def record(
    table: Results, name: str, about: str, pipe, case, capture: Capture, limit: str | None
) -> None:
    """Check a row and note the result, also when the check fails."""
    if limit is not None:
        with pytest.raises(diffopt.DiffoptError) as caught:
            check(pipe, case, capture)
        assert str(caught.value) == limit
        table[name] = (about, limit)
        return
    try:
        check(pipe, case, capture)
    except Exception as error:
        table[name] = (about, str(error) or type(error).__name__)
        raise
    table[name] = (about, EXACT)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_pipeline(name, results):
    pipe = session(name).pipeline
    capture = partial(traced, name)
    record(results[0], name, describe(pipe), pipe, CASES[name], capture, LIMITS.get(name))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [row[0] for row in SCHEDULERS])
def test_scheduler(name, results, sessions):
    _, scheduler, config, base = next(row for row in SCHEDULERS if row[0] == name)
    package = missing_package(scheduler)
    if package:
        results[1][name] = ("", f"not run: needs {package}")
        pytest.skip(f"needs {package}")
    case = scheduler_case(name)
    if config is None:
        about, pipe, capture = ", its own", session(base).pipeline, partial(traced, base)
    else:
        # The pipelines' networks are exported once for all schedulers.
        captures = sessions(base)
        about, pipe = "", captures.pipeline
        pipe.register_modules(scheduler=getattr(diffusers, scheduler)(**config))
        capture = partial(captures.program, case.inputs(0))
    record(results[1], name, about, pipe, case, capture, SCHEDULER_LIMITS.get(name))


# Exact passes

PASSES = ("unroll", "hoist", "simplify", "fuse")


@pytest.mark.parametrize("name", sorted(CASES))
def test_exact_passes(name: str) -> None:
    case = CASES[name]
    program = traced(name)
    # Every pass is checked against the program before it as it runs: an error raises.
    orders = [",".join(PASSES)]
    number = sorted(CASES).index(name)
    if number % 3 == 0:  # for time: one in three also in another order
        orders.append(",".join(random.Random(name).sample(PASSES, len(PASSES))))
    for text in orders:
        result = Pipeline.parse(text).run(program)
        records = [Record.from_json(row) for row in result.history]
        assert [r.exact for r in records] == [True] * 4
        new = program.prepare(**case.inputs(0) | {"generator": torch.Generator().manual_seed(1)})
        expected, got = program.run(new), result.run(new)
        # Other noise, all four passes: the rounding of merged and batched matrix products.
        assert difference(got, expected)[1] <= 1e-4
        assert {r.max_abs for r in records if r.text == "unroll"} == {0.0}
        result.to_members()  # every operator may be in files
        if number % 3 == 1:  # for time: another third
            Pipeline.parse("batch(max=2)").run(result)


def test_every_pass_has_what_to_do_on_a_unet_and_on_a_transformer() -> None:
    for name in ("sd", "dit"):
        program = traced(name)
        result = Pipeline.parse(",".join(PASSES)).run(program)
        assert all(row["changed"] for row in result.history)
        step = next(n for n in result.components if n.endswith("_step"))
        assert len(result.calls(step)) > 1
