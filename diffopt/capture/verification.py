"""Compares a captured program with the pipeline itself, which runs once for real."""

import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffopt.capture import perturbation
from diffopt.capture.value_tree import equal_values
from diffopt.errors import CaptureError
from diffopt.host.arguments import Place, items, leaves, place_text
from diffopt.host.guards import Mismatch
from diffopt.host.schema import describe, phrase
from diffopt.ir.program import Program

log = logging.getLogger("diffopt")

_ARRAYS = (Tensor, np.ndarray, Image.Image)

LIMIT = 120.0
"""Seconds that a comparison may take which nobody asked for."""

_EFFICIENCY = 0.3  # of a model, to a product of square matrices

EQUAL = "equal to the pipeline's own result, for other arguments than those of the capture"
_OWN = "equal to the pipeline's own result, for the arguments of the capture"


def seconds(program: Program) -> float:
    """Return about how long a comparison takes here."""
    return 2 * program.flops() / (_EFFICIENCY * _flops_per_second())


@functools.cache
def _flops_per_second() -> float:
    matrix, size = torch.ones(512, 512), 512
    durations = []
    for _ in range(4):
        begin = time.perf_counter()
        torch.mm(matrix, matrix)
        durations.append(time.perf_counter() - begin)
    return 2 * size**3 / max(min(durations), 1e-9)


def compare(
    pipeline: Callable[..., Any],
    program: Program,
    probe: Mapping[str, Any],
    arguments: Mapping[str, Any],
) -> str:
    """Run pipeline and program with the probe's arguments, and return a sentence on the outcome.

    Where these fit neither (a guard binds a value that Python read, an index is out of range), with
    the arguments of the capture.

    Raises:
        CaptureError: The results differ in structure, in a type or in a bit.
    """

    def replay(**arguments: Any) -> Any:
        # Not a call of the program, which would capture one for other numbers of tokens.
        tensors = program.prepare(**arguments)
        try:
            return program.pack(program.run(tensors), arguments.get("output_type"))
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            raise CaptureError(
                f"the program fails where the pipeline gives a result: {error}"
            ) from error

    try:
        expected, outcome = run_for_real(pipeline, probe), EQUAL
        got = run_for_real(replay, probe)
    except (Mismatch, ValueError, TypeError, IndexError, KeyError, RuntimeError):
        expected, outcome = run_for_real(pipeline, arguments), _OWN
        got = run_for_real(replay, arguments)
    for difference in differences(expected, got):
        raise CaptureError(
            f"the program does not give what the pipeline gives: {difference}; something that the "
            "pipeline does was not captured (check=False, or --no-check, captures it all the same)"
        )
    if not _tells(expected):
        log.warning("the comparison tells nothing: the pipeline's result has no finite number")
        return f"{outcome}, which has no finite number"
    return outcome


def _tells(result: Any) -> bool:
    """Tell whether a result could have differed: it is not NaN throughout."""
    numbers = [_numbers(v) for _, v in leaves(result) if isinstance(v, _ARRAYS)]
    return not numbers or any(bool(tensor.isfinite().any()) for tensor in numbers)


def run_for_real(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Call a function with copies of arguments, and with the same default generator each time."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return function(**perturbation.separated(arguments))


def differences(expected: Any, got: Any, place: Place = ("result",)) -> Iterator[str]:
    """Yield a description of each difference of two results; NaN equals NaN."""
    name = place_text(place)
    parts, others = items(expected), items(got)
    if parts is not None and others is not None:
        if [key for key, _ in parts] != [key for key, _ in others]:
            yield f"{name} is {phrase(describe(got))}, not {phrase(describe(expected))}"
            return
        for (key, part), (_, other) in zip(parts, others, strict=True):
            yield from differences(part, other, (*place, key))
        return
    ours, theirs = describe(expected, shallow=True), describe(got, shallow=True)
    if isinstance(expected, Tensor) and isinstance(got, Tensor):  # in whatever order of memory
        ours, theirs = ({"tensor": [*row["tensor"][:2], None]} for row in (ours, theirs))
    if ours != theirs:
        yield f"{name} is {phrase(theirs)}, not {phrase(ours)}"
    elif isinstance(expected, _ARRAYS):
        a, b = _numbers(expected), _numbers(got)
        same = equal_values(a, b)
        if not bool(same.all()):
            most = float((a.double() - b.double()).abs().nan_to_num().max())
            count = int((~same).sum())
            yield f"{count} of {a.numel()} values of {name} differ, by up to {most:.3g}"


def _numbers(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.as_tensor(np.array(value))
