"""Numbers for the indices of tensors' axes, ties between them, and reasons why some must stay.

A label stands for one index of one axis of a stored tensor. A value's factors are tensors of labels
of the value's shape: an element is there as long as its label in every factor is. Axes along which
a factor does not change have stride 0, so that views of values are views of factors, and cost
nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

Factors = list[Tensor]


class Labels:
    """Hands out labels, and remembers which go together and which stay."""

    def __init__(self) -> None:
        self.count = 0
        self.ties: list[tuple[Tensor, Tensor]] = []
        self.pins: list[tuple[Tensor, str]] = []

    def fresh(self, size: int) -> Tensor:
        """Return labels that nothing else has."""
        self.count += size
        return torch.arange(self.count - size, self.count)

    def axes_of(self, shape: Sequence[int]) -> dict[int, Tensor]:
        """Return a factor of fresh labels for each axis of a tensor, but for those of size 1."""
        factors = {}
        for axis, size in enumerate(shape):
            if size > 1:
                form = [size if a == axis else 1 for a in range(len(shape))]
                factors[axis] = self.fresh(size).reshape(form).expand(tuple(shape))
        return factors

    def tie(self, one: Tensor, other: Tensor) -> None:
        """Let the labels of two factors of one shape go together, element by element."""
        shape = [max(sizes) for sizes in zip(one.shape, other.shape, strict=True)]
        one, other = one.expand(shape), other.expand(shape)
        for axis in range(one.dim()):
            if one.stride(axis) == 0 and other.stride(axis) == 0:
                one, other = one.narrow(axis, 0, 1), other.narrow(axis, 0, 1)
        self.ties.append((one.reshape(-1), other.reshape(-1)))

    def pin(self, factor: Tensor, reason: str) -> None:
        """Let labels stay."""
        self.pins.append((narrow(factor, constant(factor)).reshape(-1), reason))

    def collapse(self, factor: Tensor, axes: Collection[int]) -> Tensor:
        """Tie the labels along some axes, so that the factor does not change along them."""
        if not set(axes) & set(varying(factor)):
            return factor
        flat = narrow(factor, axes).expand(factor.shape)
        self.tie(factor, flat)
        return flat

    def roots(self) -> Tensor:
        """Return, of each label, the least one that it goes together with.

        These are the connected components of a graph: large models have millions of labels, for
        which networkx takes 50 times as long.
        """
        root = torch.arange(self.count)
        if not self.ties:
            return root
        one, other = (torch.cat(side) for side in zip(*self.ties, strict=True))
        while True:
            a, b = root[one], root[other]
            least = torch.minimum(a, b)
            after = root.clone()
            after.scatter_reduce_(0, a, least, "amin")
            after.scatter_reduce_(0, b, least, "amin")
            while not torch.equal(after, flatter := after[after]):
                after = flatter
            if torch.equal(after, root):
                return root
            root = after


def varying(factor: Tensor) -> tuple[int, ...]:
    """Return the axes along which a factor may change."""
    return tuple(a for a in range(factor.dim()) if factor.size(a) > 1 and factor.stride(a) != 0)


def constant(factor: Tensor) -> list[int]:
    """Return the axes along which a factor is known not to change."""
    return [a for a in range(factor.dim()) if factor.stride(a) == 0]


def narrow(factor: Tensor, axes: Collection[int]) -> Tensor:
    """Return the first index along some axes; they stay, with size 1."""
    for axis in axes:
        factor = factor.narrow(axis, 0, min(1, factor.size(axis)))
    return factor


def compressed(factor: Tensor) -> Tensor:
    """Return the same factor with stride 0 along all axes where it does not change."""
    for axis in varying(factor):
        first = factor.narrow(axis, 0, 1).expand_as(factor)
        if torch.equal(first, factor):
            factor = first
    return factor


def reshaped(factor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a factor as `reshape` makes it, without filling axes along which it is constant."""
    small: list[int] = []
    kept: list[int] = []
    for olds, news in _pairs(factor.shape, shape):
        if any(factor.size(a) > 1 and factor.stride(a) != 0 for a in olds):
            small += [shape[a] for a in news]
            continue
        factor = narrow(factor, olds)
        small += [1 for _ in news]
        kept += news
    return factor.reshape(small).expand(tuple(shape))


def _pairs(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Cut two shapes of as many elements into the fewest axes each that hold as many."""
    pairs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        olds, news = [], []
        a = b = 1
        while True:
            if (a <= b or j >= len(new)) and i < len(old):
                a *= old[i]
                olds.append(i)
                i += 1
            elif j < len(new):
                b *= new[j]
                news.append(j)
                j += 1
            if a == b or (i >= len(old) and j >= len(new)):
                break
        pairs.append((olds, news))
    return pairs


def changes(factor: Tensor, roots: Tensor) -> tuple[int, ...]:
    """Return the axes along which a factor changes, once it is known which labels are one."""
    axes = varying(factor)
    found = roots[narrow(factor, constant(factor))]
    return tuple(a for a in axes if not torch.equal(found.narrow(a, 0, 1).expand_as(found), found))


def along(factor: Tensor, axis: int) -> Tensor:
    """Return the labels along one axis, at the first index of all others."""
    return narrow(factor, [a for a in range(factor.dim()) if a != axis]).reshape(-1)
