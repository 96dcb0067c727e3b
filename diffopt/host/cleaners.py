"""The ways in which pipelines normalize a caller's text before they tokenize it."""

import html
import itertools
import re
from collections.abc import Callable

from diffopt import optional

Cleaner = Callable[[str], str]


def fix_text(text: str) -> str:
    """Return a text as ftfy mends it."""
    ftfy = optional.require("ftfy", "the cleaning of the pipeline's texts", "diffusers")
    return str(ftfy.fix_text(text))


_OPERATIONS: dict[str, Cleaner] = {
    "strip": str.strip,
    "rstrip": str.rstrip,
    "lower": str.lower,
    "unescape": lambda text: html.unescape(html.unescape(text)),
    "spaces": lambda text: re.sub(r"\s+", " ", text),
    "fix": fix_text,
}


def _chain(name: str) -> Cleaner:
    operations = [_OPERATIONS[part] for part in name.split("-") if part]

    def clean(text: str) -> str:
        for operation in operations:
            text = operation(text)
        return text

    return clean


_NAMES = ["", "strip", "rstrip", "lower", "lower-rstrip", "lower-strip", "spaces", "spaces-strip"]
_NAMES += [
    "-".join(filter(None, parts))
    for parts in itertools.product(
        ("", "fix"), ("unescape-strip",), ("", "spaces-strip"), ("", "lower")
    )
]

CLEANERS: dict[str, Cleaner] = {name: _chain(name) for name in _NAMES}
"""By name: the operations in their order, joined by hyphens."""


def probe_text(index: int) -> str:
    """Return a text that each of `CLEANERS` changes differently; no two indices give the same.

    It begins and ends with tabs: a space could be one that the pipeline puts beside the text. It is
    short: of one that a tokenizer cuts off the pipeline warns, which is another path in Python.
    """
    return f"\tQ{index}  K\n&amp;lt”\t"
