"""Calibrate ranges of values along the whole trajectory, for static quantization.

Inputs of layers are observed in every call of seeded requests: every step, both branches of
guidance. A value has a range for each step, and steps with similar ranges form groups.

Observers, by the range that they choose for the values of a step:

- minmax: of all values.
- percentile: without 0.005 % at either end.
- mse: of least squared error (torchao's `HistogramObserver`).
- entropy: of least Kullback-Leibler divergence between the values' distribution and that of the
  quantized values (Migacz, "8-bit inference with TensorRT", 2017), computed on the histogram.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from diffopt import optional
from diffopt.errors import DiffoptError
from diffopt.execution import trajectories
from diffopt.ir.program import Program
from diffopt.progress import Progress, silent

Observer = Literal["minmax", "percentile", "mse", "entropy"]

TAIL = 5e-5
"""The fraction of values that "percentile" cuts off at either end."""
SPREAD = 0.1
"""How much wider, as mean log2 over all values, ranges of groups may be than those of steps."""


@dataclass(frozen=True, eq=False)
class Ranges:
    """The ranges of a value by step: float64 [steps]; low > high where it was not observed."""

    low: Tensor
    high: Tensor

    def over(self, steps: Iterable[int]) -> tuple[float, float]:
        """Return the range over some steps."""
        index = sorted(steps)
        return float(self.low[index].min()), float(self.high[index].max())


def measure(
    program: Program,
    calls: Mapping[tuple[int, int], fx.Node],
    inputs: Sequence[Sequence[Tensor]],
    sites: Mapping[fx.Node, str],
    observer: Observer,
    progress: Progress = silent,
) -> dict[fx.Node, Ranges]:
    """Return the range of each value in each step.

    Args:
        program: What to run.
        calls: The calls to observe, by step and branch.
        inputs: The flat inputs of each request.
        sites: Nodes of the called bodies, with their names in messages.
        observer: How a range is chosen.
        progress: Called with what is being done and the fraction done.
    """
    if not inputs:
        raise DiffoptError("there is nothing to calibrate with: ask for one sample or more")
    steps = 1 + max(step for step, _ in calls)
    observers: dict[tuple[fx.Node, int], Any] = {}
    for index, tensors in enumerate(inputs):
        for done, visit in enumerate(trajectories.steps(program, calls, tensors, sites)):
            what = f"calibrating: request {index + 1} of {len(inputs)}, step {visit.step + 1}"
            progress(what, (index + done / len(calls)) / len(inputs))
            for node, value in visit.values.items():
                if not bool(value.isfinite().all()):
                    raise DiffoptError(
                        f"the input of {sites[node]} is not finite at step {visit.step} of"
                        f" calibration request {index}: calibrate with other prompts, or leave the"
                        f" layer out with skip=({sites[node]})"
                    )
                key = node, visit.step
                observers[key] = (observers.get(key) or _OBSERVERS[observer]()).update(value)
    low = {n: torch.full((steps,), torch.inf, dtype=torch.float64) for n in sites}
    high = {n: torch.full((steps,), -torch.inf, dtype=torch.float64) for n in sites}
    for (node, step), observed in observers.items():
        low[node][step], high[node][step] = observed.range()
    return {node: Ranges(low[node], high[node]) for node in sites}


# Observers


class _MinMax:
    def __init__(self) -> None:
        self._low, self._high = torch.inf, -torch.inf

    def update(self, value: Tensor) -> _MinMax:
        low, high = value.aminmax()
        self._low, self._high = min(self._low, float(low)), max(self._high, float(high))
        return self

    def range(self) -> tuple[float, float]:
        return self._low, self._high


class _Histogram:
    """torchao's observer, with a histogram whose range grows with the values."""

    def __init__(self) -> None:
        observers = optional.torchao("torchao.quantization.pt2e.observer")
        self._observer = observers.HistogramObserver(
            dtype=torch.int8, qscheme=torch.per_tensor_affine, quant_min=-128, quant_max=127
        )

    def update(self, value: Tensor) -> _Histogram:
        self._observer(value.float())
        return self

    def range(self) -> tuple[float, float]:
        low, high = float(self._observer.min_val), float(self._observer.max_val)
        if low == high:
            return low, high
        return self.select_range(self._observer.histogram.double(), low, high)

    def select_range(self, counts: Tensor, low: float, high: float) -> tuple[float, float]:
        bounds = self._observer._non_linear_param_search()
        return float(bounds[0]), float(bounds[1])


class _Percentile(_Histogram):
    def select_range(self, counts: Tensor, low: float, high: float) -> tuple[float, float]:
        below = counts.cumsum(0) / counts.sum()
        width = (high - low) / len(counts)
        first = int((below <= TAIL).sum())
        last = int((below < 1 - TAIL).sum())
        return low + width * first, low + width * (last + 1)


class _Entropy(_Histogram):
    def select_range(self, counts: Tensor, low: float, high: float) -> tuple[float, float]:
        edges = torch.linspace(low, high, len(counts) + 1, dtype=torch.float64)
        middles = (edges[1:] + edges[:-1]) / 2
        most = max(-low, high)
        cuts = [most * (30 + k) / 100 for k in range(71)]
        pairs = [(max(low, -cut), min(high, cut)) for cut in cuts]
        return min(pairs, key=lambda pair: _divergence(counts, middles, *pair))


def _divergence(counts: Tensor, middles: Tensor, low: float, high: float) -> float:
    """Return KL(p || q) of a histogram p clipped to a range and its quantization q to 256 levels.

    q spreads the count of a level evenly over those of its bins that are not empty.
    """
    inside = (middles >= low) & (middles <= high)
    if int(inside.sum()) < 2:
        return torch.inf
    inner = counts[inside]
    levels = ((middles[inside] - low) / (high - low) * 255).round().long()
    spread = torch.zeros(256, dtype=torch.float64).index_add_(0, levels, inner)
    filled = torch.zeros(256, dtype=torch.float64).index_add_(0, levels, (inner > 0).double())
    model = torch.where(inner > 0, spread[levels] / filled[levels].clamp_min(1), 0.0)
    clipped = inner.clone()  # values outside of the range are clipped to its ends
    clipped[0] += counts[middles < low].sum()
    clipped[-1] += counts[middles > high].sum()
    p, q = clipped / clipped.sum(), model / model.sum().clamp_min(1e-12)
    has = p > 0
    return float((p[has] * (p[has] / q[has].clamp_min(1e-12)).log()).sum())


_OBSERVERS: dict[Observer, Callable[[], Any]] = {
    "minmax": _MinMax,
    "percentile": _Percentile,
    "mse": _Histogram,
    "entropy": _Entropy,
}

# Groups of steps


def group_steps(ranges: Iterable[Ranges], steps: Sequence[int], count: int) -> list[list[int]]:
    """Return groups of consecutive steps with similar ranges, by dynamic programming.

    best[k][n] = min over m < n of best[k-1][m] + cost(m, n) is the least widening of n steps in k
    groups, where cost(m, n) is that of steps m to n - 1 in one group.

    Args:
        ranges: Of all values.
        steps: All steps, in order.
        count: How many groups; 0: as few as keep the mean widening within `SPREAD`.
    """
    widths = _widths(ranges, steps)
    limit = min(count or len(steps), len(steps))
    cost = _costs(widths)
    best: list[list[float]] = [[0.0] + [torch.inf] * len(steps)]  # best[k][n]: n steps, k groups
    origin: list[list[int]] = [[0] * (len(steps) + 1)]
    for k in range(1, limit + 1):
        row, back = [torch.inf] * (len(steps) + 1), [0] * (len(steps) + 1)
        for end in range(k, len(steps) + 1):
            costs = [best[k - 1][start] + cost[start][end] for start in range(end)]
            back[end] = min(range(end), key=costs.__getitem__)
            row[end] = costs[back[end]]
        best.append(row)
        origin.append(back)
        if not count and row[-1] <= SPREAD * len(steps):
            break
    groups: list[list[int]] = []
    end = len(steps)
    for k in range(len(best) - 1, 0, -1):
        groups.insert(0, list(steps[origin[k][end] : end]))
        end = origin[k][end]
    return groups


def _widths(ranges: Iterable[Ranges], steps: Sequence[int]) -> Tensor:
    """Return log2 of the ranges' widths, [values, steps], of values observed in every step."""
    rows = [torch.stack([r.low[list(steps)], r.high[list(steps)]]) for r in ranges]
    rows = [row for row in rows if bool(row.isfinite().all())]
    if not rows:
        return torch.zeros(1, len(steps), dtype=torch.float64)
    low, high = torch.stack(rows, 1)
    widths: Tensor = high.clamp_min(0) - low.clamp_max(0)
    return widths.clamp_min(2.0**-60).log2()


def _costs(widths: Tensor) -> list[list[float]]:
    """Return [start][end]: the widening, summed over steps [start, end), in one group."""
    count = widths.shape[1]
    costs = [[0.0] * (count + 1) for _ in range(count)]
    for start in range(count):
        most = widths[:, start].clone()
        total = torch.zeros_like(most)
        for end in range(start + 1, count + 1):
            most = torch.maximum(most, widths[:, end - 1])
            total = total + widths[:, end - 1]
            costs[start][end] = float((most * (end - start) - total).mean())
    return costs


def affine(low: float, high: float) -> tuple[float, int]:
    """Return the int8 scale and zero point of a range, which is widened to contain 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / 255, 2.0**-24)
    return scale, max(-128, min(127, round(-128 - low / scale)))
