"""Ranges of values by step, how they are chosen, and which steps share them."""

import itertools

import pytest
import torch
from torch import Tensor

from diffopt.quantization import ranges
from diffopt.quantization.ranges import Ranges, affine, group_steps


def watched(observer: ranges.Observer, *values: Tensor) -> tuple[float, float]:
    watch = ranges._OBSERVERS[observer]()
    for value in values:
        watch.update(value)
    bounds: tuple[float, float] = watch.range()
    return bounds


def heavy_tailed() -> Tensor:
    source = torch.Generator().manual_seed(0)
    values = torch.randn(1 << 16, generator=source)
    values[:3] = torch.tensor([60.0, -50.0, 40.0])
    return values


def error(values: Tensor, low: float, high: float) -> float:
    scale, zero = affine(low, high)
    read = ((values / scale).round() + zero).clamp(-128, 127)
    return float(((read - zero) * scale - values).square().mean())


def test_minmax_takes_all_that_was_seen() -> None:
    assert watched("minmax", torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])) == (-2.0, 3.0)


def test_percentile_leaves_out_the_ends() -> None:
    low, high = watched("percentile", torch.linspace(-1, 1, 1 << 20))
    assert low == pytest.approx(-1 + 2 * ranges.TAIL, abs=2e-3)
    assert high == pytest.approx(1 - 2 * ranges.TAIL, abs=2e-3)
    low, high = watched("percentile", heavy_tailed())
    assert -5 < low < -3
    assert 3 < high < 5


def test_mse_has_less_error_than_all_values_and_than_the_percentile() -> None:
    # What lies outside is a hundredth of the values, and not far: to clip it costs, to keep it too.
    values = heavy_tailed()
    values[:700] *= 3
    values[:3] = 0
    bounds = {o: watched(o, values) for o in ("minmax", "mse")}
    errors = {o: error(values, *pair) for o, pair in bounds.items()}
    assert errors["mse"] < errors["minmax"]


def test_entropy_leaves_outliers_out_and_keeps_the_narrow_side() -> None:
    values = torch.nn.functional.silu(heavy_tailed())
    low, high = watched("entropy", values)
    assert low == pytest.approx(-0.278, abs=0.02)
    assert 2 < high < 40


def test_a_constant_has_a_range() -> None:
    for observer in ("minmax", "percentile", "mse", "entropy"):
        low, high = watched(observer, torch.full((10,), 2.0))
        assert low == pytest.approx(2.0, abs=1e-3)
        assert high == pytest.approx(2.0, abs=1e-3)
        assert affine(0.0, 0.0)[0] > 0


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.5, 2.0), (-4.0, -1.0), (-1e-9, 0.0)])
def test_zero_is_a_whole_number_of_steps(low: float, high: float) -> None:
    scale, zero = affine(low, high)
    assert -128 <= zero <= 127
    assert (-128 - zero) * scale <= min(low, 0.0) + scale / 2 + 1e-9
    assert (127 - zero) * scale >= max(high, 0.0) - scale / 2 - 1e-9


def growing(steps: int) -> list[Ranges]:
    each = torch.arange(1, steps + 1, dtype=torch.float64)
    return [Ranges(-each, each**2), Ranges(-torch.ones(steps).double(), each)]


def test_groups_are_the_best_of_all_divisions() -> None:
    layers = growing(7)
    costs = ranges._costs(ranges._widths(layers, range(7)))
    for count in (2, 3, 4):
        groups = group_steps(layers, list(range(7)), count)
        assert list(itertools.chain(*groups)) == list(range(7))
        cost = sum(costs[g[0]][g[-1] + 1] for g in groups)
        cuts = itertools.combinations(range(1, 7), count - 1)
        divisions = ([0, *inner, 7] for inner in cuts)
        best = min(sum(costs[a][b] for a, b in itertools.pairwise(d)) for d in divisions)
        assert cost == pytest.approx(best)


def test_left_to_itself_it_makes_groups_where_ranges_differ() -> None:
    same = [Ranges(-torch.ones(6).double(), torch.ones(6).double())]
    assert group_steps(same, list(range(6)), 0) == [[0, 1, 2, 3, 4, 5]]
    jump = torch.tensor([1.0, 1, 1, 8, 8, 8]).double()
    assert group_steps([Ranges(-jump, jump)], list(range(6)), 0) == [[0, 1, 2], [3, 4, 5]]


def test_steps_of_a_body_that_is_called_in_some() -> None:
    low = torch.tensor([-1.0, torch.inf, -2.0, torch.inf]).double()
    activations = Ranges(low, -low)
    assert group_steps([activations], [0, 2], 2) == [[0], [2]]
    assert activations.over([0, 2]) == (-2.0, 2.0)
