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
from diffopt.ir import qdq, weight_origins
from diffopt.ir.matcher import Pattern, Var, any_of, named, through
from diffopt.ir.nodes import args, is_call, replace_node, same_layout, stored_tensor
from diffopt.ir.op_sets import REARRANGEMENTS
from diffopt.transforms.weight_folding import (
    LAYER,
    PLUS,
    PRECISE,
    TIMES,
    Affine,
    Fold,
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
    change = partial(_changed, node.target, channels, tensor)
    return Fold(name, node, (layer,), change, key, partial(replace_node, new=value))


def _changed(target: Any, constant: Tensor, source: Tensor | None) -> Affine:
    """Return that W and b become c W and c b, or W and b + c."""
    if target in TIMES:
        scale = TIMES[target](torch.ones_like(constant), constant)
        return Affine(output_scale=scale, sources=(source,))
    return Affine(
        output_shift=PLUS[target](torch.zeros_like(constant), constant), sources=(source,)
    )


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
                product = torch.tensor(scale, dtype=dtype)
                weight_origins.record_computed(product, _stored(gm, node, outer.source))
                factor = g.get_attr(gm, "scale", product)
            single = g.call(gm.graph, aten.mul.Tensor, inner.source, factor, like=node)
        if same_layout(single, node):
            replace_node(node, single)
            count += 1
        else:
            gm.graph.erase_node(single)
    return count


def _stored(gm: fx.GraphModule, *nodes: fx.Node) -> list[Tensor]:
    """Return the stored tensors among the arguments of nodes."""
    tensors = [stored_tensor(gm, n) for node in nodes for n in node.all_input_nodes]
    return [tensor for tensor in tensors if tensor is not None]
