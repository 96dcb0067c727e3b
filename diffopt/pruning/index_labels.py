"""Labels of the indices of tensors' axes, unions of them, and constraints: some must be kept.

A label stands for one index of one axis of a stored tensor. A value's factors are tensors of labels
of the value's shape: an element is there as long as its label in every factor is. Axes along which
a factor does not vary have stride 0, so that views of values are views of factors, and cost
nothing.

An example, of three weights W [4,6], V [4,4] and U [3,4], and x [2,6]:

    h = linear(x, W)             W has labels 0..3 of its rows, 4..9 of its columns
    y = h + linear(relu(h), V)   V has 10..13 and 14..17
    z = linear(y, U)             U has 18..20 and 21..24

- x is an argument, which has no factors: all of it is kept. So the columns of W, with which it is
  multiplied and summed, are constrained: 4..9 are kept.
- h [2,4] has one factor, [[0,1,2,3], [0,1,2,3]] with strides (0, 1); relu(h) has the same.
- The product of relu(h) and V sums over h's last axis and V's columns, index by index: 14 is united
  with 0, 15 with 1, 16 with 2, 17 with 3. Its result has the factor of V's rows, 10..13.
- A sum unites what it adds: 10 with 0, and so on. y has the factor of h.
- The columns of U are united with y: 21 with 0, and so on. z has the factor of U's rows.
- z is a result of the body, whose shape is kept: 18..20 are constrained.

The equivalence classes without a constraint are the units that can be removed, each as a whole.
They are {0, 10, 14, 21}, {1, 11, 15, 22}, {2, 12, 16, 23} and {3, 13, 17, 24}: the second is row 1
of W, row and column 1 of V, and column 1 of U. Removing it leaves W [3,6], V [3,3] and U [3,3].
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

Factors = list[Tensor]


class Labels:
    """The labels of a program, their unions, and the constraints on them."""

    def __init__(self) -> None:
        self.count = 0
        self.unions: list[tuple[Tensor, Tensor]] = []
        self.constraints: list[tuple[Tensor, str]] = []

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

    def union(self, one: Tensor, other: Tensor) -> None:
        """Unite the labels of two factors of one shape, element by element."""
        shape = [max(sizes) for sizes in zip(one.shape, other.shape, strict=True)]
        one, other = one.expand(shape), other.expand(shape)
        for axis in range(one.dim()):
            if one.stride(axis) == 0 and other.stride(axis) == 0:
                one, other = one.narrow(axis, 0, 1), other.narrow(axis, 0, 1)
        self.unions.append((one.reshape(-1), other.reshape(-1)))

    def constrain(self, factor: Tensor, reason: str) -> None:
        """Keep all labels of a factor, for a reason."""
        self.constraints.append((narrow(factor, constant(factor)).reshape(-1), reason))

    def collapse(self, factor: Tensor, axes: Collection[int]) -> Tensor:
        """Unite the labels along some axes, so that the factor does not vary along them."""
        if not set(axes) & set(varying(factor)):
            return factor
        flat = narrow(factor, axes).expand(factor.shape)
        self.union(factor, flat)
        return flat

    def classes(self) -> Tensor:
        """Return, for each label, its equivalence class: the least label that it is united with.

        These are the connected components of a graph: large models have millions of labels, for
        which networkx takes 50 times as long.
        """
        classes = torch.arange(self.count)
        if not self.unions:
            return classes
        one, other = (torch.cat(side) for side in zip(*self.unions, strict=True))
        while True:
            a, b = classes[one], classes[other]
            least = torch.minimum(a, b)
            after = classes.clone()
            after.scatter_reduce_(0, a, least, "amin")
            after.scatter_reduce_(0, b, least, "amin")
            while not torch.equal(after, flatter := after[after]):  # a class of a class
                after = flatter
            if torch.equal(after, classes):
                return classes
            classes = after


def varying(factor: Tensor) -> tuple[int, ...]:
    """Return the axes along which a factor may vary."""
    return tuple(a for a in range(factor.dim()) if factor.size(a) > 1 and factor.stride(a) != 0)


def constant(factor: Tensor) -> list[int]:
    """Return the axes along which a factor is known not to vary."""
    return [a for a in range(factor.dim()) if factor.stride(a) == 0]


def narrow(factor: Tensor, axes: Collection[int]) -> Tensor:
    """Return the first index along some axes, which then have size 1."""
    for axis in axes:
        factor = factor.narrow(axis, 0, min(1, factor.size(axis)))
    return factor


def compressed(factor: Tensor) -> Tensor:
    """Return the same factor with stride 0 along all axes where it does not vary."""
    for axis in varying(factor):
        first = factor.narrow(axis, 0, 1).expand_as(factor)
        if torch.equal(first, factor):
            factor = first
    return factor


def reshaped(factor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a factor in another shape; axes along which it is constant cost no memory."""
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
    """Split two shapes of as many elements into pairs of as few axes as hold equally many."""
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


def varying_by_class(factor: Tensor, classes: Tensor) -> tuple[int, ...]:
    """Return the axes along which the equivalence classes of a factor's labels vary."""
    of_each = classes[narrow(factor, constant(factor))]
    return tuple(
        a
        for a in varying(factor)
        if not torch.equal(of_each.narrow(a, 0, 1).expand_as(of_each), of_each)
    )


def along(factor: Tensor, axis: int) -> Tensor:
    """Return the labels along one axis, at the first index of all others."""
    return narrow(factor, [a for a in range(factor.dim()) if a != axis]).reshape(-1)
