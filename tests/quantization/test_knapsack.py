"""The choice of one format for each layer: against all choices there are, and within a budget."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from diffopt.quantization import knapsack
from diffopt.quantization.knapsack import PARTS, search_within, solve


def tables(seed: int, count: int, choices: int) -> tuple[Tensor, Tensor]:
    """Return errors and costs, the first choice of each item without error and the dearest."""
    source = torch.Generator().manual_seed(seed)
    size = count, choices
    errors = torch.rand(size, generator=source, dtype=torch.float64).pow(6)
    costs = torch.rand(size, generator=source, dtype=torch.float64)
    errors[:, 0], costs[:, 0] = 0, 1
    return errors, costs


def total(table: Tensor, choice: list[int]) -> float:
    return float(table[torch.arange(len(table)), torch.tensor(choice)].sum())


def least(errors: Tensor, costs: Tensor, budget: float) -> float:
    """Return the least cost within a budget, of all choices that there are."""
    every = itertools.product(range(errors.shape[1]), repeat=len(errors))
    fine = [total(costs, list(c)) for c in every if total(errors, list(c)) <= budget**2]
    return min(fine)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [0.01, 0.3, 1.0])
def test_no_choice_within_the_budget_costs_less(seed: int, budget: float) -> None:
    errors, costs = tables(seed, 5, 4)
    choice = solve(errors, costs, budget)
    assert total(errors, choice) <= budget**2
    sure = budget * (1 - 5 / PARTS) ** 0.5  # errors are rounded up
    assert total(costs, choice) <= least(errors, costs, sure) + 1e-12


def test_without_a_budget_only_what_has_no_error_is_chosen() -> None:
    errors = torch.tensor([[0.0, 1e-9, 0.0], [0.0, 1.0, 2.0]], dtype=torch.float64)
    costs = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0]], dtype=torch.float64)
    assert solve(errors, costs, 0.0) == [2, 0]


def test_of_equal_costs_the_least_error_is_chosen() -> None:
    errors = torch.tensor([[0.0, 0.5, 0.25]], dtype=torch.float64)
    costs = torch.tensor([[2.0, 1.0, 1.0]], dtype=torch.float64)
    assert solve(errors, costs, 1.0) == [2]


@pytest.mark.parametrize("factor", [0.02, 0.3, 1.0, 4.0, 30.0])
def test_the_measured_error_is_within_the_budget_and_near_it(factor: float) -> None:
    errors, costs = tables(0, 40, 4)
    budget = 0.5 * math.sqrt(float(errors.sum(0).max()))
    tried: list[float] = []

    def measure(choice: list[int]) -> float:  # as if predictions were wrong by a factor
        tried.append(factor * math.sqrt(total(errors, choice)))
        return tried[-1]

    allocation = search_within(errors, costs, budget, measure)
    assert allocation is not None
    assert len(tried) <= knapsack.TRIES
    assert allocation.measured <= budget
    assert allocation.measured == pytest.approx(factor * allocation.predicted)
    everything = factor * math.sqrt(total(errors, solve(errors, costs, 1e6)))
    assert allocation.measured >= min(0.8 * budget, everything)


def test_errors_that_shrink_less_than_predicted() -> None:
    errors, costs = tables(0, 40, 4)

    def measure(choice: list[int]) -> float:
        return 0.08 * math.sqrt(total(errors, choice)) ** 0.1 if any(choice) else 0.0

    allocation = search_within(errors, costs, 0.05, measure)
    assert allocation is not None
    assert allocation.measured <= 0.05


def test_no_choice_is_tried_twice() -> None:
    errors, costs = tables(0, 8, 3)
    tried: list[list[int]] = []
    everything = math.sqrt(float(errors.amax(1).sum()))

    def measure(choice: list[int]) -> float:
        tried.append(choice)
        return 100 * math.sqrt(total(errors, choice))

    allocation = search_within(errors, costs, 10 * everything, measure)
    assert allocation is not None
    assert 0 < allocation.measured <= 10 * everything
    assert all(tried.count(choice) == 1 for choice in tried)


def test_nothing_fits() -> None:
    errors, costs = tables(0, 4, 3)
    assert search_within(errors, costs, 0.1, lambda choice: 1.0) is None
    assert (
        search_within(errors + torch.tensor([0.0, 1.0, 1.0]), costs, 0.1, lambda choice: 0.0)
        is None
    )
