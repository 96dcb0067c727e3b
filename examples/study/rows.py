"""Reads the results of configurations, and compares two of them."""

import math
import statistics
from collections.abc import Mapping
from typing import Any

Rows = Mapping[str, Any]
"""Results by configuration."""


def distance(row: Mapping[str, Any]) -> tuple[float, float]:
    """Return the distance from the reference and its standard error."""
    mean, error = row["quality"]["distance"]
    return float(mean), float(error)


def has_quality(rows: Rows, *configs: str) -> bool:
    """Tell whether the images of all configurations were measured."""
    return all("quality" in rows.get(config, {}) for config in configs)


def median(rows: Rows, config: str, other: str | None = None) -> float:
    """Return the median time of a configuration, or of another one that was timed beside it."""
    return float(statistics.median(rows[config]["time"][other or "seconds"]))


def ahead(rows: Rows, having: str, lacking: str) -> tuple[float, float]:
    """Return the ratio of two configurations' distances, and their difference.

    The difference is the mean over images of the same seeds, in its standard errors; positive where
    the first is nearer to the reference.
    """
    one, two = (distance(rows[config])[0] for config in (having, lacking))
    ones, twos = (rows[config]["quality"]["distances"] for config in (having, lacking))
    gains = [b - a for a, b in zip(ones, twos, strict=True)]
    spread = statistics.stdev(gains) / math.sqrt(len(gains))
    return one / two if two else math.inf, statistics.mean(gains) / (spread or math.inf)


def verdict(met: bool) -> str:
    """Return the first words of a sentence about a goal."""
    return "Met" if met else "Not met"
