"""About how long runs of a program take on this machine, told before they begin."""

from __future__ import annotations

import time
from functools import cache

import torch

from diffopt.ir.program import Program

# Of the time of a run: what products alone would take at the rate of a large one. The rest goes
# into smaller and narrower ones, and into what lies between them.
_PRODUCTS = 0.6
_SIZE = 1024


def seconds_a_run(program: Program) -> float:
    """Return about how many seconds an interpreted run of a program takes here, in float32."""
    return program.flops() / (_rate() * _PRODUCTS)


@cache
def _rate() -> float:
    """Return the floating point operations a second of a large matrix product, the best of three.

    It takes some 50 ms of a core, once in a process.
    """
    matrix = torch.rand(_SIZE, _SIZE)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - started)
    return 2 * _SIZE**3 / best


def duration(seconds: float) -> str:
    """Return a time as people say it.

    >>> duration(0.4), duration(42), duration(540), duration(9000)
    ('less than a second', 'about 42 seconds', 'about 9 minutes', 'about 2.5 hours')
    """
    if seconds < 1:
        return "less than a second"
    if seconds < 90:
        return f"about {seconds:.0f} second{'' if round(seconds) == 1 else 's'}"
    if seconds < 5400:
        return f"about {seconds / 60:.0f} minutes"
    return f"about {seconds / 3600:.2g} hours"
