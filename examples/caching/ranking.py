"""Says which configurations are the best, by their rows in the results."""

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
    at = row["time"]
    return statistics.median(at["reference"]) / statistics.median(at["seconds"])


def distance(row: Mapping[str, Any]) -> float:
    """Return the distance from the reference; infinite where it was not measured."""
    return float(row["quality"]["distance"][0]) if "quality" in row else math.inf


def front(rows: Mapping[str, Any]) -> set[str]:
    """Return what no other is better than in FLOPs and distance at once."""
    points = {c: (r["cost"]["denoiser"], distance(r)) for c, r in rows.items() if "quality" in r}
    return {
        c
        for c, own in points.items()
        if c != REFERENCE
        and not any(o != own and o[0] <= own[0] and o[1] <= own[1] for o in points.values())
    }


def best_of(rows: Mapping[str, Any], group: str, speedup: float) -> str | None:
    """Return the configuration of a group that is nearest to the reference at this speedup.

    It may cost as much as `auto` does, or 1 / speedup if that is more, and a little on top.
    """
    own = f"auto,speedup={speedup:g}"
    cost = max(1 / speedup, rows[own]["cost"]["denoiser"] if own in rows else 0)
    fitting = [
        c
        for c, r in rows.items()
        if kind(c) == group and "quality" in r and r["cost"]["denoiser"] <= cost * SLACK + 1e-6
    ]
    return min(fitting, key=lambda c: distance(rows[c]), default=None)


def duels(rows: Mapping[str, Any]) -> dict[float, tuple[str, str | None, str | None]]:
    """Return, by speedup, `auto` and the best of the fixed policies and of fewer steps."""
    return {
        s: (own, best_of(rows, "policy", s), best_of(rows, "fewer steps", s))
        for s in SPEEDUPS
        if "quality" in rows.get(own := f"auto,speedup={s:g}", {})
    }
