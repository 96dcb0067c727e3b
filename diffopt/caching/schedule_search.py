"""Which steps compute and which take values of earlier ones: a shortest path over the steps.

A step that takes values takes them from the last two steps that computed everything, with weights
fitted to that distance. So what it costs and how far it goes astray depends on itself and on these
two, and the cheapest schedule for a fixed price of error is a shortest path, whose vertices are
pairs of computed steps that follow one another. One schedule for each price makes a Pareto front,
as with Lagrange multipliers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Pair = tuple[int, int]
"""The last computed step but one, and the last."""


@dataclass(frozen=True)
class Kind:
    """A way of a step to take values.

    Attributes:
        cost: Of such a step, where one that computes everything costs 1.
        errors: What such a step adds to the error of the result, by the step and the two computed
            steps before it; where it is missing, the step must not be of this kind.
    """

    cost: float
    errors: Mapping[tuple[int, int, int], float]


@dataclass(frozen=True)
class Schedule:
    """What each step does.

    Attributes:
        kinds: By step: which kind it is of, or None where it computes everything.
        cost: The mean over the steps.
        error: The sum over the steps.
    """

    kinds: tuple[int | None, ...]
    cost: float
    error: float

    @property
    def computed(self) -> list[int]:
        """The steps that compute everything."""
        return [step for step, kind in enumerate(self.kinds) if kind is None]


def evaluate(kinds: Sequence[Kind], choice: Sequence[int | None]) -> Schedule | None:
    """Return a choice of kinds with its cost and error; None where a step must not be of its."""
    cost = error = 0.0
    last: list[int] = []
    for step, kind in enumerate(choice):
        if kind is None:
            last.append(step)
            cost += 1.0
            continue
        key = (step, last[-1], last[-2]) if len(last) > 1 else None
        if key is None or key not in kinds[kind].errors:
            return None
        cost += kinds[kind].cost
        error += kinds[kind].errors[key]
    return Schedule(tuple(choice), cost / len(choice), error)


def cheapest(kinds: Sequence[Kind], steps: int, price: float) -> Schedule:
    """Return the schedule with the least cost + price · error; the first two steps compute."""
    if steps < 3:
        return Schedule((None,) * steps, 1.0, 0.0)
    best: dict[Pair, tuple[float, Pair | None, tuple[int | None, ...]]] = {(0, 1): (2.0, None, ())}
    final: tuple[float, Pair | None, tuple[int | None, ...]] = (math.inf, None, ())
    for last in range(1, steps):
        for before in range(last):
            if (before, last) not in best:
                continue
            total, between = best[before, last][0], list[int | None]()
            for step in range(last + 1, steps + 1):
                if step == steps:
                    if total < final[0]:
                        final = (total, (before, last), tuple(between))
                    break
                if total + 1.0 < best.get((last, step), (math.inf,))[0]:
                    best[last, step] = (total + 1.0, (before, last), tuple(between))
                found = _best_kind(kinds, (step, last, before), price)
                if found is None:
                    break
                total += found[0]
                between.append(found[1])
    _, pair, tail = final
    choice: list[int | None] = []
    while pair is not None:
        choice = [None, *tail, *choice]
        _, pair, tail = best[pair]
    result = evaluate(kinds, [None, *choice])  # the path has the second step of each pair
    assert result is not None
    return result


def _best_kind(
    kinds: Sequence[Kind], key: tuple[int, int, int], price: float
) -> tuple[float, int] | None:
    costs = [
        (kind.cost + price * kind.errors[key], index)
        for index, kind in enumerate(kinds)
        if key in kind.errors
    ]
    return min(costs, default=None)


def front(kinds: Sequence[Kind], steps: int, count: int = 40) -> list[Schedule]:
    """Return schedules for a range of prices, from the dearest to the cheapest, without doubles."""
    errors = sorted(e for kind in kinds for e in kind.errors.values() if e > 0)
    if not errors:
        return [cheapest(kinds, steps, 1.0)]
    low, high = 1e-2 / errors[-1], 1e2 / errors[0]
    found: dict[tuple[int | None, ...], Schedule] = {}
    for index in range(count):
        schedule = cheapest(kinds, steps, high * (low / high) ** (index / max(1, count - 1)))
        found.setdefault(schedule.kinds, schedule)
    return list(found.values())
