"""Tests a pass on a function of a few lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffopt.capture.trace import trace_function
from diffopt.core import Pass, Pipeline, Record
from diffopt.ir.printing import format_graph
from diffopt.ir.program import Program


def check_pass(
    step: Pass | str, model: Callable[..., Any] | Program, *args: Any, atol: float = 0.0
) -> tuple[str, Record]:
    """Run a pass on a function or program; return the new graph's text and the record.

    It checks the IR's invariants, that no output newly shares memory with an input, that a second
    run changes nothing, and that the outputs are equal, bit by bit.

    Args:
        step: A pass, or pipeline text.
        model: A function of tensors, an `nn.Module`, or a program.
        args: Sample tensors to capture a function with.
        atol: Largest allowed difference of the outputs; the test says why it is not 0.
    """
    program = model if isinstance(model, Program) else trace_function(model, *args)
    pipeline = Pipeline.parse(step) if isinstance(step, str) else Pipeline((step,))
    result = pipeline.run(program, enforce=False)
    record = Record.from_json(result.history[-1])
    assert record.max_abs is not None
    assert record.max_abs <= atol, f"{record.text} changed the output by {record.max_abs:.3g}"
    again = Record.from_json(pipeline.run(result, enforce=False).history[-1])
    assert not again.changed, f"{record.text} is not done after one run"
    return str(result) if result.components else format_graph(result.root), record
