"""Schedules against all that there are, on loops small enough to try them all."""

import itertools
import random

import pytest

from diffopt.caching.schedule_search import ReuseMode, Schedule, cheapest, evaluate, pareto_front


def kinds(steps: int, count: int, seed: int, reach: int = 99) -> list[ReuseMode]:
    """Make kinds with random costs and errors; what is further than `reach` is not allowed."""
    source = random.Random(seed)
    made = []
    for _ in range(count):
        errors = {
            (i, j, k): source.random()
            for i in range(steps)
            for j in range(i)
            for k in range(j)
            if i - j <= reach
        }
        made.append(ReuseMode(source.uniform(0.0, 0.6), errors))
    return made


def tried(own: list[ReuseMode], steps: int) -> list[Schedule]:
    choices = itertools.product([None, *range(len(own))], repeat=steps)
    found = (evaluate(own, choice) for choice in choices if choice[:2] == (None, None))
    return [schedule for schedule in found if schedule is not None]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("steps", "count", "reach"), [(6, 2, 99), (7, 1, 2), (5, 3, 1)])
def test_no_schedule_is_cheaper(seed: int, steps: int, count: int, reach: int) -> None:
    own = kinds(steps, count, seed, reach)
    every = tried(own, steps)
    for price in (0.0, 0.1, 0.5, 2.0, 50.0):
        found = cheapest(own, steps, price)
        least = min(s.cost * steps + price * s.error for s in every)
        assert found.cost * steps + price * found.error == pytest.approx(least)
        assert evaluate(own, found.modes) == found


def test_the_dearest_error_computes_everything_and_the_cheapest_nothing() -> None:
    own = kinds(8, 2, 0)
    assert cheapest(own, 8, 1e9).computed == list(range(8))
    assert cheapest(own, 8, 0.0).computed == [0, 1]


@pytest.mark.parametrize("steps", [1, 2])
def test_short_loops_compute_everything(steps: int) -> None:
    assert cheapest(kinds(steps, 1, 0), steps, 0.0).modes == (None,) * steps


def test_the_front_has_no_schedule_that_another_beats() -> None:
    found = pareto_front(kinds(10, 2, 3), 10)
    assert len(found) > 3
    for one, other in itertools.permutations(found, 2):
        assert not (one.cost <= other.cost and one.error < other.error)


def test_without_errors_there_is_one_schedule() -> None:
    assert len(pareto_front([ReuseMode(0.1, {})], 5)) == 1


def test_what_is_not_allowed_is_not_evaluated() -> None:
    own = kinds(4, 1, 0, reach=1)
    assert evaluate(own, (None, None, 0, 0)) is None
    assert evaluate(own, (None, 0, None, None)) is None
