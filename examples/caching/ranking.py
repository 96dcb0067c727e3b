"""Ranks configurations by their results."""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from examples.caching.configurations import kind
from examples.study.study import REFERENCE

SPEEDUPS = (1.5, 2, 3)  # at which `auto` is compared with the others
SLACK = 1.03  # a rival may cost this much more: 17 of 50 steps are 2 % over a third


def measured(row: Mapping[str, Any]) -> float:
    """Return how many times faster a configuration is than the reference beside it."""
    times = row["time"]
    return statistics.median(times["reference"]) / statistics.median(times["seconds"])


def distance(row: Mapping[str, Any]) -> float:
    """Return the distance from the reference; infinite where it was not measured."""
    return float(row["quality"]["distance"][0]) if "quality" in row else math.inf


def pareto_front(rows: Mapping[str, Any]) -> set[str]:
    """Return the configurations of which no other has both fewer FLOPs and a smaller distance."""
    points = {c: (r["cost"]["denoiser"], distance(r)) for c, r in rows.items() if "quality" in r}
    return {
        c
        for c, p in points.items()
        if c != REFERENCE
        and not any(o != p and o[0] <= p[0] and o[1] <= p[1] for o in points.values())
    }


def best_of(rows: Mapping[str, Any], group: str, speedup: float) -> str | None:
    """Return the configuration of a group that is nearest to the reference at this speedup.

    It may cost as much as `auto` does, or 1 / speedup if that is more, and a little on top.
    """
    auto = f"auto,speedup={speedup:g}"
    cost = max(1 / speedup, rows[auto]["cost"]["denoiser"] if auto in rows else 0)
    fitting = [
        c
        for c, r in rows.items()
        if kind(c) == group and "quality" in r and r["cost"]["denoiser"] <= cost * SLACK + 1e-6
    ]
    return min(fitting, key=lambda c: distance(rows[c]), default=None)


def duels(rows: Mapping[str, Any]) -> dict[float, tuple[str, str | None, str | None]]:
    """Return, by speedup, `auto` and the best of the fixed policies and of fewer steps."""
    return {
        s: (auto, best_of(rows, "policy", s), best_of(rows, "fewer steps", s))
        for s in SPEEDUPS
        if "quality" in rows.get(auto := f"auto,speedup={s:g}", {})
    }
