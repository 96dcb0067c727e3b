"""Reads results: what was measured of configurations, and how two of them compare."""

import math
import statistics
from collections.abc import Mapping
from typing import Any

Rows = Mapping[str, Any]
"""What was measured, by configuration."""


def distance(row: Mapping[str, Any]) -> tuple[float, float]:
    """Return the distance from the reference and its standard error."""
    mean, error = row["quality"]["distance"]
    return float(mean), float(error)


def has_quality(rows: Rows, *configs: str) -> bool:
    """Tell whether the images of all configurations were measured."""
    return all("quality" in rows.get(config, {}) for config in configs)


def median(rows: Rows, config: str, other: str | None = None) -> float:
    """Return a configuration's time, or that of another one which took turns with it."""
    return float(statistics.median(rows[config]["time"][other or "seconds"]))


def ahead(rows: Rows, having: str, lacking: str) -> tuple[float, float]:
    """Return the ratio of two configurations' distances, and how far apart they are.

    That is the mean difference of the images of the same seeds in its standard errors, positive
    where the first is nearer to the reference.
    """
    one, two = (distance(rows[config])[0] for config in (having, lacking))
    own, other = (rows[config]["quality"]["distances"] for config in (having, lacking))
    gains = [b - a for a, b in zip(own, other, strict=True)]
    spread = statistics.stdev(gains) / math.sqrt(len(gains))
    return one / two if two else math.inf, statistics.mean(gains) / (spread or math.inf)


def verdict(met: bool) -> str:
    """Return how a sentence about a goal begins."""
    return "Met" if met else "Not met"
