"""Texts by which a capture is tried: words that the pipeline's own code knows.

What Python reads of a text is seen where a tracked text is asked; what it does in C, in functions
without source, by way of a file, is not. So the pipeline runs once more for each of some texts,
without its models: where the program takes one of them and the pipeline goes another way, capture
has missed something. A branch mostly depends on words that stand in the code.
"""

import types
from typing import Any

from diffopt.capture.reachable_functions import LIBRARIES, codes_of, reachable_functions

MIXED = "  Two  CATS &amp;amp; a “dog”\n3 "
"""What cleaners change, and other texts than the probe's have."""

_WORDS = 8  # one by one
_CHUNKS = 4  # of words together
_LONGEST = 60  # characters of a text: pipelines warn of long ones


def texts(pipeline: Any) -> list[str]:
    """Return texts of words in a pipeline's functions; those of libraries are known to have none.

    They are short, as what a tokenizer cuts off is another path in Python.
    """
    words = list(dict.fromkeys(word for f in reachable_functions(pipeline) for word in _words(f)))
    chunks = [""]
    for word in words:
        if len(chunks[-1]) + len(word) >= _LONGEST:
            chunks.append("")
        chunks[-1] = f"{chunks[-1]} {word}".strip()
    return [MIXED, *(["3", *chunks[:_CHUNKS], *words[:_WORDS]] if words else [])]


def _words(function: types.FunctionType) -> list[str]:
    if str(function.__module__).partition(".")[0] in LIBRARIES:
        return []
    constants = [constant for code in codes_of(function) for constant in _constants(code)]
    return [c for c in constants if 0 < len(c) < _LONGEST // 2 and c.isprintable()]


def _constants(code: types.CodeType) -> list[str]:
    stack: list[Any] = list(code.co_consts)
    found = []
    while stack:
        value = stack.pop(0)
        if isinstance(value, (tuple, frozenset)):
            stack += value
        elif isinstance(value, str) and value != code.co_consts[0]:  # no docstring
            found.append(value.strip())
    return found
