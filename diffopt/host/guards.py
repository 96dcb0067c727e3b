"""What capture relied on in the caller's values, checked for new ones."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.errors import DiffoptError
from diffopt.host.arguments import short


class Mismatch(DiffoptError):
    """Say that new arguments do not fit what the program was traced with."""

    from_text = False
    """Whether it is a text's doing: another number of tokens, say."""


def mismatch(message: str, *, from_text: bool) -> Mismatch:
    """Return the error."""
    error = Mismatch(message)
    error.from_text = from_text
    return error


@dataclasses.dataclass
class Guards:
    """What Python read of the caller's tensors at capture; new ones must give the same."""

    body: fx.GraphModule
    """From all of the program's inputs to the values that were read."""
    expected: list[Any]
    where: list[str]
    from_text: list[bool]
    """Whether a value depends on texts alone."""

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Raise a `DiffoptError` where a value differs from the one at capture."""
        with torch.no_grad():
            values = fx.Interpreter(self.body).run(*tensors)  # no code is made of a file's graph
        rows = zip(values, self.expected, self.where, self.from_text, strict=True)
        for value, expected, where, from_text in rows:
            actual = value.tolist() if isinstance(value, Tensor) else value
            if actual != expected:
                raise mismatch(
                    f"{where.rstrip(':')}: this is {short(actual)} for these arguments and was "
                    f"{short(expected)} at capture; trace the program again with arguments like "
                    "these",
                    from_text=from_text,
                )
