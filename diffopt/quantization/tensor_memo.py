"""What is made of weights, each thing once: bodies that share a weight share what replaces it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


class Shared:
    """Remembers what was made of tensors."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, Hashable], tuple[Tensor, object]] = {}

    def get(self, tensor: Tensor, key: Hashable, make: Callable[[], T]) -> T:
        """Return what `make` makes of a tensor, by a key that says what that is."""
        at = id(tensor), key
        if at not in self._known:
            self._known[at] = tensor, make()  # the tensor is kept, so that its identity stays its
        return self._known[at][1]  # type: ignore[return-value]
