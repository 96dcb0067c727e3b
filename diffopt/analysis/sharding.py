"""Shards of values, such as half of a batch: what an operator needs of its operands for one.

Every rule is exact: the shard that an operator computes from shards of its operands is the shard of
what it computes from the whole ones, up to the order of sums. That holds along indices that are
kept (see `axis_rules`); where axes are merged or split, along the outermost index of an axis.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.analysis.axis_rules import Index, Relation, is_reshape, relate, shape
from diffopt.analysis.reachability import packet
from diffopt.ir.nodes import args, argument, is_call

aten = torch.ops.aten


@dataclass(frozen=True)
class Shard:
    """One of `count` equal parts of a value along some axis."""

    index: int
    count: int

    def bounds(self, size: int) -> tuple[int, int]:
        """Return where it begins and ends in an axis of this size."""
        length = size // self.count
        return self.index * length, (self.index + 1) * length

    def divides(self, node: fx.Node, axis: int) -> bool:
        """Tell whether a value has such shards."""
        sizes = shape(node)
        return axis < len(sizes) and sizes[axis] > 0 and sizes[axis] % self.count == 0

    def sizes(self, whole: Sequence[int], axis: int) -> list[int]:
        """Return the shape of the shard."""
        return [n // self.count if i == axis else n for i, n in enumerate(whole)]

    def cut(self, tensor: Tensor, axis: int) -> Tensor:
        """Return the shard of a tensor."""
        begin, end = self.bounds(tensor.shape[axis])
        return tensor.narrow(axis, begin, end - begin)

    def cut_by(self, node: fx.Node) -> int | None:
        """Return the axis along which a node cuts just this shard out of its argument."""
        if not is_call(node, aten.slice.Tensor) or argument(node, 4, "step", 1) != 1:
            return None
        source = args(node)[0]
        axis, *bounds = _slice(node)
        is_shard = self.divides(source, axis) and tuple(bounds) == self.bounds(shape(source)[axis])
        return axis if is_shard else None


@dataclass(frozen=True)
class ShardedCall:
    """How an operator computes a shard of its result.

    Attributes:
        axes: The operands of which a shard is enough, and the axis along which it is.
        target: The operator.
        args: Its arguments.
    """

    axes: dict[fx.Node, int]
    target: Any
    args: tuple[Any, ...]


def shard_call(node: fx.Node, axis: int, shard: Shard) -> ShardedCall | None:
    """Return how a shard is computed from shards of operands; None: only from the whole."""
    relation = relate(node)
    if relation is None or not shard.divides(node, axis):
        return None
    if is_call(node, operator.getitem) and shard_call(args(node)[0], axis, shard) is None:
        return None
    (index, *_) = relation.result[axis]
    if index.kind == "moved":
        return _moved(node, axis, shard)
    axes = _shards(relation, index, shard) if index.kind == "kept" else None
    return None if axes is None else ShardedCall(axes, *_resized(node, axis, shard))


def _shards(relation: Relation, index: Index, shard: Shard) -> dict[fx.Node, int] | None:
    """Return along which axes of operands the shard is; None if some operand has none."""
    axes: dict[fx.Node, int | None] = {}
    for operand, indices in relation.operands:
        long = (axis for axis, size in enumerate(shape(operand)) if size > 1)
        at = next((axis for axis in long if index in indices[axis]), None)
        if at is not None and (indices[at][0] != index or not shard.divides(operand, at)):
            return None
        if axes.setdefault(operand, at) != at:
            return None  # it is read twice, in different ways
    return {operand: at for operand, at in axes.items() if at is not None}


def _resized(node: fx.Node, axis: int, shard: Shard) -> tuple[Any, tuple[Any, ...]]:
    """Return an operator and its arguments, with the sizes that they name as the shard's are."""
    source, kind = args(node)[0], packet(node)
    sizes = shard.sizes(shape(node), axis)
    if is_reshape(node):
        # Not a view: a shard that is computed alone can have another layout than in the whole.
        return aten.reshape.default, (source, sizes)
    if kind is aten.expand:
        return node.target, (source, sizes)
    if kind is aten.slice and _slice(node)[0] == axis:
        return node.target, (source, axis, 0, sizes[axis])
    return node.target, args(node)


def _moved(node: fx.Node, axis: int, shard: Shard) -> ShardedCall | None:
    """Return what reads the entries of the shard alone, of whole operands."""
    operands, kind = args(node)[0], packet(node)
    arguments: tuple[Any, ...]
    if kind is aten.slice and argument(node, 4, "step", 1) == 1:
        _, start, end = _slice(node)
        first, last = shard.bounds(end - start)
        arguments = operands, axis, start + first, start + last
    elif kind is aten.repeat and args(node)[1][axis] % shard.count == 0:
        arguments = operands, shard.sizes(args(node)[1], axis)
    elif kind in (aten.cat, aten.stack):
        sizes = [1 if kind is aten.stack else shape(n)[axis] for n in operands]
        ends = [*itertools.accumulate(sizes, initial=0)]
        first, last = shard.bounds(ends[-1])
        if first not in ends or last not in ends:
            return None
        arguments = operands[ends.index(first) : ends.index(last)], axis
    else:
        return None
    return ShardedCall({}, node.target, arguments)


def _slice(node: fx.Node) -> tuple[int, int, int]:
    """Return the dimension of a slice, its start and its end."""
    sizes = shape(args(node)[0])
    dim = argument(node, 1, "dim", 0) % len(sizes)
    start, end, _ = slice(argument(node, 2, "start"), argument(node, 3, "end")).indices(sizes[dim])
    return dim, start, end
