"""Reuse plans: which values each step of the sampling loop reuses from which earlier steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.errors import DiffoptError
from diffopt.ir import graph as g
from diffopt.ir.printing import format_type
from diffopt.ir.sampling_loop import Loop

aten = torch.ops.aten


@dataclass(frozen=True)
class Term:
    """A value as it was at an earlier step of the same branch, times a weight."""

    step: int
    weight: float = 1.0


@dataclass(frozen=True, eq=False)
class Reuse:
    """Replace a value of the loop's body by a weighted sum of its values at earlier steps.

    Attributes:
        value: A tensor of the body, which is not computed.
        terms: The terms of the sum.
        base: If set, the sum is of `value - base` and is added to `base`, a value of the same shape
            and type before it in the body.
    """

    value: fx.Node
    terms: tuple[Term, ...]
    base: fx.Node | None = None


Plan = Mapping[int, Sequence[Reuse]]
"""The reuses of each step, in its calls of all branches."""

Export = tuple[fx.Node, fx.Node | None]
"""A value that a step exports to later ones, or with a base the difference to it."""


@dataclass(frozen=True, eq=False)
class ResolvedReuse:
    """A reuse whose terms name only steps that compute the value; `weights` are by step."""

    value: fx.Node
    base: fx.Node | None
    weights: Mapping[int, float]

    @property
    def is_sum(self) -> bool:
        """Tell whether it is more than a plain copy of one step's value."""
        return list(self.weights.values()) != [1.0]

    @property
    def signature(self) -> tuple[Any, ...]:
        """The key of reuses that can share a body."""
        return self.value, self.base, len(self.weights), self.is_sum

    @property
    def export(self) -> Export:
        """What the source steps have to export."""
        return self.value, self.base

    def exported_type(self) -> Tensor:
        """Return the exported value as a fake tensor."""
        if self.base is None:
            value: Tensor = self.value.meta["val"]
            return value
        added: Tensor = g.fake_call(aten.sub.Tensor, (self.value, self.base))
        return added

    def weight_dtype(self) -> torch.dtype:
        """Return the dtype of a sum's weights."""
        # A number of 32 bits does not make a value of 16 bits wider, and is the more exact weight.
        is_double = self.value.meta["val"].dtype == torch.float64
        return torch.float64 if is_double else torch.float32


@dataclass(eq=False)
class StepPlan:
    """The reuses of one step, and its exports with the steps that read them."""

    reuses: list[ResolvedReuse]
    exports: dict[Export, list[int]]

    @property
    def exported_nodes(self) -> list[fx.Node]:
        """The nodes that exports are computed from."""
        return [node for export in self.exports for node in export if node is not None]

    def flops(self, loop: Loop) -> int:
        """Return the FLOPs of one call of this step."""
        reused = {item.value: item.base for item in self.reuses}
        return loop.cost(loop.live_nodes(reused, self.exported_nodes) - reused.keys())


def check_plan(loop: Loop, plan: Plan) -> None:
    """Raise DiffoptError where a plan names unknown steps or values that cannot be reused."""
    for step, reuses in plan.items():
        if step not in range(loop.steps):
            raise DiffoptError(
                f"the plan has a step {step}; {loop.name} has the steps 0 to {loop.steps - 1}"
            )
        seen: set[fx.Node] = set()
        for reuse in reuses:
            where = f"{loop.name}, step {step}: {reuse.value}"
            _check_value(loop, where, reuse)
            if reuse.value in seen:
                raise DiffoptError(f"{where} is taken twice in one step: give one sum of terms")
            seen.add(reuse.value)
            _check_terms(where, step, reuse)


def _check_value(loop: Loop, where: str, reuse: Reuse) -> None:
    value, base = reuse.value, reuse.base
    if value not in loop.positions or value.op != "call_function":
        raise DiffoptError(f"{where} is no value that the body computes: name one of its operators")
    tensor = value.meta["val"]
    if not isinstance(tensor, Tensor):
        raise DiffoptError(f"{where} has several results: name one of them")
    is_copy = base is None and [term.weight for term in reuse.terms] == [1.0]
    if not is_copy and not tensor.is_floating_point():
        raise DiffoptError(
            f"{where} is {format_type(tensor)}: without a fraction it can only be taken as it was"
        )
    if base is None:
        return
    if base not in loop.positions:
        raise DiffoptError(f"{where} is taken relative to {base}, which is no value of the body")
    if loop.positions[base] >= loop.positions[value]:
        raise DiffoptError(
            f"{where} is taken relative to {base}, which does not come before it in the body"
        )
    if format_type(base.meta["val"]) != (described := format_type(tensor)):
        raise DiffoptError(
            f"{where} is {described}, and {base}, which it is taken relative to, is "
            f"{format_type(base.meta['val'])}"
        )


def _check_terms(where: str, step: int, reuse: Reuse) -> None:
    if not reuse.terms:
        raise DiffoptError(f"{where} is taken from no step: name one before step {step}")
    for term in reuse.terms:
        if term.step not in range(step):
            raise DiffoptError(
                f"{where} is taken from step {term.step}: only a step before {step} has it by then"
            )
        if not math.isfinite(term.weight):
            raise DiffoptError(f"{where} has the weight {term.weight}: give a finite one")


def resolve(loop: Loop, plan: Plan) -> list[StepPlan]:
    """Return the reuses and exports of each step, without those that no result depends on."""
    resolved: list[dict[fx.Node, ResolvedReuse]] = []
    for index in range(loop.steps):
        reuses = sorted(plan.get(index, ()), key=lambda reuse: loop.positions[reuse.value])
        resolved.append({reuse.value: _compose(reuse, resolved) for reuse in reuses})
    steps = [StepPlan([], {}) for _ in resolved]
    for index in reversed(range(loop.steps)):  # later steps first: they determine the exports
        step, by_value = steps[index], resolved[index]
        bases = {value: item.base for value, item in by_value.items()}
        live = loop.live_nodes(bases, step.exported_nodes)
        step.reuses = [item for value, item in by_value.items() if value in live]
        for item in step.reuses:
            for source in item.weights:
                steps[source].exports.setdefault(item.export, []).append(index)
    return steps


def _compose(reuse: Reuse, earlier: Sequence[Mapping[fx.Node, ResolvedReuse]]) -> ResolvedReuse:
    """Replace terms of steps that reuse the value themselves by their own source steps."""
    weights: dict[int, float] = {}
    for term in reuse.terms:
        other = earlier[term.step].get(reuse.value)
        # Reused relative to another base, the value is computed there from it: that step exports.
        composes = other is not None and other.base is reuse.base
        sources = other.weights if other is not None and composes else {term.step: 1.0}
        for step, weight in sources.items():
            weights[step] = weights.get(step, 0.0) + term.weight * weight
    counted = {step: weights[step] for step in sorted(weights) if weights[step]}
    return ResolvedReuse(reuse.value, reuse.base, counted or weights)
