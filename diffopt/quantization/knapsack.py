"""Picks a format for each layer: the least cost at which the predicted error is within a budget.

That is a knapsack with several choices for each item. Errors are squared and add up; they are
counted in whole parts of the budget, rounded up, so that dynamic programming finds a choice that
keeps the budget, and none that costs less would keep it with `PARTS` minus one part for each item.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PARTS = 1 << 14
TRIES = 5
NEAR = 0.9
"""A measured error of this part of the budget is as good as all of it."""


def choose(errors: Tensor, costs: Tensor, budget: float) -> list[int]:
    """Return which choice each item takes; the first one of each has no error.

    Args:
        errors: Squared, [items, choices].
        costs: What to make little of in total, [items, choices].
        budget: What the errors may add up to at the most: not squared.
    """
    count, choices = errors.shape
    parts = torch.where(errors > 0, torch.inf, 0.0)
    if budget > 0:
        parts = (errors / budget**2 * PARTS).ceil()
    best = torch.zeros(PARTS + 1, dtype=torch.float64)  # by how many parts may be used
    taken = torch.zeros(count, PARTS + 1, dtype=torch.int8)
    for item in range(count):
        rows = torch.full((choices, PARTS + 1), torch.inf, dtype=torch.float64)
        for choice in range(choices):
            if (used := float(parts[item, choice])) <= PARTS:
                rows[choice, int(used) :] = best[: PARTS + 1 - int(used)] + costs[item, choice]
        best, found = rows.min(0)
        taken[item] = found.to(torch.int8)
    made, left = [0] * count, PARTS
    for item in reversed(range(count)):
        made[item] = int(taken[item, left])
        left -= int(parts[item, made[item]])
    return [_refined(errors[i], costs[i], c) for i, c in enumerate(made)]


def _refined(errors: Tensor, costs: Tensor, choice: int) -> int:
    """Return the choice of least error among those that cost no more."""
    return int(torch.where(costs <= costs[choice], errors, torch.inf).argmin())


@dataclass(frozen=True)
class Found:
    """What a search chose.

    Attributes:
        choice: For each item.
        predicted: Error by the sum.
        measured: Error of the choice when it was tried.
        tries: How many were.
    """

    choice: list[int]
    predicted: float
    measured: float
    tries: int


def search(
    errors: Tensor, costs: Tensor, budget: float, measure: Callable[[list[int]], float]
) -> Found | None:
    """Return a choice whose measured error is within the budget; None if none was found.

    Where a choice is over the budget, the next one is made for less of it, and for more where a
    choice is far below. After `TRIES` that is enough, unless none was within the budget.

    Args:
        errors: Squared, as predicted: [items, choices]; the first choice of each has none.
        costs: What to make little of.
        budget: Of the measured error.
        measure: Tries a choice.
    """
    rows = torch.arange(len(errors))
    low, high, target = 0.0, torch.inf, budget
    best: Found | None = None
    failures = 0
    for number in range(1, 2 * TRIES + 1):
        if best is not None and number > TRIES:
            break
        choice = choose(errors, costs, target)
        predicted = float(errors[rows, torch.tensor(choice)].sum().sqrt())
        if not any(choice) or (best is not None and choice == best.choice):
            break
        measured = measure(choice)
        ratio = budget / max(measured, 1e-12)
        if measured <= budget:
            best, low = Found(choice, predicted, measured, number), target
            if measured >= NEAR * budget:
                break
            target *= min(ratio, 4.0)
        else:
            high = predicted  # between that and the target the choice is the same
            # Ever less, where errors do not shrink as predicted.
            target = high * max(ratio * 0.95 * 0.85**failures, 0.1)
            failures += 1
        if not low < target < high:
            target = (low * high) ** 0.5
    return best
