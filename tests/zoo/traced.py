"""Programs of the zoo's pipelines, of which each network is exported once for all tests."""

from functools import cache
from typing import Any

from diffopt.capture.trace import Session
from diffopt.ir.program import Program
from tests.zoo.schedulers import CASES


def traced(name: str, **changes: Any) -> Program:
    """Return the program of a case's call with the seed 0, some of its arguments changed."""
    return _program(name, **changes).clone()


@cache
def _program(name: str, **changes: Any) -> Program:
    return session(name).program(CASES[name].inputs(0) | changes)


@cache
def session(name: str) -> Session:
    """Return the captures of a case's pipeline."""
    return Session(CASES[name].build(), check=False)
