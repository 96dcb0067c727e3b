"""Makes the programs of configurations, and measures their cost."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from diffopt.analysis import weight_memory
from diffopt.core import Pipeline
from diffopt.ir.program import Program
from diffopt.quantization import ranges
from examples.quantization.configurations import ONE_STEP, beginning, split
from examples.study.study import CALIBRATION, Study


def make(study: Study, config: str) -> tuple[Program, dict[str, Any]]:
    """Return the program of a configuration, its weights' bytes, and the last pass's notes."""
    front, behind = split(config)
    base = study.program(front) if behind else study.traced
    one = one_step() if config.startswith(ONE_STEP) else contextlib.nullcontext()
    with one:
        program = Pipeline.parse(behind or beginning(front)).run(
            base, verify=False, enforce=False, seed=CALIBRATION, prompts=study.prompts
        )
    records = program.history[len(base.history) :]
    return program, {
        "weights": weight_memory.of_program(program).to_json(),
        "seconds": sum(record["seconds"] for record in records),
        "notes": records[-1]["notes"],
        "program": program.flops(),
    }


@contextlib.contextmanager
def one_step() -> Iterator[None]:
    """Replace the ranges of every step by those of the middle one in which a value occurs."""
    whole = ranges.measure

    def measure(*args: Any, **kwargs: Any) -> Any:
        return {node: middle(measured) for node, measured in whole(*args, **kwargs).items()}

    with mock.patch.object(ranges, "measure", measure):
        yield


def middle(measured: ranges.Ranges) -> ranges.Ranges:
    """Return the ranges with those of the middle step in all."""
    seen = measured.low <= measured.high
    steps = seen.nonzero().flatten()
    if not len(steps):
        return measured
    at = steps[len(steps) // 2]
    low, high = (torch.where(seen, values[at], values) for values in (measured.low, measured.high))
    return ranges.Ranges(low, high)
