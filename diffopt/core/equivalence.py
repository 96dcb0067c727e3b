"""Compares the programs before and after a pass by running both on the sample inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.analysis import dtype_regions
from diffopt.core.pass_base import Pass
from diffopt.core.record import Record, Size
from diffopt.errors import ToleranceError, VerifyError
from diffopt.ir import graph
from diffopt.ir.interpreter import Interpreter
from diffopt.ir.program import Program

# Where layers round their inputs coarsely, a last bit before them decides which way some round, and
# each sampling step passes that on to the next. Outputs may change by so many roundings: by less
# than `cast` and `quantize` change them, which round every value.
ROUNDINGS = 4


class Snapshot:
    """A program between two passes, with its outputs on the sample inputs, computed once."""

    def __init__(self, program: Program, size: Size) -> None:
        self.program = program
        self.size = size
        self.fingerprint = program.fingerprint()
        self._outputs: tuple[Tensor, ...] | None = None
        self._aliases: set[str] = set()

    def outputs(self) -> tuple[Tensor, ...]:
        """Return the outputs for the inputs seen at capture; runs the program on the first call."""
        if self._outputs is None:
            # Cloned inputs and outputs: a program that writes into either would hide its error.
            inputs = [tensor.clone() for tensor in self.program.sample_inputs()]
            outputs = self._run(inputs)
            self._aliases = _aliases(self.program, inputs, outputs)
            self._outputs = tuple(t.clone() for t in self.program.sample_outputs(outputs))
        return self._outputs

    def _run(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        # Interpreted: to write and compile the graphs' code takes longer than one run of it.
        with torch.no_grad():
            return Interpreter(self.program.root).run(*inputs)

    def share_outputs(self, other: Snapshot) -> None:
        """Use the outputs of an equal program instead of running this one."""
        self._outputs = other.outputs()
        self._aliases = other._aliases

    def verify_aliases(self, before: Snapshot) -> None:
        """Raise a `VerifyError` when an output has an alias that it did not have before."""
        self.outputs()
        before.outputs()
        new = self._aliases - before._aliases
        if new:
            raise VerifyError("; ".join(sorted(new)) + ": the caller may write into it")


def _aliases(program: Program, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> set[str]:
    """Return which outputs share memory with an input, a weight or another output, as text."""
    owners = {_address(tensor): f"input {index}" for index, tensor in enumerate(inputs)}
    for name, body in {"the pipeline": program.root, **program.components}.items():
        for weight, tensor in graph.named_tensors(body):
            owners.setdefault(_address(tensor), f"{weight} of {name}")
    aliases = set()
    for index, tensor in enumerate(outputs):
        if tensor.numel() == 0:
            continue
        owner = owners.setdefault(_address(tensor), f"output {index}")
        if owner != f"output {index}":
            aliases.add(f"output {index} shares memory with {owner}")
    return aliases


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def difference(new: Sequence[Tensor], old: Sequence[Tensor]) -> tuple[float, float]:
    """Return the largest absolute difference, and the norm of the difference over that of `old`.

    Both are infinite where shapes, dtypes, or the places of infinite and nan values differ.
    """
    if [(t.shape, t.dtype) for t in new] != [(t.shape, t.dtype) for t in old]:
        return math.inf, math.inf
    largest = error = norm = 0.0
    for a, b in zip(new, old, strict=True):
        # inf - inf is nan, so equal special values are masked first.
        equal = (a == b) | ((a != a) & (b != b))
        wide = torch.complex128 if a.is_complex() else torch.float64
        gap = torch.where(equal, 0.0, a.to(wide) - b.to(wide)).abs()
        gap = gap.nan_to_num(math.inf, math.inf)
        largest = max(largest, float(gap.max()) if gap.numel() else 0.0)
        error += float(gap.square().sum())
        norm += float(b.to(wide).abs().nan_to_num(0.0, 0.0, 0.0).square().sum())
    if error == 0.0:
        return largest, 0.0
    return largest, float((error / norm) ** 0.5) if norm else math.inf


def enforce_bounds(step: Pass, record: Record, before: Snapshot, budget: float | None) -> None:
    """Raise a `ToleranceError` where a pass changed the outputs by more than it may.

    Sampling may amplify what a step rounds: outputs of an exact pass may differ by as much as some
    last places in each call make them differ, and the record notes that.
    """
    if record.max_abs is None or record.relative is None:
        return  # outputs were not compared
    if record.exact:
        # Against the largest value of the outputs: sampling mixes all of them, so that a value
        # near zero carries the rounding of its neighbours.
        coarse = dtype_regions.coarsest(before.program) if step.atol + step.rtol else None
        factor = step.rtol + (ROUNDINGS * coarse[1] if coarse else 0.0)
        allowed = step.atol + factor * _largest(before.outputs())
        if not record.max_abs <= allowed:
            floor = noise_floor(before) if allowed else 0.0
            if record.max_abs <= ROUNDINGS * floor:
                record.notes["rounding is amplified"] = {
                    "output": record.max_abs,
                    "by a last place in each call": floor,
                }
                return
            more, advice = "", ""
            if coarse:
                more = f"; with roundings to {coarse[0]}, {allowed:.3g}"
                advice = f"; write {step.name} before what computes in {coarse[0]}"
            raise ToleranceError(
                f"{step} is exact and changed the output by {record.max_abs:.3g}"
                f" (allowed: {record.tolerance or 'nothing'}{more}){advice}"
            )
        return
    if budget is not None and not record.relative <= budget:
        raise ToleranceError(
            f"{step} added a relative error of {record.relative:.3g}, its budget is {budget:g}"
        )


def noise_floor(snapshot: Snapshot) -> float:
    """Return how far outputs move where each call's inputs and results move by a last place.

    So far rounding alone may carry the outputs of a program that computes the same in another
    order: a diffusion sampler with large guidance multiplies it from step to step.
    """
    generator = torch.Generator().manual_seed(0)

    def nudged(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        signs = torch.randint(0, 2, value.shape, generator=generator).mul_(2).sub_(1)
        return value * (1 + signs.to(value) * torch.finfo(value.dtype).eps)

    def nudge_results(interpreter: Interpreter, node: fx.Node) -> Any:
        value = interpreter.run_node(node)
        return tuple(map(nudged, value)) if node.op == "call_module" else value

    program = snapshot.program
    inputs = [nudged(tensor.clone()) for tensor in program.sample_inputs()]
    with torch.no_grad():
        moved = Interpreter(program.root).run(*inputs, hook=nudge_results)
    return difference(program.sample_outputs(moved), snapshot.outputs())[0]


def _largest(tensors: Sequence[Tensor]) -> float:
    """Return the largest absolute value."""
    return max((float(t.double().abs().max()) for t in tensors if t.numel()), default=0.0)


def squared_relative_error(tensors: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the squared norm of the difference over the squared norm of `exact`."""
    norm = error = 0.0
    for tensor, reference in zip(tensors, exact, strict=True):
        norm += float(reference.double().square().sum())
        error += float((tensor.double() - reference.double()).square().sum())
    return error / (norm or 1.0)
