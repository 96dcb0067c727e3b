"""Rewrites quantized layers to what TensorRT has: zero points of 0, and constant scales.

An activation x with any other scale s and zero point z is scaled before the layer, and the layer's
result after it. With u = x / s + z, a constant scale c, and W the weight:

    layer(s * (round(u) - z)) = (layer(c * round(u)) - c * z * sum(W)) * s / c

and c * round(u) is c * u quantized with the scale c and the zero point 0. That holds for one scale
for the tensor, whatever it is computed from, and for one for each row. The input of a convolution
that pads is padded before that, where zeros are still zeros. c is a power of two, so c * u is
exact, and small enough that a sum of products fits into 16-bit floats.

Weights of 4 bits get scales in the type of the product, the same one for every group of inputs
where there is one for each output. Then the kernel of the product dequantizes them; otherwise
another kernel writes them to memory first.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from diffopt.ir import graph as g
from diffopt.ir import qdq
from diffopt.ir.insert import cast, insert
from diffopt.ir.matcher import Var
from diffopt.ir.nodes import args, conv_geometry, is_call, replace_node, stored_tensor
from diffopt.transforms.constant_folding import evaluate

aten = torch.ops.aten
qd = torch.ops.quantized_decomposed

# With these scales the largest number is just below 1.
_CONSTANT: dict[qdq.Number, float] = {"int8": 2.0**-7, "fp8": 2.0**-9}
_GROUPS = (128, 64, 32)


def rewrite(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a component with quantized layers in TensorRT's form."""
    gm = g.clone(gm)
    for layer in qdq.layers(gm):
        with gm.graph.inserting_before(layer.node):
            _weight(gm, layer)
    factors: dict[fx.Node, fx.Node] = {}
    for layer in qdq.layers(gm):
        x, weight = qdq.activation(layer.x), qdq.weight(layer.weight)
        with gm.graph.inserting_before(layer.node):
            if x is not None:
                factor, shift = _activation(gm, layer, x)
            elif weight is not None and _is_read_alike(weight):
                if weight.node not in factors:
                    factors[weight.node] = _one_scale(gm, layer, weight)
                factor, shift = factors[weight.node], None
            else:
                continue
        _scale_result(gm, layer, factor, shift)
    g.prune_unused(gm)
    gm.recompile()
    return gm


def _activation(
    gm: fx.GraphModule, layer: qdq.Layer, x: qdq.Activation
) -> tuple[fx.Node, fx.Node | None]:
    """Scale the input of a layer; return by what to multiply its result, and c * z."""
    graph, constant = gm.graph, _CONSTANT[x.number]
    qparams, zero = [torch.tensor(constant)], None
    if x.number == "int8":
        qparams.append(torch.tensor(0, dtype=torch.int32))
        always = None if x.zero is None else stored_tensor(gm, x.zero)
        zero = x.zero if always is None or always.any() else None
    source = _padded(graph, layer, x.source) if zero and layer.convolution else x.source
    scaled, factor, zero = insert(graph, _rescaled, source, x.scale, x.rows, zero, constant)
    constants = [g.get_attr(gm, "constant", tensor) for tensor in qparams]
    quantized = qdq.quantize(gm, scaled, "static", *constants, number=x.number)
    layer.node.update_arg(0, g.to_dtype(graph, quantized, layer.node.meta["val"].dtype))
    return factor, zero


def _rescaled(
    source: Var, scale: Var, rows: bool, zero: Var | None, constant: float
) -> tuple[Var, Var, Var | None]:
    """Return c u, s / c and c z."""
    factor = (scale if rows else aten.view.default(scale, [])) * (1 / constant)
    scaled = cast(source, torch.float32) / factor
    if zero is not None:
        zero = cast(aten.view.default(zero, []), torch.float32) * constant
        scaled = scaled + zero
    return scaled, factor, zero


def _is_read_alike(weight: qdq.Weight) -> bool:
    """Tell whether linear layers alone read a weight with a scale for each output, unquantized."""
    layers = [qdq.layer(user) for user in weight.node.users]
    return weight.group is None and all(
        layer is not None and not layer.convolution and qdq.activation(layer.x) is None
        for layer in layers
    )


def _one_scale(gm: fx.GraphModule, layer: qdq.Layer, weight: qdq.Weight) -> fx.Node:
    """Give all outputs of a weight the same scale; return what each result is to be multiplied by.

    It is the scale of some output in the middle, so that sums are about as large as they were.
    """
    scales, name = evaluate(gm, weight.scales).float(), layer.node.name
    used = scales[scales > 0]
    middle = torch.full_like(scales, float(used.median()) if len(used) else 1.0)
    inside = g.ancestors([weight.node])
    with gm.graph.inserting_before(weight.scales):
        one = g.get_attr(gm, f"{name}_scale", middle)
        weight.scales.replace_all_uses_with(one, delete_user_cb=lambda user: user in inside)
        return g.get_attr(gm, f"{name}_factor", (scales / middle).reshape(_rows(layer)))


def _scale_result(
    gm: fx.GraphModule, layer: qdq.Layer, factor: fx.Node, shift: fx.Node | None
) -> None:
    """Scale the result of a layer, and shift it by so many times the sums of the weights."""
    graph, node, bias = gm.graph, layer.node, layer.bias
    if bias is not None:
        node.args = (*args(node)[:2], None, *args(node)[3:])
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "bias"}
    users = list(node.users)
    with graph.inserting_before(node.next):
        sums = shift and g.get_attr(gm, f"{node.name}_sums", _sums(gm, layer))
        result = insert(graph, _rescaled_result, node, factor, shift, sums, bias, _rows(layer))
    for user in users:
        user.replace_input_with(node, result)


def _rescaled_result(
    y: Var, factor: Var, shift: Var | None, sums: Var | None, bias: Var | None, rows: list[int]
) -> Var:
    result = cast(y, torch.float32)
    if shift is not None:
        result = result - sums * shift
    result = result * factor
    if bias is not None:
        result = result + aten.view.default(cast(bias, torch.float32), rows)
    return cast(result, y.dtype)


def _rows(layer: qdq.Layer) -> list[int]:
    """Return the shape in which one number for each output meets a layer's results."""
    behind = layer.node.meta["val"].dim() - 2 if layer.convolution else 0
    return [-1] + [1] * behind


def _sums(gm: fx.GraphModule, layer: qdq.Layer) -> Tensor:
    """Return the sum of the weights of each output."""
    weight: Tensor = evaluate(gm, layer.weight).float()
    return weight.flatten(1).sum(1).reshape(_rows(layer))


def _padded(graph: fx.Graph, layer: qdq.Layer, source: fx.Node) -> fx.Node:
    """Pad what a convolution reads, so that the convolution need not."""
    node, sizes = layer.node, layer.node.meta["val"].dim() - 2
    padding = conv_geometry(node)[1]
    if not any(padding):
        return source
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "padding"}
    if len(node.args) > 4:
        node.update_arg(4, [0] * sizes)
    both = [amount for amount in reversed(padding) for _ in range(2)]
    return g.call(graph, aten.constant_pad_nd.default, source, both, 0.0)


def _weight(gm: fx.GraphModule, layer: qdq.Layer) -> None:
    """Replace a quantized weight that TensorRT would dequantize in memory by one in its form."""
    weight = qdq.weight(layer.weight)
    if weight is None or weight.number == "fp8":
        return
    if weight.number == "int8" and not _is_stored(weight.values):  # rounded again, see qdq.Packed
        values = g.get_attr(gm, f"{layer.node.name}_values", evaluate(gm, weight.values))
        weight.node.update_arg(0, values)
    if weight.number == "int4" and len(layer.weight.meta["val"].shape) == 2:
        _group(gm, layer, weight)


def _group(gm: fx.GraphModule, layer: qdq.Layer, weight: qdq.Weight) -> None:
    """Give groups of a 4-bit weight scales in the layer's type, as the product's kernel wants."""
    value = weight.node.meta["val"]
    fits = [n for n in _GROUPS if value.shape[1] > n and value.shape[1] % n == 0]
    group = weight.group or (fits[0] if fits else None)
    if group is None:
        return
    scales = evaluate(gm, weight.scales).float()
    if weight.group is None:
        scales = scales[:, None].expand(-1, value.shape[1] // group).contiguous()
    if scales.abs().min() >= torch.finfo(value.dtype).tiny:  # else it would lose digits
        scales = scales.to(value.dtype)
    stored = g.get_attr(gm, f"{layer.node.name}_scales", scales)
    limits = (stored, None, *qdq.LIMITS["int4"], torch.int8, group, value.dtype)
    target = qd.dequantize_per_channel_group.default
    replace_node(weight.node, g.call(gm.graph, target, weight.values, *limits))


def _is_stored(values: fx.Node) -> bool:
    """Tell whether numbers are stored, packed or not."""
    while is_call(values, aten.view.default, torch.ops.diffopt.unpack_int4.default):
        values = args(values)[0]
    return values.op == "get_attr"
