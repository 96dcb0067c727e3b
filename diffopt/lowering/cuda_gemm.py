"""Lowers quantized layers to CUDA's matrix products in int8, fp8 and int4.

A layer becomes one operator on the numbers that are stored; its scales and its bias follow:

    before: %d: bfloat16[64,128] = quantized_decomposed.dequantize_per_tensor.tensor(%q, …)
            %w: bfloat16[256,128] = quantized_decomposed.dequantize_per_channel(%values, …)
            %y: bfloat16[64,256] = aten.linear(%d, %w, %bias)

    setup:  %transposed: int8[128,256] = aten.t(%values)
            %sums: int32[256] = aten.sum.dim_IntList(%values, [1])

    after:  %1: int32[64,256] = aten._int_mm(%q, %transposed)
            %2: int32[64,256] = aten.sub.Tensor(%1, %sums * %zero)
            %y: bfloat16[64,256] = %2 * %scale * %scales + %bias

A convolution over one place is such a product over the channels. The weights of layers that run on
floats are kept as small as they are stored: plain operators, which the compiler fuses, dequantize
them in every call, and their results are freed after the layer.

Not lowered when
- the device has no products in the format, or its kernel does not support the sizes: `_int_mm` is
  for more than 16 rows and multiples of 8 inputs and outputs, `_scaled_mm` for multiples of 16;
- the weight has a scale for every few inputs, and the input is quantized as well;
- a convolution is no such product.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from diffopt.ir import dynamic_sizes, qdq
from diffopt.ir import graph as g
from diffopt.ir.dynamic_sizes import Bounds
from diffopt.ir.insert import cast, insert, replace_calls
from diffopt.ir.matcher import Var
from diffopt.ir.nodes import conv_geometry, replace_node
from diffopt.lowering import load_time_graph
from diffopt.lowering.hardware import Hardware

aten = torch.ops.aten
qd = torch.ops.quantized_decomposed
unpack_int4 = torch.ops.diffopt.unpack_int4.default

# The matrix products are for numbers of inputs and of outputs that are multiples of these.
_MULTIPLE: dict[qdq.Number, int] = {"int8": 8, "fp8": 16}
_INT8_ROWS = 17  # the fewest

# The kernel for 4-bit weights dequantizes the whole weight again for every 16 rows, and was written
# for a few: for more, it is faster to dequantize the weight once and multiply in bfloat16.
_INT4_ROWS = 64
_INT4_GROUPS = (32, 64, 128, 256)
_INT4_TILES = (8, 4, 2)  # how many runs of 16 inputs are packed together, the fastest first

# Sums of products in fp8 lose less in the tensor cores' own registers than their factors did by
# rounding to 3 bits, and adding up elsewhere is slower.
_FAST_SUMS = True


def lower(
    components: Mapping[str, fx.GraphModule],
    hardware: Hardware,
    free: Mapping[str, Bounds] | None = None,
) -> load_time_graph.Lowered:
    """Return components with CUDA's matrix products, and what these need on loading.

    Args:
        components: Components by name.
        hardware: What they are to run on.
        free: The sizes that may change, of components that have some.
    """
    lowered = load_time_graph.lower(
        components,
        lambda gm: any(map(qdq.dequantizes_weight, gm.graph.nodes)),
        lambda name, gm: _rewrite(gm, hardware, _Sizes(gm, (free or {}).get(name))),
        widen=False,
    )
    for name in lowered.layers:
        replace_calls(lowered.bodies[name], _PLAIN)
    return lowered


class _Sizes:
    """The shapes of a body's values as they were: at the least and the greatest free sizes."""

    def __init__(self, gm: fx.GraphModule, bounds: Bounds | None) -> None:
        self._ends = [_shapes(gm, bounds, end) for end in (0, 1)] if bounds else [_shapes(gm)] * 2

    def shape(self, node: fx.Node) -> list[int] | None:
        """Return a value's shape for a view, which leaves one size open; None: several are free."""
        low, high = (shapes[node.name] for shapes in self._ends)
        shape = [a if a == b else -1 for a, b in zip(low, high, strict=True)]
        return shape if shape.count(-1) < 2 else None

    def rows(self, layer: qdq.Layer) -> tuple[int, int]:
        """Return the fewest and the most rows of a layer's matrix product."""
        out = layer.weight.meta["val"].shape[0]
        low, high = (math.prod(shapes[layer.node.name]) // out for shapes in self._ends)
        return low, high


def _shapes(
    gm: fx.GraphModule, bounds: Bounds | None = None, end: int = 0
) -> dict[str, Sequence[int]]:
    """Return the shape of each value, with all free sizes at one end of their bounds."""
    if bounds:
        gm = g.clone(gm)
        inputs = []
        for index, node in enumerate(g.placeholders(gm)):
            shape = list(node.meta["val"].shape)
            for axis, ends in bounds.get(index, {}).items():
                shape[axis] = ends[end]
            inputs.append(g.fake(torch.empty(shape, dtype=node.meta["val"].dtype, device="meta")))
        dynamic_sizes.infer_values(gm, inputs, record=True)
    values = {node.name: node.meta.get("val") for node in gm.graph.nodes}
    return {name: v.shape for name, v in values.items() if isinstance(v, torch.Tensor)}


# Layers


def _rewrite(gm: fx.GraphModule, hardware: Hardware, shapes: _Sizes) -> load_time_graph.Rewritten:
    """Put matrix products in place of layers."""
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    rewritten: set[fx.Node] = set()
    for node in list(gm.graph.nodes):
        layer = qdq.layer(node)  # at this point: its input may have been replaced
        if layer is None or (weight := qdq.weight(layer.weight)) is None:
            continue
        x = qdq.activation(layer.x)
        if x is not None:
            kind: str = x.number
            reason = _obstacle(layer, weight, x, hardware, shapes)
            text = "layers with quantized inputs run on floats"
        elif weight.number == "int4":
            kind = "int4"
            reason = _int4_obstacle(layer, weight, hardware, shapes)
            text = "layers widen their 4-bit weights in every call"
        else:
            kind, reason = "float", None
        counts["float" if reason else kind] += 1
        if reason:
            reasons[f"{text}: {reason}"] += 1
        elif kind != "float":
            shape = shapes.shape(layer.node)
            with gm.graph.inserting_before(layer.node):
                arguments = layer, weight, x, shape
                result = insert(gm.graph, _product, *arguments, like=layer.node)
            replace_node(layer.node, result)
            rewritten.add(result)
    return load_time_graph.Rewritten(
        rewritten, dict(counts), [f"{n} {text}" for text, n in reasons.items()]
    )


def _obstacle(
    layer: qdq.Layer, weight: qdq.Weight, x: qdq.Activation, hardware: Hardware, shapes: _Sizes
) -> str | None:
    """Say why a layer with a quantized input cannot be a product of what is stored."""
    if (x.number == "fp8") != (weight.number == "fp8"):
        return f"weights in {weight.number}, inputs in {x.number}"
    if (lack := hardware.lacks(x.number)) is not None:
        return lack
    if weight.group is not None:
        return f"weights with a scale for every {weight.group} inputs"
    if layer.convolution and x.rows:
        return "a convolution adds over rows, whose scales differ"
    if layer.convolution and not _is_product(layer):
        return "a convolution that is no product of matrices"
    out, *inner = layer.weight.meta["val"].shape
    multiple = _MULTIPLE[x.number]
    if out % multiple or math.prod(inner) % multiple:
        return f"not all of its inputs and outputs are multiples of {multiple}"
    if x.number == "int8" and shapes.rows(layer)[0] < _INT8_ROWS:
        return f"fewer than {_INT8_ROWS} rows"
    return None if shapes.shape(layer.node) else "several of its sizes may change"


def _int4_obstacle(
    layer: qdq.Layer, weight: qdq.Weight, hardware: Hardware, shapes: _Sizes
) -> str | None:
    """Say why there is no product of a layer's input and its 4-bit weight."""
    if (hardware.capability or (0, 0)) < (8, 0):
        return "the kernel needs compute capability 8.0"
    if layer.convolution:
        return "a convolution"
    if layer.node.meta["val"].dtype != torch.bfloat16:
        return "the kernel computes in bfloat16 alone"
    if weight.group not in _INT4_GROUPS:
        return f"no scale for every {', '.join(map(str, _INT4_GROUPS))} inputs"
    if layer.weight.meta["val"].shape[0] % 8:
        return "its outputs are no multiple of 8"
    if shapes.rows(layer)[1] > _INT4_ROWS:
        return f"more than {_INT4_ROWS} rows"
    return None if shapes.shape(layer.node) else "several of its sizes may change"


def _is_product(layer: qdq.Layer) -> bool:
    """Tell whether a convolution is a product over the channels of each place."""
    weight, x = layer.weight.meta["val"], layer.x.meta["val"]
    stride, padding, _, groups = conv_geometry(layer.node)
    is_plain = {*weight.shape[2:], *stride} == {1} and not any(padding) and groups == 1
    return is_plain and weight.dim() == x.dim()


def _product(
    layer: qdq.Layer, weight: qdq.Weight, x: qdq.Activation | None, shape: list[int]
) -> Var:
    """Return a layer's matrix product, in the shape of the layer's result."""
    matrix = _matrix(layer.x if x is None else x.quantized, layer.convolution)
    if x is None:
        result = _int4(layer, weight, matrix)
    else:
        result = (_int8 if x.number == "int8" else _fp8)(layer, weight, x, matrix)
    if not layer.convolution:
        return aten.view.default(result, shape)
    count, out, *places = shape
    result = aten.view.default(result, [count, *places, out])
    last = len(shape) - 1
    return aten.permute.default(result, [0, last, *range(1, last)])


def _matrix(x: Var, channels: bool = False) -> Var:
    """Return a value as rows of what is multiplied: of its last axis, or of channels."""
    if channels:
        x = aten.permute.default(x, [0, *range(2, len(x.shape)), 1])
    if len(x.shape) != 2:
        x = aten.reshape.default(x, [-1, x.shape[-1]])
    if x.meta["val"].is_contiguous():
        return x
    return aten.clone.default(x, memory_format=torch.contiguous_format)


def _values(weight: qdq.Weight) -> Var:
    """Return a weight's numbers as [out, in]."""
    values: Var = weight.values
    return values if len(values.shape) == 2 else aten.view.default(values, [values.shape[0], -1])


def _int8(layer: qdq.Layer, weight: qdq.Weight, x: qdq.Activation, matrix: Var) -> Var:
    values = _values(weight)
    result = aten._int_mm.default(matrix, aten.t.default(values))
    if x.zero is not None:  # (q - zero) @ w = q @ w - zero * sum(w)
        result = result - aten.sum.dim_IntList(values, [1], dtype=torch.int32) * x.zero
    return _scaled(layer, weight, x, result)


def _fp8(layer: qdq.Layer, weight: qdq.Weight, x: qdq.Activation, matrix: Var) -> Var:
    """Return a product that scales rows and columns; that is there for results in bfloat16."""
    transposed, dtype = aten.t.default(_values(weight)), layer.node.meta["val"].dtype
    product = aten._scaled_mm.default
    if dtype != torch.bfloat16:
        one = aten.full_like.default(aten.select.int(weight.scales, 0, 0), 1.0)
        result = product(matrix, transposed, one, one, None, None, torch.float32, _FAST_SUMS)
        return _scaled(layer, weight, x, result)
    rows = _rows(x)
    if not x.rows:
        column = cast(aten.slice.Tensor(matrix, 1, 0, 1), torch.float32)
        form = torch.contiguous_format
        rows = aten.full_like.default(column, 1.0, memory_format=form) * x.scale
    columns = aten.view.default(weight.scales, [1, -1])
    return product(matrix, transposed, rows, columns, layer.bias, None, dtype, _FAST_SUMS)


def _int4(layer: qdq.Layer, weight: qdq.Weight, matrix: Var) -> Var:
    """Return a product with a packed weight, of which a group is (number - 8) * scale + zero."""
    out, inputs = weight.node.meta["val"].shape
    pairs = aten.view.default(weight.values.args[0], [out, -1])
    # The kernel has the first number of two in the byte's high half.
    swapped = aten.bitwise_or.Tensor(pairs << 4, pairs >> 4)
    tiles = next(n for n in _INT4_TILES if inputs % (16 * n) == 0)
    packed = aten._convert_weight_to_int4pack.default(swapped, tiles)
    scales = cast(aten.t.default(weight.scales), torch.bfloat16)
    both = aten.stack.default([scales, aten.zeros_like.default(scales)], -1)
    result = aten._weight_int4pack_mm.default(matrix, packed, weight.group, both)
    return result if layer.bias is None else result + layer.bias


def _scaled(layer: qdq.Layer, weight: qdq.Weight, x: qdq.Activation, result: Var) -> Var:
    """Return what follows a product without scales: these, the bias, and the layer's type."""
    result = cast(result, torch.float32) * _rows(x) * weight.scales
    if layer.bias is not None:
        result = result + cast(layer.bias, torch.float32)
    return cast(result, layer.node.meta["val"].dtype)


def _rows(x: qdq.Activation) -> Var:
    """Return an input's scale, or those of its rows as a column."""
    return aten.reshape.default(x.scale, [-1, 1]) if x.rows else x.scale


# Layers on floats: plain operators for those that the compiler has no code for


def _unpacked(node: Var) -> Var:
    packed, shape = node.args
    both = aten.stack.default([packed & 15, packed >> 4], -1)
    flat = aten.view.default(both, [-1])
    if flat.shape[0] != math.prod(shape):  # the last byte holds one
        flat = aten.slice.Tensor(flat, 0, 0, math.prod(shape))
    return aten.view.default(cast(flat, torch.int8) - 8, shape)


def _by_output(node: Var) -> Var:
    values, scales = node.args[:2]
    rows = aten.view.default(scales, [-1] + [1] * (len(values.shape) - 1))
    return cast(values * rows, node.dtype)


def _by_group(node: Var) -> Var:
    values, scales, *_, group, dtype = node.args
    rows = aten.view.default(values, [-1, group]) * aten.view.default(scales, [-1, 1])
    return cast(aten.view.default(rows, list(values.shape)), dtype)


_PLAIN: dict[Any, Callable[[Var], Var]] = {
    unpack_int4: _unpacked,
    qd.dequantize_per_channel.default: _by_output,
    qd.dequantize_per_channel_group.default: _by_group,
    **qdq.ROWS_IN_PLAIN_OPERATORS,
}
