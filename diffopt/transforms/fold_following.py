"""Folds constant scales and shifts of a layer's result into the layer's weights.

    (W x + b) * c = (c W) x + c b and (W x + b) + c = W x + (b + c)

where c is a number, or one for each of the layer's outputs.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.ir import graph as g
from diffopt.ir import qdq
from diffopt.ir.matcher import Pattern, Var, any_of, named, through
from diffopt.ir.nodes import args, is_call, replace_node, same_layout, stored_tensor
from diffopt.ir.op_sets import REARRANGEMENTS
from diffopt.transforms.weight_folding import (
    LAYER,
    PLUS,
    PRECISE,
    TIMES,
    Fold,
    Weights,
    channel_axis,
    factor_of,
    number_or_constant,
    per_channel,
    stored_layer,
)

aten = torch.ops.aten


def _layer_of(node: fx.Node) -> fx.Node | None:
    """Return the layer whose result, perhaps in another shape, is `node` and has no other use."""
    while len(node.users) == 1:
        if LAYER.match(node):
            return node
        if not is_call(node, *REARRANGEMENTS):
            return None
        node = args(node)[0]
    return None


_reshaped = through(_layer_of, "is no layer's result alone")


@Pattern
def _scaled(x: Var, weight: Var, bias: Var, constant: Var) -> Var:
    result = _reshaped(named("layer")(stored_layer(x, weight, bias)))
    return any_of(*TIMES, *PLUS)(named("value")(result), number_or_constant(constant))


def find_scale(gm: fx.GraphModule, name: str, node: fx.Node) -> Fold | None:
    """Return the fold of layer(x) * c, layer(x) / c, layer(x) + c or layer(x) - c."""
    match = _scaled.match(node)
    if not match or not same_layout(node, match["value"]):
        return None
    layer, value, constant = match["layer"], match["value"], match["constant"]
    axis = channel_axis(layer) if layer is value else None
    channels = per_channel(gm, constant, layer.meta["val"], axis)
    if channels is None or layer.args[1].meta["val"].dtype not in PRECISE:
        return None
    tensor = stored_tensor(gm, constant)
    key = (node.target, type(constant), constant if tensor is None else id(tensor))
    weights = partial(_changed, node.target, channels)
    return Fold(name, node, (layer,), weights, key, partial(replace_node, new=value))


def _changed(target: Any, constant: Tensor, weight: Tensor, bias: Tensor | None) -> Weights:
    """Return c W and c b, or W and b + c."""
    if target in TIMES:
        column = constant.reshape(-1, *[1] * (weight.dim() - 1))
        times = TIMES[target]
        return times(weight, column), None if bias is None else times(bias, constant)
    if bias is None:
        bias = weight.new_zeros(len(weight))
    return weight, PLUS[target](bias, constant)


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
