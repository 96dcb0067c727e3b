"""How long work says how far it is."""

from collections.abc import Callable

Progress = Callable[[str, float | None], None]
"""Called with what is being done and the fraction done, None where it is not known."""


def silent(what: str, fraction: float | None = None) -> None:
    """Say nothing."""
