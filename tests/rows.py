"""Made-up rows of benchmarks' results."""

from typing import Any


def quality(distance: float, kid: float) -> dict[str, Any]:
    """Return what was measured of a configuration's images, the reference having a KID of 0.1."""
    return {
        "distance": [distance, 0.003],
        "distances": [distance * part for part in (0.8, 1, 1.2)],
        "pixels": [distance / 2, 0.001],
        "kid held-out": [kid, 0.001],
        "kid above reference": [kid - 0.1, 0.002],
        "kid other seeds": [-0.002, 0.003],
    }
