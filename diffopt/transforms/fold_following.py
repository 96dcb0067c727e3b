"""Sees constant scales and shifts of a layer's result as a change of its weights."""

import math
import operator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.ir import graph as g
from diffopt.ir import qdq
from diffopt.ir.nodes import args, is_call, replace_node, same_layout, stored_tensor
from diffopt.transforms.weight_folding import (
    PRECISE,
    TIMES,
    Fold,
    Weights,
    channel_axis,
    double,
    factor_of,
    layer_weights,
    per_channel,
    weights_key,
)

aten = torch.ops.aten

_PLUS = {aten.add.Tensor: operator.add, aten.sub.Tensor: operator.sub}
_RESHAPES = (
    *(aten.view.default, aten.transpose.int, aten.permute.default, aten.reshape.default),
    *(aten.unsqueeze.default, aten.squeeze.dim),
)


def find_scale(gm: fx.GraphModule, name: str, node: fx.Node) -> Fold | None:
    """See layer(x) * c, layer(x) / c, layer(x) + c and layer(x) - c as one layer."""
    if not is_call(node, *TIMES, *_PLUS) or node.kwargs or len(node.args) != 2:
        return None
    one, other = args(node)
    commutes = node.target in (aten.mul.Tensor, aten.add.Tensor)
    if commutes and isinstance(other, fx.Node) and not _is_layer_view(gm, one):
        one, other = other, one
    if not isinstance(one, fx.Node) or not same_layout(node, one):
        return None
    layer = _layer_of(gm, one)
    weights = layer_weights(gm, layer)
    if layer is None or weights is None or weights[0].dtype not in PRECISE:
        return None
    axis = channel_axis(layer) if layer is one else None
    constant = per_channel(gm, other, layer.meta["val"], axis)
    if constant is None:
        return None
    change = id(stored_tensor(gm, other)) if isinstance(other, fx.Node) else other
    key = weights_key(weights, node.target, type(other), change)
    return Fold(name, layer, node, one, key, partial(_changed, weights, node.target, constant))


def _is_layer_view(gm: fx.GraphModule, node: Any) -> bool:
    return isinstance(node, fx.Node) and _layer_of(gm, node) is not None


def _layer_of(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Return the layer whose result, perhaps in another shape, is `node` and has no other use."""
    while len(node.users) == 1:
        if layer_weights(gm, node) is not None:
            return node
        if not is_call(node, *_RESHAPES):
            return None
        node = args(node)[0]
    return None


def _changed(weights: Weights, target: Any, constant: Tensor) -> Weights:
    weight, bias = map(double, weights)
    assert weight is not None
    if target in TIMES:
        column = constant.reshape(-1, *[1] * (weight.dim() - 1))
        times = TIMES[target]
        return times(weight, column), None if bias is None else times(bias, constant)
    if bias is None:
        bias = weight.new_zeros(len(weight))
    return weight, _PLUS[target](bias, constant)


def combine_scales(gm: fx.GraphModule) -> int:
    """Multiply once where a value is multiplied or divided by numbers twice; return how often."""
    count = 0
    for node in list(gm.graph.nodes):
        outer = factor_of(gm, node)
        inner = factor_of(gm, outer.source) if outer and len(outer.source.users) == 1 else None
        if outer is None or inner is None or qdq.is_fp8_scaling(node):
            continue
        if qdq.is_fp8_scaling(outer.source):
            continue
        dtype = node.meta["val"].dtype
        if dtype not in PRECISE or dtype != inner.source.meta["val"].dtype:
            continue
        scale = outer.number * inner.number
        if not math.isfinite(scale) or abs(scale) < torch.finfo(torch.float32).tiny:
            continue
        with gm.graph.inserting_before(node):
            factor: Any = scale
            if outer.stored or inner.stored:
                # Constants stay constants: steps that differ in them alone have equal graphs.
                factor = g.get_attr(gm, "scale", torch.tensor(scale, dtype=dtype))
            single = g.call(gm.graph, aten.mul.Tensor, inner.source, factor, like=node)
        if same_layout(single, node):
            replace_node(node, single)
            count += 1
        else:
            gm.graph.erase_node(single)
    return count
