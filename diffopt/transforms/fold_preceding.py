"""Folds constant scales and shifts of a layer's input, a norm's too, into the layer's weights.

A scale s and a shift t of the channels of x are a scale of the input channels of the weight of a
linear layer or convolution, and a shift of its bias: W (s x + t) + b = (W s) x + (W t + b).
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.analysis.axis_rules import relate
from diffopt.ir.matcher import Match, Pattern, Var, any_of, condition, constant_or_none
from diffopt.ir.nodes import conv_geometry, is_call, replace_node, same_layout, stored_tensor
from diffopt.ir.op_sets import REARRANGEMENTS
from diffopt.ir.program import Program
from diffopt.transforms.weight_folding import (
    LAYER,
    LINEAR,
    PLUS,
    PRECISE,
    TIMES,
    Affine,
    Fold,
    Skip,
    channel_axis,
    double,
    fold_all,
    number_or_constant,
    per_channel,
)

aten = torch.ops.aten

_NORMS = (aten.layer_norm.default, aten.group_norm.default, aten.rms_norm.default)

_computed = condition(lambda v: isinstance(v, fx.Node) and v.op != "get_attr", "is a constant")


def _norm(x: Var, sizes: Var, weight: Var, bias: Var) -> Var:
    norm = any_of(aten.layer_norm.default, aten.group_norm.default)
    return norm(x, sizes, constant_or_none(weight), constant_or_none(bias), ...)


def _rms_norm(x: Var, sizes: Var, weight: Var) -> Var:
    return aten.rms_norm.default(x, sizes, constant_or_none(weight), ...)


def _scaled_or_shifted(x: Var, constant: Var) -> Var:
    return any_of(*TIMES, *PLUS)(_computed(x), number_or_constant(constant))


_NORM, _POINTWISE = Pattern(_norm, _rms_norm), Pattern(_scaled_or_shifted)


REASONS = (
    "the next layer's weight is also used in another way",
    "the next layer's new weights would not be finite",
)


def fold_preceding(program: Program, skip: Skip) -> dict[str, int]:
    """Fold until there is nothing more to fold; return how many norms and how many others."""
    counts = fold_all(program, _find, skip, REASONS)
    norms = sum(counts[norm] for norm in _NORMS)
    return {"norms folded": norms, "scales in front folded": counts.total() - norms}


def _find(gm: fx.GraphModule, name: str, node: fx.Node) -> Fold | None:
    """Return the fold of a norm, x * c, x / c, x + c or x - c which only layers read."""
    norm, product = _NORM.match(node), _POINTWISE.match(node)
    match = norm or product
    if not match or node.meta["val"].dtype not in PRECISE:
        return None
    readers = _readers(node)
    axes = {axis for _, axis in readers}
    if len(axes) != 1:
        return None
    constants = (_of_norm if norm else _of_product)(gm, match, *axes)
    if constants is None:
        return None
    scale, shift, sources, key = constants
    layers = tuple(layer for layer, _ in readers)
    for layer in (layer for layer in layers if layer.target is not LINEAR):
        _, padding, _, groups = conv_geometry(layer)
        # W (x + t), padded with zeros, is not W x + W t at the border.
        if groups != 1 or (shift is not None and any(padding)):
            return None
    remove = _without_weights if norm else partial(replace_node, new=match["x"])
    # W (s x + t) + b = (W s) x + (W t + b)
    change = partial(Affine, input_scale=scale, input_shift=shift, sources=sources)
    return Fold(name, node, layers, change, (node.target, *key), remove)


def _readers(node: fx.Node) -> list[tuple[fx.Node, int]]:
    """Return the layers that read a value, through views, and which dimension their channels are.

    Nothing, if anything else reads it.
    """
    readers = []
    for user in node.users:
        if LAYER.match(user) and user.args[0] is node:
            readers.append((user, node.meta["val"].dim() + channel_axis(user)))
            continue
        inner = _readers(user) if is_call(user, *REARRANGEMENTS) else []
        relation = relate(user) if inner else None
        if relation is None:
            return []
        for layer, axis in inner:
            before = relation.sources(axis)
            if not before:
                return []
            readers.append((layer, before[0][1]))
    return readers


Constants = tuple[Tensor | None, Tensor | None, tuple[Tensor | None, ...], tuple[Any, ...]]
"""Scale, shift, the stored tensors that have them, and what tells them apart."""


def _of_norm(gm: fx.GraphModule, match: Match, axis: int) -> Constants | None:
    is_group = match.node.target is aten.group_norm.default
    if axis != (1 if is_group else match.node.meta["val"].dim() - 1):
        return None
    weight, bias = (stored_tensor(gm, match.values.get(name)) for name in ("weight", "bias"))
    if (weight is None and bias is None) or (not is_group and len(match["sizes"]) != 1):
        return None
    return double(weight), double(bias), (weight, bias), (id(weight), id(bias))


def _of_product(gm: fx.GraphModule, match: Match, axis: int) -> Constants | None:
    node, c = match.node, match["constant"]
    constant = per_channel(gm, c, node.meta["val"], axis - node.meta["val"].dim())
    if constant is None or not same_layout(node, match["x"]):
        return None
    tensor = stored_tensor(gm, c)
    key = (type(c), c) if tensor is None else (Tensor, id(tensor))
    if node.target in TIMES:
        return TIMES[node.target](torch.ones_like(constant), constant), None, (tensor,), key
    return None, PLUS[node.target](torch.zeros_like(constant), constant), (tensor,), key


def _without_weights(norm: fx.Node) -> None:
    """Leave out the weight and the bias of a norm."""
    count = 3 if norm.target is aten.rms_norm.default else 4
    norm.args = tuple(None if 2 <= at < count else value for at, value in enumerate(norm.args))
    norm.kwargs = {k: v for k, v in norm.kwargs.items() if k not in ("weight", "bias")}
