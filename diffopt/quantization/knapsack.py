"""Choose a format for each layer: the least cost with a predicted error within a budget.

That is a multiple-choice knapsack. Errors are squared and add up; they are counted in integer parts
of the budget, rounded up, so that dynamic programming

    best[i][b] = min over choices c of item i of best[i-1][b - error(i, c)] + cost(i, c)

finds a choice within the budget, and none that costs less would be within it with `PARTS` minus one
part for each item.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PARTS = 1 << 14
TRIES = 5
NEAR = 0.9
"""A measured error from this fraction of the budget on is close enough to it."""


def solve(errors: Tensor, costs: Tensor, budget: float) -> list[int]:
    """Return the index of each item's choice; the first one of each has no error.

    Args:
        errors: Squared, [items, choices].
        costs: Of which to minimise the sum, [items, choices].
        budget: The largest root of the summed errors.
    """
    count, choices = errors.shape
    parts = torch.where(errors > 0, torch.inf, 0.0)
    if budget > 0:
        parts = (errors / budget**2 * PARTS).ceil()
    best = torch.zeros(PARTS + 1, dtype=torch.float64)  # by how many parts may be used
    backpointers = torch.zeros(count, PARTS + 1, dtype=torch.int8)
    for item in range(count):
        totals = torch.full((choices, PARTS + 1), torch.inf, dtype=torch.float64)
        for c in range(choices):
            if (used := float(parts[item, c])) <= PARTS:
                totals[c, int(used) :] = best[: PARTS + 1 - int(used)] + costs[item, c]
        best, chosen = totals.min(0)
        backpointers[item] = chosen.to(torch.int8)
    choice, left = [0] * count, PARTS
    for item in reversed(range(count)):
        choice[item] = int(backpointers[item, left])
        left -= int(parts[item, choice[item]])
    return [_refined(errors[i], costs[i], c) for i, c in enumerate(choice)]


def _refined(errors: Tensor, costs: Tensor, choice: int) -> int:
    """Return the choice of least error among those that cost no more."""
    return int(torch.where(costs <= costs[choice], errors, torch.inf).argmin())


@dataclass(frozen=True)
class Allocation:
    """The choice of a search.

    Attributes:
        choice: The index of each item's choice.
        predicted: The root of the summed errors.
        measured: The measured error.
        tries: How many choices were measured.
    """

    choice: list[int]
    predicted: float
    measured: float
    tries: int


def search_within(
    errors: Tensor, costs: Tensor, budget: float, measure: Callable[[list[int]], float]
) -> Allocation | None:
    """Return a choice whose measured error is within the budget; None if there is none.

    After a choice over the budget the next one is solved for less of it, after one far below for
    more. The search ends after `TRIES`, or as many again while no choice is within the budget.

    Args:
        errors: Squared predicted errors, [items, choices]; the first choice of each has none.
        costs: Of which to minimise the sum, [items, choices].
        budget: The largest measured error.
        measure: Returns the error of a choice.
    """
    rows = torch.arange(len(errors))
    low, high, target = 0.0, torch.inf, budget
    best: Allocation | None = None
    failures = 0
    for number in range(1, 2 * TRIES + 1):
        if best is not None and number > TRIES:
            break
        choice = solve(errors, costs, target)
        predicted = float(errors[rows, torch.tensor(choice)].sum().sqrt())
        if not any(choice) or (best is not None and choice == best.choice):
            break
        measured = measure(choice)
        ratio = budget / max(measured, 1e-12)
        if measured <= budget:
            best, low = Allocation(choice, predicted, measured, number), target
            if measured >= NEAR * budget:
                break
            target *= min(ratio, 4.0)
        else:
            high = predicted  # between that and the target the choice is the same
            # Each failure shrinks it more, as errors may not shrink as predicted.
            target = high * max(ratio * 0.95 * 0.85**failures, 0.1)
            failures += 1
        if not low < target < high:
            target = (low * high) ** 0.5
    return best
