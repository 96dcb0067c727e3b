"""The types of the fixture `diffopt`, which runs the command line."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Outcome:
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]
