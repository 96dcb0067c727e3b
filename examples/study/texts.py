"""Splits the texts of pipelines."""

from itertools import pairwise

from diffopt import spec


def passes(text: str) -> list[str]:
    """Return the passes of a pipeline, each as text."""
    starts = [*(call.span[0] for call in spec.parse(text)), len(text)]
    return [text[start:end].rstrip(", ") for start, end in pairwise(starts)]


def name_of(text: str) -> str:
    """Return the name of a pass from its text."""
    return text.partition("(")[0]
