"""Takes the texts of pipelines apart."""

from itertools import pairwise

from diffopt import spec


def passes(text: str) -> list[str]:
    """Return the passes of a pipeline, each as it is written there."""
    starts = [*(call.span[0] for call in spec.parse(text)), len(text)]
    return [text[start:end].rstrip(", ") for start, end in pairwise(starts)]


def name_of(text: str) -> str:
    """Return the name of a pass as it is written in a pipeline."""
    return text.partition("(")[0]
