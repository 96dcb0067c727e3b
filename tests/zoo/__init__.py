"""Tiny pipelines with random weights, made from configurations alone."""

from tests.zoo.case import Case, call, generator, modules, prompt
from tests.zoo.schedulers import (
    CASES,
    LEFT_OUT,
    SCHEDULERS,
    all_schedulers,
    missing_package,
    scheduler_case,
)
from tests.zoo.traced import session, traced

__all__ = [
    "CASES",
    "LEFT_OUT",
    "SCHEDULERS",
    "Case",
    "all_schedulers",
    "call",
    "generator",
    "missing_package",
    "modules",
    "prompt",
    "scheduler_case",
    "session",
    "traced",
]
