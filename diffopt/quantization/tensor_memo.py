"""Memoize what is computed from weights: bodies that share a weight share its replacement."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


class TensorMemo:
    """Values computed from tensors, by the tensor's identity and a key."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, Hashable], tuple[Tensor, object]] = {}

    def get(self, tensor: Tensor, key: Hashable, make: Callable[[], T]) -> T:
        """Return the value of a tensor and key; `make` computes it the first time."""
        entry = id(tensor), key
        if entry not in self._known:
            # The reference to the tensor keeps its id from being used again.
            self._known[entry] = tensor, make()
        return self._known[entry][1]  # type: ignore[return-value]
