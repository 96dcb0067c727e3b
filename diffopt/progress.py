"""How long work says how far it is."""

from collections.abc import Callable

Progress = Callable[[str, float | None], None]
"""Called with what is being done and the fraction done, None where it is not known."""


def silent(what: str, fraction: float | None = None) -> None:
    """Say nothing."""


def within(progress: Progress, index: int, count: int, prefix: str = "") -> Progress:
    """Return the callback for part `index` of `count` equal parts; its texts follow `prefix`."""

    def part(what: str, fraction: float | None = None) -> None:
        progress(prefix + what, None if fraction is None else (index + fraction) / count)

    return part
