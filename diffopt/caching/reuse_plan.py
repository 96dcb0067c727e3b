"""What each step of the sampling loop takes from which earlier steps, and what it hands over."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.errors import DiffoptError
from diffopt.ir import nodes
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
    """Take a value of the loop's body from earlier steps in place of computing it.

    Attributes:
        value: What is not computed: a tensor of the body.
        terms: What stands for it.
        base: A value that `value` is taken relative to: of the same shape and type, and before it
            in the body.
    """

    value: fx.Node
    terms: tuple[Term, ...]
    base: fx.Node | None = None


Plan = Mapping[int, Sequence[Reuse]]
"""What each step takes; it goes for the step's calls of all branches."""

Kept = tuple[fx.Node, fx.Node | None]
"""What an earlier step hands over: a value, or what it adds to a base."""


@dataclass(frozen=True, eq=False)
class Taken:
    """A reuse whose terms name only steps that have the value themselves."""

    value: fx.Node
    base: fx.Node | None
    weights: Mapping[int, float]

    @property
    def is_sum(self) -> bool:
        """Tell whether it takes more than one value as it was."""
        return list(self.weights.values()) != [1.0]

    @property
    def form(self) -> tuple[Any, ...]:
        """What is equal where a body can be the same."""
        return self.value, self.base, len(self.weights), self.is_sum

    @property
    def kept(self) -> Kept:
        """What an earlier step has to hand over."""
        return self.value, self.base

    def handed_over(self) -> Tensor:
        """Return the type of what an earlier step hands over."""
        if self.base is None:
            value: Tensor = self.value.meta["val"]
            return value
        added: Tensor = nodes.fake_call(aten.sub.Tensor, (self.value, self.base))
        return added

    def weight_dtype(self) -> torch.dtype:
        """Return the type of the weights of a sum."""
        # A number of 32 bits does not make a value of 16 bits wider, and is the more exact weight.
        is_double = self.value.meta["val"].dtype == torch.float64
        return torch.float64 if is_double else torch.float32


@dataclass(eq=False)
class Step:
    """What one step takes, and what it hands over to which steps."""

    taken: list[Taken]
    kept: dict[Kept, list[int]]


def check(loop: Loop, plan: Plan) -> None:
    """Refuse a plan that means nothing."""
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
    if format_type(base.meta["val"]) != (own := format_type(tensor)):
        raise DiffoptError(
            f"{where} is {own}, and {base}, which it is taken relative to, is "
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


def schedule(loop: Loop, plan: Plan) -> list[Step]:
    """Return what each step takes and hands over, without what no result depends on."""
    resolved: list[dict[fx.Node, Taken]] = []
    for index in range(loop.steps):
        own = sorted(plan.get(index, ()), key=lambda reuse: loop.positions[reuse.value])
        resolved.append({reuse.value: _resolve(reuse, resolved) for reuse in own})
    steps = [Step([], {}) for _ in resolved]
    for index in reversed(range(loop.steps)):  # by then it is known what later steps take
        step, own_items = steps[index], resolved[index]
        more = [node for kept in step.kept for node in kept if node is not None]
        live = loop.live_nodes({value: item.base for value, item in own_items.items()}, more)
        step.taken = [item for value, item in own_items.items() if value in live]
        for item in step.taken:
            for source in item.weights:
                steps[source].kept.setdefault(item.kept, []).append(index)
    return steps


def _resolve(reuse: Reuse, earlier: Sequence[Mapping[fx.Node, Taken]]) -> Taken:
    """Replace steps that took the value themselves by the steps that they took it from."""
    weights: dict[int, float] = {}
    for term in reuse.terms:
        other = earlier[term.step].get(reuse.value)
        # What was taken in another form has to be computed in that step, and is a source itself.
        composes = other is not None and other.base is reuse.base
        sources = other.weights if other is not None and composes else {term.step: 1.0}
        for step, weight in sources.items():
            weights[step] = weights.get(step, 0.0) + term.weight * weight
    counted = {step: weights[step] for step in sorted(weights) if weights[step]}
    return Taken(reuse.value, reuse.base, counted or weights)
