"""Follows one axis of a value, such as that of its tokens, through operators that leave it alone.

An operator leaves an axis alone if each entry of its result along the axis is computed from the
same entry of what it reads: so it can be run on some of them, on others, or on fewer.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.ir import graph as g
from diffopt.ir.nodes import args, argument, is_call
from diffopt.ir.printing import target_name

aten = torch.ops.aten

ATTENTION = aten.scaled_dot_product_attention.default

_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_NORMS = (aten.layer_norm.default, aten.rms_norm.default)
_SAME = (
    *(aten.clone.default, aten.contiguous.default, aten._to_copy.default, aten.alias.default),
    *(aten.detach.default, aten.dropout.default, operator.getitem),
)
_MEANS = (aten.mean.dim, aten.sum.dim_IntList)
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)


class Unfit(Exception):
    """Why an axis cannot be followed."""


def carried(node: fx.Node, axes: Mapping[fx.Node, int]) -> int:
    """Return the axis of a node's result, given those of what it reads; raise `Unfit` if none.

    Results of several tensors have the same axis in each.
    """
    read = [n for n in node.all_input_nodes if n in axes]
    first = args(node)[0] if node.args else None
    axis = _mapped(node, axes[read[0]]) if len(read) == 1 and first is read[0] else None
    if axis is None and is_call(node, ATTENTION):
        axis = _of_attention(node, axes)
    if axis is None and is_call(node, aten.cat.default, aten.stack.default):
        axis = _of_cat(node, axes)
    if axis is None and _is_pointwise(node):
        axis = _of_pointwise(node, axes)
    if axis is None:
        raise Unfit(f"{target_name(node)} is between the projections")
    return axis


def resized(
    node: fx.Node, axes: Mapping[fx.Node, int], new: Mapping[fx.Node, fx.Node], size: int
) -> fx.Node:
    """Insert a copy of a node that reads `new` values, whose axis has another size."""
    given: Any = fx.map_arg(node.args, lambda n: new.get(n, n))
    more = fx.map_arg(node.kwargs, lambda n: new.get(n, n))
    if is_call(node, *_VIEWS):
        shape = list(given[1])
        if shape[axes[node]] != -1:
            shape[axes[node]] = size
        given = (given[0], shape)
    return g.call(node.graph, node.target, *given, like=node, **more)


def _mapped(node: fx.Node, axis: int) -> int | None:
    """Return the axis behind an operator of one value, which is its first argument."""
    before = args(node)[0].meta["val"]
    if is_call(node, *_SAME):
        return axis
    if not isinstance(before, Tensor):
        return None
    rank = before.dim()
    if is_call(node, aten.linear.default):
        return axis if axis < rank - 1 else None
    if is_call(node, *_NORMS):
        return axis if axis < rank - len(args(node)[1]) else None
    if is_call(node, *_VIEWS):
        return _of_view(before.shape, node.meta["val"].shape, axis)
    order = _order(node, rank)
    if order is not None:
        return order.index(axis)
    if is_call(node, aten.unsqueeze.default):
        return axis + int(argument(node, 1, "dim") % (rank + 1) <= axis)
    if is_call(node, *_SPLITS):
        return axis if argument(node, 2, "dim", 0) % rank != axis else None
    if is_call(node, aten.slice.Tensor):
        if argument(node, 1, "dim", 0) % rank == axis:
            raise Unfit("some of its tokens are treated in another way")
        return axis
    if is_call(node, aten.select.int, aten.unbind.int, aten.squeeze.dim):
        dim = argument(node, 1, "dim", 0) % rank
        gone = not is_call(node, aten.squeeze.dim) or before.shape[dim] == 1
        return axis - int(gone and dim < axis) if dim != axis else None
    if is_call(node, *_MEANS):
        dims = {d % rank for d in argument(node, 1, "dim", None) or range(rank)}
        kept = argument(node, 2, "keepdim", False)
        return axis - (0 if kept else sum(d < axis for d in dims)) if axis not in dims else None
    return None


def _order(node: fx.Node, rank: int) -> list[int] | None:
    """Return which axis of its argument each axis of a permutation is."""
    order = list(range(rank))
    if is_call(node, aten.permute.default):
        return [order[d] for d in args(node)[1]]
    if is_call(node, aten.transpose.int, aten.t.default):
        one, other = args(node)[1:3] if is_call(node, aten.transpose.int) else (0, rank - 1)
        order[one], order[other] = order[other], order[one]
        return order
    return None


def _of_view(before: Sequence[int], after: Sequence[int], axis: int) -> int | None:
    """Return the axis of a view that is the whole of one of its argument's."""
    outside = math.prod(before[:axis])
    for index, size in enumerate(after):
        if size == before[axis] and math.prod(after[:index]) == outside:
            return index
    return None


def _of_attention(node: fx.Node, axes: Mapping[fx.Node, int]) -> int | None:
    rank: int = node.meta["val"].dim()
    if all(axes.get(n) == rank - 2 for n in args(node)[:3]):
        return rank - 2  # the entries of the keys' axis are summed over, in any order
    return None


def _of_cat(node: fx.Node, axes: Mapping[fx.Node, int]) -> int | None:
    found = {axes.get(n) for n in args(node)[0]}
    (axis, *others) = found - {None}
    dim = argument(node, 1, "dim", 0) % node.meta["val"].dim()
    if others or axis is None:
        return None
    if is_call(node, aten.cat.default) and dim == axis:
        raise Unfit("tokens from several places are joined in it")
    if None in found:
        return None
    return axis + int(is_call(node, aten.stack.default) and dim <= axis)


def _is_pointwise(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and (
        torch.Tag.pointwise in node.target.tags
    )


def _of_pointwise(node: fx.Node, axes: Mapping[fx.Node, int]) -> int | None:
    made = node.meta["val"]
    behind = {n: made.dim() - n.meta["val"].dim() for n in node.all_input_nodes}
    axis, *others = {axes[n] + int(behind[n]) for n in behind if n in axes}
    if others:
        return None
    for other in behind.keys() - axes.keys():
        own = axis - behind[other]
        if own >= 0 and other.meta["val"].shape[own] != 1:
            raise Unfit(f"{target_name(node)} gives each token something of its own (a position)")
    return axis


def origins(node: fx.Node, axis: int) -> tuple[int, ...]:
    """Return the sizes of the axes that one was made of, far back; its own if it always was one."""
    size = node.meta["val"].shape[axis]
    stack, seen = [(node, axis)], set[tuple[fx.Node, int]]()
    while stack:
        at = stack.pop()
        if at in seen or at[0].op != "call_function":
            continue
        seen.add(at)
        node, axis = at
        if is_call(node, *_VIEWS):
            merged = _merged(args(node)[0].meta["val"].shape, node.meta["val"].shape, axis)
            if len(merged) > 1:
                return merged
        stack += _back(node, axis, size)
    return (size,)


def _back(node: fx.Node, axis: int, size: int) -> list[tuple[fx.Node, int]]:
    """Return where an axis of a node's result may come from: axes of what it reads."""
    first = args(node)[0] if node.args else None
    if not isinstance(first, fx.Node):
        return []
    if is_call(node, ATTENTION, aten.group_norm.default):
        found = [(first, axis)]
    elif _is_pointwise(node):
        rank = node.meta["val"].dim()
        found = [(n, axis - rank + n.meta["val"].dim()) for n in node.all_input_nodes]
    else:
        ranks = range(len(_shape(first)))
        found = [(first, own) for own in ranks if _goes(node, own, axis)]
    return [(n, own) for n, own in found if own >= 0 and _shape(n)[own] == size]


def _goes(node: fx.Node, own: int, axis: int) -> bool:
    """Tell whether an axis of what a node reads becomes one of its result."""
    try:
        return _mapped(node, own) == axis
    except Unfit:
        return False


def _shape(node: fx.Node) -> Sequence[int]:
    """Return the shape of a value, or of the first of several."""
    value = node.meta["val"]
    return (value if isinstance(value, Tensor) else value[0]).shape


def _merged(before: Sequence[int], after: Sequence[int], axis: int) -> tuple[int, ...]:
    """Return the sizes of the argument's axes that one axis of a view is made of."""
    outside, size = math.prod(after[:axis]), after[axis]
    for start in range(len(before)):
        for end in range(start + 1, len(before) + 1):
            inside = tuple(before[start:end])
            if math.prod(before[:start]) == outside and math.prod(inside) == size:
                return tuple(n for n in inside if n > 1) or (1,)
    return (size,)
