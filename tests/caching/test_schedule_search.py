"""Schedules against all that there are, on loops small enough to try them all."""

import itertools
import random

import pytest

from diffopt.caching.schedule_search import ReuseMode, Schedule, cheapest, evaluate, pareto_front


def kinds(steps: int, count: int, seed: int, reach: int = 99) -> list[ReuseMode]:
    """Make kinds with random costs and errors; what is further than `reach` is not allowed."""
    source = random.Random(seed)
    modes = []
    for _ in range(count):
        errors = {
            (i, j, k): source.random()
            for i in range(steps)
            for j in range(i)
            for k in range(j)
            if i - j <= reach
        }
        modes.append(ReuseMode(source.uniform(0.0, 0.6), errors))
    return modes


def tried(modes: list[ReuseMode], steps: int) -> list[Schedule]:
    choices = itertools.product([None, *range(len(modes))], repeat=steps)
    schedules = (evaluate(modes, choice) for choice in choices if choice[:2] == (None, None))
    return [schedule for schedule in schedules if schedule is not None]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("steps", "count", "reach"), [(6, 2, 99), (7, 1, 2), (5, 3, 1)])
def test_no_schedule_is_cheaper(seed: int, steps: int, count: int, reach: int) -> None:
    modes = kinds(steps, count, seed, reach)
    every = tried(modes, steps)
    for price in (0.0, 0.1, 0.5, 2.0, 50.0):
        schedule = cheapest(modes, steps, price)
        least = min(s.cost * steps + price * s.error for s in every)
        assert schedule.cost * steps + price * schedule.error == pytest.approx(least)
        assert evaluate(modes, schedule.modes) == schedule


def test_the_dearest_error_computes_everything_and_the_cheapest_nothing() -> None:
    modes = kinds(8, 2, 0)
    assert cheapest(modes, 8, 1e9).computed == list(range(8))
    assert cheapest(modes, 8, 0.0).computed == [0, 1]


@pytest.mark.parametrize("steps", [1, 2])
def test_short_loops_compute_everything(steps: int) -> None:
    assert cheapest(kinds(steps, 1, 0), steps, 0.0).modes == (None,) * steps


def test_the_front_has_no_schedule_that_another_beats() -> None:
    front = pareto_front(kinds(10, 2, 3), 10)
    assert len(front) > 3
    for one, other in itertools.permutations(front, 2):
        assert not (one.cost <= other.cost and one.error < other.error)


def test_without_errors_there_is_one_schedule() -> None:
    assert len(pareto_front([ReuseMode(0.1, {})], 5)) == 1


def test_what_is_not_allowed_is_not_evaluated() -> None:
    modes = kinds(4, 1, 0, reach=1)
    assert evaluate(modes, (None, None, 0, 0)) is None
    assert evaluate(modes, (None, 0, None, None)) is None
