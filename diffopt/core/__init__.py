"""Passes, and pipelines that check each with numbers."""

from diffopt.core.pass_base import Context, Needs, Pass
from diffopt.core.pass_manager import Instrument, Pipeline, RunOptions, find_pass, pass_names
from diffopt.core.record import Record, Size
from diffopt.ir.allowed_operators import allow_operators
from diffopt.progress import Progress
from diffopt.spec import option

__all__ = [
    "Context",
    "Instrument",
    "Needs",
    "Pass",
    "Pipeline",
    "Progress",
    "Record",
    "RunOptions",
    "Size",
    "allow_operators",
    "find_pass",
    "option",
    "pass_names",
]
