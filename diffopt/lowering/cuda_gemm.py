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
from diffopt.ir.nodes import args, conv_geometry, is_call, replace_node
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
        _write_out(lowered.bodies[name])
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
            with gm.graph.inserting_before(layer.node):
                result = _product(gm.graph, layer, weight, x, shapes)
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
    graph: fx.Graph, layer: qdq.Layer, weight: qdq.Weight, x: qdq.Activation | None, shapes: _Sizes
) -> fx.Node:
    """Insert a layer's matrix product, in the shape of the layer's result."""
    matrix = _matrix(graph, layer.x if x is None else x.quantized, layer.convolution)
    if x is None:
        result = _int4(graph, layer, weight, matrix)
    elif x.number == "int8":
        result = _int8(graph, layer, weight, x, matrix)
    else:
        result = _fp8(graph, layer, weight, x, matrix)
    shape = shapes.shape(layer.node)
    assert shape is not None
    if not layer.convolution:
        return g.call(graph, aten.view.default, result, shape)
    count, out, *places = shape
    result = g.call(graph, aten.view.default, result, [count, *places, out])
    last = len(shape) - 1
    return g.call(graph, aten.permute.default, result, [0, last, *range(1, last)])


def _matrix(graph: fx.Graph, node: fx.Node, channels: bool = False) -> fx.Node:
    """Insert a value as rows of what is multiplied: of its last axis, or of channels."""
    value = node.meta["val"]
    if channels:
        node = g.call(graph, aten.permute.default, node, [0, *range(2, value.dim()), 1])
    if node.meta["val"].dim() != 2:
        node = g.call(graph, aten.reshape.default, node, [-1, node.meta["val"].shape[-1]])
    if node.meta["val"].is_contiguous():
        return node
    form = torch.contiguous_format
    return g.call(graph, aten.clone.default, node, memory_format=form)


def _values(graph: fx.Graph, weight: qdq.Weight) -> fx.Node:
    """Insert a weight's numbers as [out, in]."""
    shape = weight.node.meta["val"].shape
    if weight.values.meta["val"].dim() == 2:
        return weight.values
    return g.call(graph, aten.view.default, weight.values, [shape[0], -1])


def _int8(
    graph: fx.Graph, layer: qdq.Layer, weight: qdq.Weight, x: qdq.Activation, matrix: fx.Node
) -> fx.Node:
    values = _values(graph, weight)
    transposed = g.call(graph, aten.t.default, values)
    result = g.call(graph, aten._int_mm.default, matrix, transposed, like=layer.node)
    if x.zero is not None:  # (q - zero) @ w = q @ w - zero * sum(w)
        sums = g.call(graph, aten.sum.dim_IntList, values, [1], dtype=torch.int32)
        shift = g.call(graph, aten.mul.Tensor, sums, x.zero)
        result = g.call(graph, aten.sub.Tensor, result, shift)
    return _scaled(graph, layer, weight, x, result)


def _fp8(
    graph: fx.Graph, layer: qdq.Layer, weight: qdq.Weight, x: qdq.Activation, matrix: fx.Node
) -> fx.Node:
    """Insert a product that scales rows and columns; that is there for results in bfloat16."""
    transposed = g.call(graph, aten.t.default, _values(graph, weight))
    product, dtype = aten._scaled_mm.default, layer.node.meta["val"].dtype
    if dtype != torch.bfloat16:
        first = g.call(graph, aten.select.int, weight.scales, 0, 0)
        one = g.call(graph, aten.full_like.default, first, 1.0)
        end: tuple[Any, ...] = (None, None, torch.float32, _FAST_SUMS)
        result = g.call(graph, product, matrix, transposed, one, one, *end, like=layer.node)
        return _scaled(graph, layer, weight, x, result)
    rows = _rows(graph, x)
    if not x.rows:
        column = g.call(graph, aten.slice.Tensor, matrix, 1, 0, 1)
        wide = g.call(graph, aten._to_copy.default, column, dtype=torch.float32)
        form = torch.contiguous_format
        ones = g.call(graph, aten.full_like.default, wide, 1.0, memory_format=form)
        rows = g.call(graph, aten.mul.Tensor, ones, x.scale)
    columns = g.call(graph, aten.view.default, weight.scales, [1, -1])
    end = (layer.bias, None, dtype, _FAST_SUMS)
    return g.call(graph, product, matrix, transposed, rows, columns, *end, like=layer.node)


def _int4(graph: fx.Graph, layer: qdq.Layer, weight: qdq.Weight, matrix: fx.Node) -> fx.Node:
    """Insert a product with a packed weight, of which a group is (number - 8) * scale + zero."""
    out, inputs = weight.node.meta["val"].shape
    stored = args(weight.values)[0]
    pairs = g.call(graph, aten.view.default, stored, [out, -1])
    # The kernel has the first number of two in the byte's high half.
    high = g.call(graph, aten.bitwise_left_shift.Tensor_Scalar, pairs, 4)
    low = g.call(graph, aten.bitwise_right_shift.Tensor_Scalar, pairs, 4)
    swapped = g.call(graph, aten.bitwise_or.Tensor, high, low)
    tiles = next(n for n in _INT4_TILES if inputs % (16 * n) == 0)
    packed = g.call(graph, aten._convert_weight_to_int4pack.default, swapped, tiles)
    scales = g.call(graph, aten.t.default, weight.scales)
    scales = g.call(graph, aten._to_copy.default, scales, dtype=torch.bfloat16)
    zeros = g.call(graph, aten.zeros_like.default, scales)
    both = g.call(graph, aten.stack.default, [scales, zeros], -1)
    target = aten._weight_int4pack_mm.default
    result = g.call(graph, target, matrix, packed, weight.group, both, like=layer.node)
    return result if layer.bias is None else g.call(graph, aten.add.Tensor, result, layer.bias)


def _scaled(
    graph: fx.Graph, layer: qdq.Layer, weight: qdq.Weight, x: qdq.Activation, result: fx.Node
) -> fx.Node:
    """Insert what follows a product without scales: these, the bias, and the layer's type."""
    result = g.to_dtype(graph, result, torch.float32)
    result = g.call(graph, aten.mul.Tensor, result, _rows(graph, x))
    result = g.call(graph, aten.mul.Tensor, result, weight.scales)
    if layer.bias is not None:
        wide = g.to_dtype(graph, layer.bias, torch.float32)
        result = g.call(graph, aten.add.Tensor, result, wide)
    return g.to_dtype(graph, result, layer.node.meta["val"].dtype)


def _rows(graph: fx.Graph, x: qdq.Activation) -> fx.Node:
    """Return an input's scale, or insert those of its rows as a column."""
    return g.call(graph, aten.reshape.default, x.scale, [-1, 1]) if x.rows else x.scale


# Layers on floats


def _write_out(gm: fx.GraphModule) -> None:
    """Replace operators that the compiler has no code for by plain ones."""
    for node in list(gm.graph.nodes):
        for target, write in _PLAIN.items():
            if is_call(node, target):
                with gm.graph.inserting_before(node):
                    plain = write(gm.graph, node)
                replace_node(node, plain)
    g.prune_unused(gm)
    gm.recompile()


def _unpacked(graph: fx.Graph, node: fx.Node) -> fx.Node:
    packed, shape = args(node)
    low = g.call(graph, aten.bitwise_and.Scalar, packed, 15)
    high = g.call(graph, aten.bitwise_right_shift.Tensor_Scalar, packed, 4)
    both = g.call(graph, aten.stack.default, [low, high], -1)
    flat = g.call(graph, aten.view.default, both, [-1])
    if flat.meta["val"].numel() != math.prod(shape):  # the last byte holds one
        flat = g.call(graph, aten.slice.Tensor, flat, 0, 0, math.prod(shape))
    signed = g.call(graph, aten._to_copy.default, flat, dtype=torch.int8)
    signed = g.call(graph, aten.sub.Tensor, signed, 8)
    return g.call(graph, aten.view.default, signed, shape)


def _by_output(graph: fx.Graph, node: fx.Node) -> fx.Node:
    values, scales = args(node)[:2]
    shape = [-1] + [1] * (values.meta["val"].dim() - 1)
    rows = g.call(graph, aten.view.default, scales, shape)
    product = g.call(graph, aten.mul.Tensor, values, rows)
    return g.to_dtype(graph, product, node.meta["val"].dtype)


def _by_group(graph: fx.Graph, node: fx.Node) -> fx.Node:
    values, scales, *_, group, dtype = args(node)
    rows = g.call(graph, aten.view.default, values, [-1, group])
    scales = g.call(graph, aten.view.default, scales, [-1, 1])
    product = g.call(graph, aten.mul.Tensor, rows, scales)
    product = g.call(graph, aten.view.default, product, list(values.meta["val"].shape))
    return g.to_dtype(graph, product, dtype)


_PLAIN: dict[Any, Callable[[fx.Graph, fx.Node], fx.Node]] = {
    unpack_int4: _unpacked,
    qd.dequantize_per_channel.default: _by_output,
    qd.dequantize_per_channel_group.default: _by_group,
    **qdq.ROWS_IN_PLAIN_OPERATORS,
}
