"""The thread in which a server loads its engines and runs them, one at a time.

OpenMP gives each thread that computes in parallel a team of its own. Where teams together have more
threads than there are cores, GCC's runtime puts them to sleep at every barrier: a run of fashion-sd
takes 1350 ms in a second thread, and 285 in the only one that computes.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def call(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in that thread, and return its result."""
    return _thread().submit(function, *args, **kwargs).result()


@cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "engines")
