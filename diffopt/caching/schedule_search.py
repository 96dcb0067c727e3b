"""Choose the steps that compute and the steps that reuse: a shortest path over the steps.

A step reuses values of the last two steps that computed everything, with weights fitted to that
distance. So its cost and its error depend on itself and on these two, and the schedule that
minimises cost + price · error is a shortest path whose vertices are pairs of successive computed
steps. The price is a Lagrange multiplier: one schedule for each price makes a Pareto front.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Pair = tuple[int, int]
"""The last computed step but one, and the last."""


@dataclass(frozen=True)
class ReuseMode:
    """A set of values that a step may reuse.

    Attributes:
        cost: Of such a step, relative to one that computes everything.
        errors: Its share of the result's error, by (step, last computed step, the one before);
            a missing key forbids the mode in that step.
    """

    cost: float
    errors: Mapping[tuple[int, int, int], float]


@dataclass(frozen=True)
class Schedule:
    """The reuse mode of each step.

    Attributes:
        modes: By step: the index of its mode, or None where it computes everything.
        cost: The mean over the steps.
        error: The sum over the steps.
    """

    modes: tuple[int | None, ...]
    cost: float
    error: float

    @property
    def computed(self) -> list[int]:
        """The steps that compute everything."""
        return [step for step, mode in enumerate(self.modes) if mode is None]


def evaluate(modes: Sequence[ReuseMode], choice: Sequence[int | None]) -> Schedule | None:
    """Return the schedule with these modes; None where a step's mode is forbidden."""
    cost = error = 0.0
    last: list[int] = []
    for step, mode in enumerate(choice):
        if mode is None:
            last.append(step)
            cost += 1.0
            continue
        key = (step, last[-1], last[-2]) if len(last) > 1 else None
        if key is None or key not in modes[mode].errors:
            return None
        cost += modes[mode].cost
        error += modes[mode].errors[key]
    return Schedule(tuple(choice), cost / len(choice), error)


def cheapest(modes: Sequence[ReuseMode], steps: int, price: float) -> Schedule:
    """Return the schedule of least cost + price · error; the first two steps compute.

    best[i, j] = least cost of a path whose last two computed steps are i and j, by dynamic
    programming over j: best[j, k] = min over i of best[i, j] + reuse(j+1 … k-1) + 1.
    """
    if steps < 3:
        return Schedule((None,) * steps, 1.0, 0.0)
    best: dict[Pair, tuple[float, Pair | None, tuple[int | None, ...]]] = {(0, 1): (2.0, None, ())}
    final: tuple[float, Pair | None, tuple[int | None, ...]] = (math.inf, None, ())
    for last in range(1, steps):
        for before in range(last):
            if (before, last) not in best:
                continue
            total, reused = best[before, last][0], list[int | None]()
            for step in range(last + 1, steps + 1):
                if step == steps:
                    if total < final[0]:
                        final = (total, (before, last), tuple(reused))
                    break
                if total + 1.0 < best.get((last, step), (math.inf,))[0]:
                    best[last, step] = (total + 1.0, (before, last), tuple(reused))
                reuse = _best_mode(modes, (step, last, before), price)
                if reuse is None:
                    break
                total += reuse[0]
                reused.append(reuse[1])
    _, pair, tail = final
    choice: list[int | None] = []
    while pair is not None:
        choice = [None, *tail, *choice]
        _, pair, tail = best[pair]
    result = evaluate(modes, [None, *choice])  # the path has the second step of each pair
    assert result is not None
    return result


def _best_mode(
    modes: Sequence[ReuseMode], key: tuple[int, int, int], price: float
) -> tuple[float, int] | None:
    costs = [
        (mode.cost + price * mode.errors[key], index)
        for index, mode in enumerate(modes)
        if key in mode.errors
    ]
    return min(costs, default=None)


def pareto_front(modes: Sequence[ReuseMode], steps: int, count: int = 40) -> list[Schedule]:
    """Return the distinct schedules for a range of prices, from the dearest to the cheapest."""
    errors = sorted(e for mode in modes for e in mode.errors.values() if e > 0)
    if not errors:
        return [cheapest(modes, steps, 1.0)]
    low, high = 1e-2 / errors[-1], 1e2 / errors[0]
    schedules: dict[tuple[int | None, ...], Schedule] = {}
    for index in range(count):
        schedule = cheapest(modes, steps, high * (low / high) ** (index / max(1, count - 1)))
        schedules.setdefault(schedule.modes, schedule)
    return list(schedules.values())
