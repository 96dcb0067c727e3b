"""One pipeline from its capture to its engine, in a process of its own.

`python -m tests.capture.whole_pipeline NAME …` prints a line of JSON after each step, so that a
crash or a hang loses nothing.
"""

import json
import logging
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

import diffopt
from tests.zoo.case import Case, tensors
from tests.zoo.every import every_case

STEPS = ("built", "captured", "new request", "exact passes", "engine")
PASSES = "unroll,hoist,simplify,fuse"


class Differs(Exception):
    """Two results that should have the same bits do not."""


def expect_same(what: str, got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    if len(got) != len(expected):
        raise Differs(f"{what}: {len(got)} tensors, not {len(expected)}")
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        if a.dtype != b.dtype or a.shape != b.shape:
            raise Differs(
                f"{what}: tensor {index} is {a.dtype}{list(a.shape)}, not {b.dtype}{list(b.shape)}"
            )
        if not torch.equal(a, b):
            most = (a.double() - b.double()).abs().max().item()
            raise Differs(f"{what}: tensor {index} differs by up to {most:.2g}")


def call(function: Any, case: Case, seed: int) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    with torch.no_grad():
        return tensors(function(**case.inputs(seed)))


def check(case: Case, done: Callable[[str], None]) -> None:
    """Check one pipeline, and call `done` with the name of each step that passed."""
    pipe = case.build()
    expected = [call(pipe, case, seed) for seed in (0, 1)]
    if not expected[0] or all(map(torch.equal, *expected)):
        raise Differs("the result does not depend on the seed")
    done("built")
    torch.manual_seed(0)
    program = diffopt.trace(pipe, check=True, **case.inputs(0))
    done("captured")
    for seed, result in enumerate(expected):
        expect_same(f"request {seed}", call(program, case, seed), result)
    expect_same("the pipeline after its capture", call(pipe, case, 0), expected[0])
    done("new request")
    diffopt.Pipeline.parse(PASSES).run(program)
    done("exact passes")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.engine"
        diffopt.write(program, "eager", path)
        engine = diffopt.load(path)
        for seed, result in enumerate(expected):
            expect_same(f"request {seed} to the engine", call(engine, case, seed), result)
    done("engine")


def run(name: str) -> None:
    """Check one pipeline and print what became of it, a line of JSON for each step."""
    start = time.monotonic()

    def say(**row: Any) -> None:
        row |= {"name": name, "seconds": round(time.monotonic() - start, 1)}
        print("ROW " + json.dumps(row), flush=True)

    try:
        check(every_case(name), lambda step: say(step=step))
    except Exception as error:
        message = str(error) or type(error).__name__
        say(error=message, kind=type(error).__name__, trace=traceback.format_exc())


def main(names: list[str]) -> None:
    """Check pipelines, one after the other."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    for name in names:
        run(name)


if __name__ == "__main__":
    main(sys.argv[1:])
