"""Parts of values, such as half of a batch: what an operator needs of its arguments for one.

A part is the k-th of n equal parts of a value along one axis. Every rule is exact: the part that an
operator computes from parts of its arguments is the part of what it computes from the whole ones,
up to the order of sums. A reshape keeps a part where its axis is the outermost factor of the
dimension that it is merged into, or split off from.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.ir.nodes import args, argument, is_call
from diffopt.ir.op_sets import FOLDED_BATCH, RESHAPES

aten = torch.ops.aten

Axes = dict[fx.Node, int]
"""The arguments of which a part is enough, and the axis that it is taken along."""

SPLITS = (
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
)
_RESHAPES = (
    *RESHAPES,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
)
_SAME_SHAPE = (
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.dropout.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
)
_ALONG = (
    aten.softmax.int,
    aten._softmax.default,
    aten.log_softmax.int,
    aten._log_softmax.default,
    aten.cumsum.default,
    aten.glu.default,
)
"""Their second argument, by default the last, is the dimension that they mix."""
_REDUCTIONS = (
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.amax.default,
    aten.amin.default,
    aten.var.correction,
    aten.std.correction,
    aten.linalg_vector_norm.default,
)
_PRODUCTS = (aten.matmul.default, aten.mm.default, aten.bmm.default)
_BIASED_PRODUCTS = (aten.addmm.default, aten.baddbmm.default)


@dataclass(frozen=True)
class Part:
    """One of `count` equal parts of a value along some axis."""

    index: int
    count: int

    def bounds(self, size: int) -> tuple[int, int]:
        """Return where it begins and ends in an axis of this size."""
        length = size // self.count
        return self.index * length, (self.index + 1) * length

    def divides(self, node: fx.Node, axis: int) -> bool:
        """Tell whether a value has such parts."""
        shape = _shape(node)
        return axis < len(shape) and shape[axis] > 0 and shape[axis] % self.count == 0

    def shape(self, shape: Sequence[int], axis: int) -> list[int]:
        """Return the shape of the part."""
        return [n // self.count if i == axis else n for i, n in enumerate(shape)]

    def cut(self, tensor: Tensor, axis: int) -> Tensor:
        """Return the part of a tensor."""
        begin, end = self.bounds(tensor.shape[axis])
        return tensor.narrow(axis, begin, end - begin)

    def cut_by(self, node: fx.Node) -> int | None:
        """Return the axis along which a node cuts just this part out of its argument."""
        if not is_call(node, aten.slice.Tensor) or argument(node, 4, "step", 1) != 1:
            return None
        source = args(node)[0]
        axis = argument(node, 1, "dim", 0) % len(_shape(source))
        size = _shape(source)[axis]
        bounds = slice(argument(node, 2, "start"), argument(node, 3, "end")).indices(size)[:2]
        return axis if self.divides(source, axis) and bounds == self.bounds(size) else None


@dataclass(frozen=True)
class Way:
    """How an operator computes a part of its result: the axes of arguments, and its new ones."""

    axes: Axes
    target: Any
    args: tuple[Any, ...]


# Rules


def way(node: fx.Node, axis: int, part: Part) -> Way | None:
    """Return how a part of a value is computed from parts of others; None: only from the whole."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        source = args(node)[0]
        inner = _split(source, axis, part) if is_call(source, *SPLITS) else None
        return None if inner is None else Way({source: axis}, node.target, args(node))
    if node.target in SPLITS:
        return _split(node, axis, part)
    if not isinstance(node.meta["val"], Tensor) or not part.divides(node, axis):
        return None
    for targets, rule in _RULES:
        if node.target in targets:
            return rule(node, axis, part)
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _as_it_is(node, _aligned(node, node.all_input_nodes, axis))
    return None


def _as_it_is(node: fx.Node, axes: Axes | None) -> Way | None:
    return None if axes is None else Way(axes, node.target, args(node))


def _aligned(node: fx.Node, sources: Sequence[fx.Node], axis: int) -> Axes:
    """Return the axes of arguments that fit each other by their last dimensions."""
    rank, axes = len(_shape(node)), Axes()
    for source in sources:
        own = axis - rank + len(_shape(source))
        if own >= 0 and _shape(source)[own] == _shape(node)[axis]:
            axes[source] = own
    return axes


def _split(node: fx.Node, axis: int, part: Part) -> Way | None:
    source = args(node)[0]
    rank = len(_shape(source))
    dim = argument(node, 1 if node.target is aten.unbind.int else 2, "dim", 0) % rank
    own = axis + (node.target is aten.unbind.int and axis >= dim)
    if own == dim or not part.divides(source, own):
        return None
    return _as_it_is(node, {source: own})


def _first(node: fx.Node, axis: int, part: Part) -> Way | None:
    """A batch is the first dimension of the first argument; the others are weights."""
    source = args(node)[0]
    rank = FOLDED_BATCH.get(node.target)
    if axis or (rank is not None and len(_shape(source)) != rank):
        return None
    return _as_it_is(node, {source: 0})


def _same(node: fx.Node, axis: int, part: Part) -> Way | None:
    return _as_it_is(node, {args(node)[0]: axis})


def _along(node: fx.Node, axis: int, part: Part) -> Way | None:
    dim = argument(node, 1, "dim", -1) % len(_shape(node))
    return None if axis == dim else _same(node, axis, part)


def _rows(node: fx.Node, axis: int, part: Part) -> Way | None:
    """Works on the last dimension, or on those of a norm's shape."""
    is_norm = node.target is not aten.linear.default
    own = len(args(node)[1]) if is_norm else 1
    return None if axis >= len(_shape(node)) - own else _same(node, axis, part)


def _lookup(node: fx.Node, axis: int, part: Part) -> Way | None:
    index = args(node)[1]
    return _as_it_is(node, {index: axis}) if axis < len(_shape(index)) else None


def _reshaped(node: fx.Node, axis: int, part: Part) -> Way | None:
    source, shape = args(node)[0], _shape(node)
    before, inner = math.prod(shape[:axis]), _shape(source)
    fits = (i for i in range(len(inner)) if math.prod(inner[:i]) == before)
    own = next((i for i in fits if part.divides(source, i)), None)
    if own is None:
        return None
    # Not a view: a part that is computed alone can be laid out in another way than in the whole.
    return Way({source: own}, aten.reshape.default, (source, part.shape(shape, axis)))


def _expanded(node: fx.Node, axis: int, part: Part) -> Way | None:
    source = args(node)[0]
    sizes = part.shape(_shape(node), axis)
    return Way(_aligned(node, [source], axis), node.target, (source, sizes))


def _repeated(node: fx.Node, axis: int, part: Part) -> Way | None:
    source, repeats = args(node)
    own = axis - len(repeats) + len(_shape(source))
    if repeats[axis] == 1 and own >= 0:
        return _as_it_is(node, {source: own})
    if repeats[axis] % part.count:
        return None
    return Way({}, node.target, (source, part.shape(repeats, axis)))


def _permuted(node: fx.Node, axis: int, part: Part) -> Way | None:
    source, rank = args(node)[0], len(_shape(node))
    order = list(range(rank))
    if node.target is aten.permute.default:
        order = [dim % rank for dim in args(node)[1]]
    else:
        a, b = args(node)[1:] if node.target is aten.transpose.int else (0, rank - 1)
        order[a], order[b] = order[b], order[a]
    return _as_it_is(node, {source: order[axis]})


def _sliced(node: fx.Node, axis: int, part: Part) -> Way | None:
    source = args(node)[0]
    dim = argument(node, 1, "dim", 0) % len(_shape(source))
    if axis != dim:
        return _same(node, axis, part)
    if argument(node, 4, "step", 1) != 1:
        return None
    size = _shape(source)[dim]
    start, end, _ = slice(argument(node, 2, "start"), argument(node, 3, "end")).indices(size)
    if (start, end) == (0, size):
        return Way({source: axis}, node.target, (source, dim, 0, size // part.count))
    first, last = part.bounds(end - start)
    return Way({}, node.target, (source, dim, start + first, start + last))


def _selected(node: fx.Node, axis: int, part: Part) -> Way | None:
    source, dim, _ = args(node)
    dim %= len(_shape(source))
    return _as_it_is(node, {source: axis + (axis >= dim)})


def _joined(node: fx.Node, axis: int, part: Part) -> Way | None:
    sources, dim = args(node)[0], argument(node, 1, "dim", 0) % len(_shape(node))
    is_stack = node.target is aten.stack.default
    if not is_stack and any(len(_shape(n)) != len(_shape(node)) for n in sources):
        return None
    if axis != dim:
        return _as_it_is(node, dict.fromkeys(sources, axis - (is_stack and axis > dim)))
    sizes = [1 if is_stack else _shape(n)[dim] for n in sources]
    ends = [0, *itertools.accumulate(sizes)]
    first, last = part.bounds(ends[-1])
    if first not in ends or last not in ends:
        return None
    return Way({}, node.target, (sources[ends.index(first) : ends.index(last)], dim))


def _product(node: fx.Node, axis: int, part: Part) -> Way | None:
    biased = node.target in _BIASED_PRODUCTS
    bias, (a, b) = args(node)[: int(biased)], args(node)[int(biased) : int(biased) + 2]
    rank, ranks = len(_shape(node)), (len(_shape(a)), len(_shape(b)))
    if min(ranks) < 2:
        return None
    if axis == rank - 2:
        axes = {a: ranks[0] - 2}
    elif axis == rank - 1:
        axes = {b: ranks[1] - 1}
    else:
        axes = _aligned(node, [a, b], axis)
    if a is b and axis >= rank - 2:
        return None
    return _as_it_is(node, _aligned(node, bias, axis) | axes) if {*bias}.isdisjoint(axes) else None


def _einsum(node: fx.Node, axis: int, part: Part) -> Way | None:
    equation, sources = args(node)[:2]
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    if not arrow or "." in equation or len(set(sources)) < len(sources):
        return None
    places = {
        n: word.find(result[axis]) for n, word in zip(sources, inputs.split(","), strict=True)
    }
    return _as_it_is(node, {n: place for n, place in places.items() if place >= 0})


def _attention(node: fx.Node, axis: int, part: Part) -> Way | None:
    heads, mask = args(node)[:3], argument(node, 3, "attn_mask")
    rank = len(_shape(node))
    same = {_shape(n)[: rank - 2] for n in heads if len(_shape(n)) == rank}
    if axis >= rank - 2 or len(same) > 1 or any(len(_shape(n)) != rank for n in heads):
        return None
    axes = dict.fromkeys(heads, axis)
    return _as_it_is(node, axes | (_aligned(node, [mask], axis) if mask is not None else {}))


def _reduced(node: fx.Node, axis: int, part: Part) -> Way | None:
    source = args(node)[0]
    rank = len(_shape(source))
    position = 2 if node.target is aten.linalg_vector_norm.default else 1
    dims = argument(node, position, "dim")
    gone = {dim % rank for dim in dims} if dims else set(range(rank))
    left = list(range(rank))
    if len(_shape(node)) < rank:
        left = [dim for dim in left if dim not in gone]
    own = left[axis]
    return None if own in gone else _as_it_is(node, {source: own})


def _padded(node: fx.Node, axis: int, part: Part) -> Way | None:
    own = len(args(node)[1]) // 2
    return None if axis >= len(_shape(node)) - own else _same(node, axis, part)


Rule = Callable[[fx.Node, int, Part], Way | None]

_RULES: tuple[tuple[Sequence[Any], Rule], ...] = (
    (_RESHAPES, _reshaped),
    (_SAME_SHAPE, _same),
    ((aten.linear.default, aten.layer_norm.default, aten.rms_norm.default), _rows),
    ((*FOLDED_BATCH, aten.pixel_shuffle.default, aten.pixel_unshuffle.default), _first),
    ((aten.scaled_dot_product_attention.default,), _attention),
    ((*_PRODUCTS, *_BIASED_PRODUCTS), _product),
    ((aten.einsum.default,), _einsum),
    ((aten.embedding.default,), _lookup),
    ((aten.expand.default,), _expanded),
    ((aten.repeat.default,), _repeated),
    ((aten.permute.default, aten.transpose.int, aten.t.default), _permuted),
    ((aten.slice.Tensor,), _sliced),
    ((aten.select.int,), _selected),
    ((aten.cat.default, aten.stack.default), _joined),
    (_ALONG, _along),
    (_REDUCTIONS, _reduced),
    ((aten.constant_pad_nd.default, aten.pad.default), _padded),
)


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)
