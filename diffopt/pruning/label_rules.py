"""What each operator does to the labels of what it reads: it moves, ties, sums over or pins them.

Rules know operators, not modules. What has no rule pins all that it reads, under its own name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.analysis.reachability import packet
from diffopt.ir import graph as g
from diffopt.ir.nodes import args, argument
from diffopt.ir.printing import target_name
from diffopt.pruning import label_products as products
from diffopt.pruning.index_labels import Factors, along, compressed, narrow, reshaped, varying
from diffopt.pruning.label_propagation import Body, Operand, Rule, combine, pointwise

aten = torch.ops.aten


def _same(body: Body, node: fx.Node) -> Factors:
    shape = node.meta["val"].shape
    return [f.expand(shape) for f in body.values[args(node)[0]]]


# Moving


def _moved(body: Body, node: fx.Node) -> Any:
    """Run the operator on the labels themselves."""
    source, *rest = args(node)
    if g.nodes_in((rest, node.kwargs)):
        return None
    runs = [node.target(factor, *rest, **node.kwargs) for factor in body.values[source]]  # type: ignore[operator]
    if not isinstance(node.meta["val"], (list, tuple)):
        return runs
    return [[run[i] for run in runs] for i in range(len(node.meta["val"]))]


def _compressed(body: Body, node: fx.Node) -> Factors | None:
    moved = _moved(body, node)
    return None if moved is None else [compressed(factor) for factor in moved]


def _view(body: Body, node: fx.Node) -> Factors:
    return [reshaped(f, node.meta["val"].shape) for f in body.values[args(node)[0]]]


def _slice(body: Body, node: fx.Node) -> Factors:
    source, axis = args(node)[0], argument(node, 1, "dim", 0)
    if argument(node, 4, "step", 1) != 1:
        for factor in body.values[source]:
            body.stays(factor, [axis % factor.dim()], f"{target_name(node)} takes every other")
    found: Factors = _moved(body, node)
    return found


def _scattered(body: Body, node: fx.Node) -> Factors | None:
    """Write a value over part of another; only what is the same along that axis may go."""
    whole, part = (body.operand(n) for n in args(node)[:2])
    if len(whole[1]) > 1 or len(part[1]) > 1:
        return None
    axis = argument(node, 2, "dim", 0) % len(whole[0])
    filled = []
    for shape, factors in (whole, part):
        factor = factors[0] if factors else body.labels.fresh(1).expand(tuple(shape))
        if not factors:
            body.labels.pin(factor, "what it is written over stays")
        body.stays(factor, [axis], f"{target_name(node)} writes over part of it")
        filled.append(factor)
    return [compressed(node.target(*filled, *args(node)[2:], **node.kwargs))]  # type: ignore[operator]


def _complex(body: Body, node: fx.Node) -> Factors:
    """Take pairs along the last axis for complex numbers, or back."""
    shape = node.meta["val"].shape
    found = []
    for factor in body.values[args(node)[0]]:
        if packet(node) is aten.view_as_real:
            factor = factor.unsqueeze(-1)
        else:
            factor = body.labels.collapse(factor, [factor.dim() - 1])[..., 0]
        found.append(factor.expand(shape))
    return found


def _expand(body: Body, node: fx.Node) -> Factors:
    return [f.expand(node.meta["val"].shape) for f in body.values[args(node)[0]]]


def _cat(body: Body, node: fx.Node) -> Factors:
    parts = list(args(node)[0])
    axis = argument(node, 1, "dim", 0)
    if packet(node) is aten.stack:
        axis %= node.meta["val"].dim()
        parts = [
            ([*s[:axis], 1, *s[axis:]], [f.unsqueeze(axis) for f in own])
            for s, own in map(body.operand, parts)
        ]
    else:
        axis %= node.meta["val"].dim()
        parts = [body.operand(n) for n in parts]
    kinds = dict.fromkeys(_besides(f, axis) for _, own in parts for f in own)
    found = []
    for kind in kinds:
        alike = [[f for f in own if _besides(f, axis) == kind] for _, own in parts]
        for factors in alike:
            for factor in factors[1:]:
                body.labels.pin(factor, f"{target_name(node)} of what goes in two ways")
        firsts = [(s, own[0] if own else None) for (s, _), own in zip(parts, alike, strict=True)]
        found.append(_joined(body, node, firsts, axis))
    return found


def _besides(factor: Tensor, axis: int) -> tuple[int, ...]:
    return tuple(a for a in varying(factor) if a != axis)


def _joined(
    body: Body, node: fx.Node, parts: Sequence[tuple[Sequence[int], Tensor | None]], axis: int
) -> Tensor:
    """Return one factor of a concatenation; parts that have none get labels that stay."""
    factors = []
    for shape, factor in parts:
        if factor is None:
            factor = body.labels.fresh(1).expand(tuple(shape))
            body.labels.pin(factor, "what it is concatenated with stays")
        factors.append(factor)
    fixed = [a for a in range(len(parts[0][0])) if a != axis]
    fixed = [a for a in fixed if not any(a in varying(f) for f in factors)]
    whole = torch.cat([narrow(f, fixed) for f in factors], axis)
    return whole.expand(node.meta["val"].shape)


def _shuffle(body: Body, node: fx.Node) -> Factors:
    """Move channels to places or back; all that share a channel go together."""
    found = []
    for factor in _moved(body, node):
        factor = compressed(factor)
        found.append(body.labels.collapse(factor, range(factor.dim() - 2, factor.dim())))
    return found


def _index(body: Body, node: fx.Node) -> Factors | None:
    """Read by index along one axis."""
    source, indices = args(node)
    places = [i for i, index in enumerate(indices) if index is not None]
    if len(places) != 1 or any(body.values[n] for n in g.nodes_in(indices)):
        return None
    (axis,), count = places, indices[places[0]].meta["val"].dim()
    if indices[axis].meta["val"].dtype == torch.bool:
        return None
    found = []
    for factor in body.values[source]:
        body.stays(factor, [axis], f"{target_name(node)} reads by index")
        one = narrow(factor, [axis]).squeeze(axis)
        for _ in range(count):
            one = one.unsqueeze(axis)
        found.append(one.expand(node.meta["val"].shape))
    return found


# Mixing along axes


def _resized(body: Body, node: fx.Node) -> Factors:
    """Change places alone: pooling, interpolation."""
    source = args(node)[0]
    rank = source.meta["val"].dim()
    places = next(int(word[-2]) for word in str(packet(node)).split("_") if word[-2:] in _PLACES)
    return body.mixed(node, source, range(rank - places, rank))


_PLACES = ("1d", "2d", "3d")


def _padded(body: Body, node: fx.Node) -> Factors:
    source = args(node)[0]
    old, new = source.meta["val"].shape, node.meta["val"].shape
    axes = [a for a, (one, other) in enumerate(zip(old, new, strict=True)) if one != other]
    return body.mixed(node, source, axes)


def _along(body: Body, node: fx.Node) -> Factors:
    """Mix along the axis that the second argument names."""
    source = args(node)[0]
    axis = argument(node, 1, "dim", -1)
    return body.mixed(node, source, [axis % source.meta["val"].dim()])


def _reduce(body: Body, node: fx.Node) -> Factors:
    """Sum over axes, as norms do; with several axes that change the others decide."""
    source, shape = args(node)[0], node.meta["val"].shape
    rank = source.meta["val"].dim()
    axes = argument(node, 2 if packet(node) is aten.linalg_vector_norm else 1, "dim")
    if isinstance(axes, int):
        axes = [axes]
    axes = {a % rank for a in axes} if axes and not isinstance(axes, bool) else set(range(rank))
    found = []
    for factor in body.values[source]:
        if not set(varying(factor)) - axes:
            continue
        factor = narrow(body.labels.collapse(factor, axes), axes)
        if len(shape) != rank:
            for axis in sorted(axes, reverse=True):
                factor = factor.squeeze(axis)
        found.append(factor.expand(shape))
    return found


# Norms


def _layer_norm(body: Body, node: fx.Node) -> Factors:
    x, form = args(node)[:2]
    shape = node.meta["val"].shape
    if len(form) > 1:
        for factor in body.values[x]:
            body.stays(
                factor,
                range(len(shape) - len(form), len(shape)),
                f"{target_name(node)} is over several axes",
            )
    more = [n for n in args(node)[2:4] if isinstance(n, fx.Node)]
    operands = [body.operand(n) for n in (x, *more)]
    return pointwise(body, node, shape, operands)  # of what is normalised nothing can be picked


def _group_norm(body: Body, node: fx.Node) -> Factors:
    """Let whole groups go: the statistics of those that stay remain what they were.

    A single group is as a layer norm: its statistics are those of the channels that stay.
    """
    x, groups = args(node)[:2]
    found = []
    for factor in body.values[x]:
        factor = body.labels.collapse(factor, [a for a in range(factor.dim()) if a != 1])
        if groups > 1 and 1 in varying(factor):
            body.labels.collapse(along(factor, 1).reshape(groups, -1), [1])
        found.append(factor)
    weights = [n for n in (argument(node, 2, "weight"), argument(node, 3, "bias")) if n is not None]
    return _per_channel(body, node, found, weights)


def _batch_norm(body: Body, node: fx.Node) -> Any:
    x, *weights = args(node)[:5]
    values = node.meta["val"]
    if packet(node) is not aten._native_batch_norm_legit_no_training and argument(
        node, 5, "training"
    ):
        return None  # its statistics are those of the requests
    made = _per_channel(body, node, body.values[x], [n for n in weights if n is not None])
    return made if isinstance(values, Tensor) else [made, *([] for _ in values[1:])]


def _per_channel(body: Body, node: fx.Node, found: Factors, weights: Sequence[fx.Node]) -> Factors:
    """Combine a value with vectors along its second axis."""
    shape = args(node)[0].meta["val"].shape
    form = [-1, *[1] * (len(shape) - 2)]
    operands: list[Operand] = [(shape, found)]
    for size, factors in map(body.operand, weights):
        operands.append(([*size, *form[1:]], [f.reshape(form) for f in factors]))
    return pointwise(body, node, shape, operands)


def _table(**rules: tuple[Rule, str]) -> dict[Any, Rule]:
    return {
        getattr(aten, name): rule
        for rule, names in rules.values()
        for name in names.split()
        if hasattr(aten, name)
    }


RULES: dict[Any, Rule] = _table(
    same=(
        _same,
        "clone contiguous alias detach _to_copy to type_as dropout zeros_like ones_like full_like "
        "empty_like lift_fresh_copy",
    ),
    moved=(
        _moved,
        "permute transpose t squeeze unsqueeze split split_with_sizes chunk "
        "unsafe_chunk unsafe_split select unbind",
    ),
    compressed=(_compressed, "repeat repeat_interleave"),
    sliced=(_slice, "slice"),
    viewed=(_view, "view _unsafe_view reshape flatten unflatten"),
    expanded=(_expand, "expand expand_as"),
    joined=(_cat, "cat concat concatenate stack"),
    scattered=(_scattered, "slice_scatter"),
    paired=(_complex, "view_as_complex view_as_real"),
    copied=(combine, "copy"),
    shuffled=(_shuffle, "pixel_shuffle pixel_unshuffle"),
    indexed=(_index, "index"),
    resized=(
        _resized,
        "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d "
        "_upsample_nearest_exact2d _upsample_nearest_exact3d upsample_bilinear2d "
        "upsample_bicubic2d upsample_linear1d upsample_trilinear3d avg_pool1d avg_pool2d "
        "avg_pool3d max_pool2d adaptive_avg_pool2d adaptive_avg_pool1d",
    ),
    padded=(_padded, "pad constant_pad_nd reflection_pad2d replication_pad2d"),
    along=(_along, "softmax _softmax log_softmax cumsum"),
    reduced=(_reduce, "mean sum var linalg_vector_norm"),
    products=(products.matmul, "matmul mm bmm addmm baddbmm"),
    linear=(products.linear, "linear"),
    convolved=(
        products.conv,
        "conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d",
    ),
    attended=(products.attention, "scaled_dot_product_attention"),
    einsum=(products.einsum, "einsum"),
    embedded=(products.embedding, "embedding"),
    layer_norm=(_layer_norm, "layer_norm rms_norm"),
    group_norm=(_group_norm, "group_norm"),
    batch_norm=(_batch_norm, "batch_norm native_batch_norm _native_batch_norm_legit_no_training"),
)
