"""Quantized layers in a graph: how they are written, and how they are matched.

A layer (a linear or a convolution) is the same operator as before; its input is quantized and
dequantized, and its weight dequantized, by torch's own `quantized_decomposed` operators:

    %q: int8[4,8] = quantized_decomposed.quantize_per_tensor.tensor(%x, %scale, %zero, -128, 127, …)
    %d: float32[4,8] = quantized_decomposed.dequantize_per_tensor.tensor(%q, %scale, %zero, …)
    %w: float32[16,8] = quantized_decomposed.dequantize_per_channel(%values, %scales, None, 0, …)
    %y: float32[4,16] = aten.linear(%d, %w, %bias)

Every target can compute that; one with integer kernels matches it (`layers`, `weight`,
`activation`). Weights are stored as `Packed` says, those of 4 bits two in a byte. An activation has
a scale and a zero point for the whole tensor, which are constants of the body, arguments of it (one
row of a table for each step) or computed from the tensor; or it has a scale for each row (token).
E4M3 floats are scaled, clamped and cast.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor, fx

from diffopt.ir import graph as g
from diffopt.ir import qdq_vmap
from diffopt.ir.matcher import Pattern, Var, any_of, condition, constant, maybe, named
from diffopt.ir.nodes import args, is_call
from diffopt.ir.op_sets import CONVOLUTIONS

aten = torch.ops.aten
qd = torch.ops.quantized_decomposed
to_copy = aten._to_copy.default

Number = Literal["int8", "int4", "fp8"]
"""The format of stored numbers."""

Scaling = Literal["static", "dynamic", "rows"]
"""Where an activation's scales come from: calibration, the tensor, or each of its rows."""

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max

LIMITS: dict[Number, tuple[int, int]] = {"int8": (-127, 127), "int4": (-8, 7)}
"""Of weights. Activations of 8 bits have -128 as well."""

_LAYERS = (aten.linear.default, *CONVOLUTIONS)
EPS = 2.0**-24  # the least scale of an activation: a tensor of zeros has to have one

qdq_vmap.register()

# 4-bit numbers


@torch.library.custom_op("diffopt::unpack_int4", mutates_args=())
def unpack_int4(packed: Tensor, shape: list[int]) -> Tensor:
    """Return 4-bit numbers as int8: each byte holds two, the first in its low half."""
    pairs = torch.stack([packed & 15, packed >> 4], -1).reshape(-1)
    count = 1
    for size in shape:
        count *= size
    return (pairs[:count].to(torch.int8) - 8).reshape(shape)


@unpack_int4.register_fake
def _(packed: Tensor, shape: list[int]) -> Tensor:
    return packed.new_empty(shape, dtype=torch.int8)


def pack_int4(values: Tensor) -> Tensor:
    """Return whole numbers from -8 to 7 as bytes, two in each; see `unpack_int4`."""
    flat = (values.reshape(-1) + 8).to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, flat.numel() % 2))
    return flat[0::2] | (flat[1::2] << 4)


# Weights


@dataclass(frozen=True, eq=False)
class Packed:
    """A quantized weight as it is stored; bodies that use the weight share it.

    Attributes:
        number: What the values are.
        values: int8 or E4M3 numbers in the weight's shape, or bytes with two 4-bit numbers each.
        scales: float32, [out], or [out, groups] where inputs of an output have several; float16
            ones are widened in the graph.
        shape: Of the weight, [out, in, …].
        group: How many weights in a row share a scale; None: all of an output.
        wide: Scales [out] with which the weight is rounded again, to int8: integer kernels have
            one scale for each output, and for int8 the finer ones of groups hardly matter.
    """

    number: Number
    values: Tensor
    scales: Tensor
    shape: tuple[int, ...]
    group: int | None = None
    wide: Tensor | None = None

    @staticmethod
    def of(number: Number, values: Tensor, scales: Tensor, group: int | None = None) -> Packed:
        """Return int8, 4-bit or E4M3 numbers in the shape of the weight as they are stored."""
        packed = pack_int4(values) if number == "int4" else values.contiguous()
        return Packed(number, packed, scales, tuple(values.shape), group)

    @property
    def bytes(self) -> int:
        """The memory of the stored tensors, in bytes."""
        return self.values.nbytes + self.scales.nbytes


def place_weight(gm: fx.GraphModule, name: str, packed: Packed, dtype: torch.dtype) -> fx.Node:
    """Insert, at the graph's insertion point, a weight in `dtype`; return its node."""
    graph = gm.graph
    values = g.get_attr(gm, f"{name}_{packed.number}", packed.values)
    scales = g.get_attr(gm, f"{name}_scales", packed.scales)
    if packed.scales.dtype != torch.float32:
        scales = g.call(graph, to_copy, scales, dtype=torch.float32)
    if packed.number == "fp8":
        wide = g.call(graph, to_copy, values, dtype=torch.float32)
        rows = [-1] + [1] * (len(packed.shape) - 1)
        scales = g.call(graph, aten.view.default, scales, rows)
        product = g.call(graph, aten.mul.Tensor, wide, scales)
        return g.call(graph, to_copy, product, dtype=dtype)
    low, high = LIMITS[packed.number]
    flat = packed.shape if packed.group is None else (packed.shape[0], -1)
    if packed.number == "int4":
        shape = list(packed.shape)
        values = g.call(graph, torch.ops.diffopt.unpack_int4.default, values, shape)
    limits: tuple[Any, ...]
    if packed.group is None:
        limits = (scales, None, 0, low, high, torch.int8)
        target = qd.dequantize_per_channel.default
        return g.call(graph, target, values, *limits, out_dtype=dtype)
    if len(packed.shape) != 2:
        values = g.call(graph, aten.view.default, values, list(flat))
    inner = dtype if packed.wide is None else torch.float32
    limits = (scales, None, low, high, torch.int8, packed.group, inner)
    weight = g.call(graph, qd.dequantize_per_channel_group.default, values, *limits)
    if len(packed.shape) != 2:
        weight = g.call(graph, aten.view.default, weight, list(packed.shape))
    if packed.wide is None:
        return weight
    scales = g.get_attr(gm, f"{name}_wide_scales", packed.wide)
    zeros = g.call(graph, aten.zeros_like.default, scales)
    again = (0, *LIMITS["int8"], torch.int8)
    values = g.call(graph, qd.quantize_per_channel.default, weight, scales, zeros, *again)
    target = qd.dequantize_per_channel.default
    return g.call(graph, target, values, scales, None, *again, out_dtype=dtype)


@dataclass(frozen=True, eq=False)
class Weight:
    """A quantized weight in a graph.

    Attributes:
        node: What the layer reads: [out, in, …] in the layer's type.
        number: What the values are: int8 for a weight that is stored in 4 bits and widened.
        values: Computes the values, int8 or E4M3 [out, in, …] (flat behind the first axis if there
            are groups), from stored ones alone.
        scales: Computes float32 scales, [out] or [out, groups], from stored ones alone.
        group: How many weights in a row share a scale; None: all of an output.
    """

    node: fx.Node
    number: Number
    values: fx.Node
    scales: fx.Node
    group: int | None


_in_fp8 = condition(lambda x: x.meta["val"].dtype == FP8, "is not in E4M3")


def _per_output(values: Var, scales: Var, low: Var) -> Var:
    return qd.dequantize_per_channel.default(values, scales, ..., quant_min=low)


def _per_group(values: Var, scales: Var, low: Var, group: Var) -> Var:
    dequantize = qd.dequantize_per_channel_group.default
    rows = dequantize(values, scales, ..., quant_min=low, group_size=group)
    return maybe(aten.view.default)(rows, ...)


def _fp8_per_output(values: Var, scales: Var) -> Var:
    wide = to_copy(constant(_in_fp8(values)), ...)
    return maybe(to_copy)(wide * aten.view.default(scales, ...), ...)


_WEIGHT = Pattern(_per_output, _per_group, _fp8_per_output)


def weight(node: fx.Node) -> Weight | None:
    """Return what `place_weight` wrote, by the node that it returned; None for anything else."""
    match = _WEIGHT.match(node)
    if not match:
        return None
    number: Number = "fp8"
    if "low" in match.values:
        number = "int4" if match["low"] == LIMITS["int4"][0] else "int8"
    return Weight(node, number, match["values"], match["scales"], match.values.get("group"))


# Activations


def quantize(
    gm: fx.GraphModule, x: fx.Node, scaling: Scaling, *qparams: fx.Node, number: Number = "int8"
) -> fx.Node:
    """Insert, at the graph's insertion point, a quantized and dequantized `x`; return its node.

    Args:
        gm: Where.
        x: [..., features] for "rows".
        scaling: Where the scales come from.
        qparams: For "static", the float32 scale and, for int8, the int32 zero point: tensors of
            one element.
        number: "int8" or "fp8".
    """
    graph, dtype = gm.graph, x.meta["val"].dtype
    if number == "fp8":
        return _quantize_fp8(graph, x, scaling, qparams, dtype)
    limits: tuple[Any, ...] = (-128, 127, torch.int8)
    if scaling == "rows":
        wide = g.to_dtype(graph, x, torch.float32)
        scale = _row_scale(graph, wide, 127.0)
        limits = (scale, g.call(graph, aten.zeros_like.default, scale), *limits)
        q = g.call(graph, qd.quantize_per_token.default, wide, *limits)
        return g.call(graph, qd.dequantize_per_token.default, q, *limits, dtype)
    if scaling == "dynamic":
        wide = g.to_dtype(graph, x, torch.float32)
        both = g.call(graph, qd.choose_qparams.tensor, wide, -128, 127, EPS, torch.int8)
        types = (torch.float32, torch.int32)  # the operator returns float64 and int64
        items = [(g.call(graph, operator.getitem, both, i), t) for i, t in enumerate(types)]
        qparams = tuple(g.call(graph, to_copy, item, dtype=dtype) for item, dtype in items)
    limits = (*qparams, *limits)
    q = g.call(graph, qd.quantize_per_tensor.tensor, x, *limits)
    return g.call(graph, qd.dequantize_per_tensor.tensor, q, *limits, out_dtype=dtype)


def _quantize_fp8(
    graph: fx.Graph, x: fx.Node, scaling: Scaling, qparams: tuple[fx.Node, ...], dtype: torch.dtype
) -> fx.Node:
    wide = g.to_dtype(graph, x, torch.float32)
    if scaling == "rows":
        scale = _row_scale(graph, wide, FP8_MAX)
    elif scaling == "dynamic":
        most = g.call(graph, aten.amax.default, g.call(graph, aten.abs.default, wide))
        least = g.call(graph, aten.clamp_min.default, most, EPS * FP8_MAX)
        scale = g.call(graph, aten.div.Tensor, least, FP8_MAX)
    else:
        (scale,) = qparams
    scaled = g.call(graph, aten.div.Tensor, wide, scale)
    inside = g.call(graph, aten.clamp.default, scaled, -FP8_MAX, FP8_MAX)
    q = g.call(graph, to_copy, inside, dtype=FP8)
    back = g.call(graph, to_copy, q, dtype=torch.float32)
    product = g.call(graph, aten.mul.Tensor, back, scale)
    return g.call(graph, to_copy, product, dtype=dtype)


def _row_scale(graph: fx.Graph, x: fx.Node, high: float) -> fx.Node:
    most = g.call(graph, aten.amax.default, g.call(graph, aten.abs.default, x), [-1], True)
    least = g.call(graph, aten.clamp_min.default, most, EPS * high)
    return g.call(graph, aten.div.Tensor, least, high)


def rounded_rows(graph: fx.Graph, node: fx.Node, offset: int = 0) -> fx.Node:
    """Insert, in plain operators, the numbers of rows that `node` quantizes; return their node.

    With an `offset` they are that much higher, in uint8.
    """
    x, scale, _, low, high, dtype = args(node)
    inverse = g.call(graph, aten.reciprocal.default, scale)
    scaled = g.call(graph, aten.mul.Tensor, x, inverse)
    whole = g.call(graph, aten.round.default, scaled)
    inside = g.call(graph, aten.clamp.default, whole, low, high)
    if offset:
        inside, dtype = g.call(graph, aten.add.Tensor, inside, offset), torch.uint8
    return g.call(graph, to_copy, inside, dtype=dtype)


def _dequantized_rows(graph: fx.Graph, node: fx.Node) -> fx.Node:
    q, scale, *_, dtype = args(node)
    return g.to_dtype(graph, g.call(graph, aten.mul.Tensor, q, scale), dtype)


ROWS_IN_PLAIN_OPERATORS: dict[Any, Callable[[fx.Graph, fx.Node], fx.Node]] = {
    qd.quantize_per_token.default: rounded_rows,
    qd.dequantize_per_token.default: _dequantized_rows,
}
"""What inserts the same as an operator on rows, which Inductor has no code for."""


@dataclass(frozen=True, eq=False)
class Activation:
    """A quantized activation in a graph.

    Attributes:
        node: What the layer reads.
        source: What is quantized.
        quantized: The int8 or E4M3 values.
        scale: float32, one element, or [..., 1] where each row has its own.
        zero: The int32 zero point, one element; None where it is 0.
        number: "int8" or "fp8".
        rows: Whether each row has its own scale.
    """

    node: fx.Node
    source: fx.Node
    quantized: fx.Node
    scale: fx.Node
    zero: fx.Node | None
    number: Number
    rows: bool


def _per_tensor(source: Var, scale: Var, zero: Var) -> Var:
    q = named("quantized")(qd.quantize_per_tensor.tensor(source, scale, zero, ...))
    return qd.dequantize_per_tensor.tensor(q, scale, zero, ...)


def _per_row(source: Var, scale: Var) -> Var:
    wide = maybe(to_copy)(source, ..., dtype=torch.float32)
    q = named("quantized")(qd.quantize_per_token.default(wide, scale, ...))
    return qd.dequantize_per_token.default(q, scale, ...)


def _fp8(source: Var, scale: Var) -> Var:
    wide = maybe(to_copy)(source, ..., dtype=torch.float32)
    q = named("quantized")(to_copy(aten.clamp.default(wide / scale, ...), ..., dtype=FP8))
    return maybe(to_copy)(to_copy(q, ...) * scale, ...)


_ACTIVATION = Pattern(_per_tensor, _per_row, _fp8)


def activation(node: fx.Node) -> Activation | None:
    """Return what `quantize` wrote, by the node that it returned; None for anything else."""
    match = _ACTIVATION.match(node)
    if not match:
        return None
    source, q, scale = match["source"], match["quantized"], match["scale"]
    number: Number = "fp8" if match.function is _fp8 else "int8"
    rows = scale.meta["val"].numel() > 1 if number == "fp8" else match.function is _per_row
    return Activation(node, source, q, scale, match.values.get("zero"), number, rows)


# Layers


@dataclass(frozen=True, eq=False)
class Layer:
    """A matrix product or convolution with a weight.

    Attributes:
        node: The operator.
        x: What it reads, quantized or not.
        weight: Its weight, quantized or not: [out, in, …].
        bias: Its bias, [out].
        convolution: Whether it is one.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    convolution: bool


@Pattern
def _layer(x: Var, weight: Var, bias: Var) -> Var:
    return any_of(*_LAYERS)(x, weight, bias, ...)


def layer(node: fx.Node) -> Layer | None:
    """Return the layer that a node is; None if its weight is neither stored nor quantized."""
    match = _layer.match(node)
    if not match or (match["weight"].op != "get_attr" and weight(match["weight"]) is None):
        return None
    return Layer(node, **match.values, convolution=node.target is not aten.linear.default)


def layers(gm: fx.GraphModule) -> list[Layer]:
    """Return the layers of a body, in order."""
    candidates = (layer(node) for node in gm.graph.nodes if node.target in _LAYERS)
    return [candidate for candidate in candidates if candidate is not None]


def dequantizes_weight(node: fx.Node) -> bool:
    """Tell whether a node dequantizes a stored weight, which must not be evaluated beforehand."""
    is_part = is_call(
        node,
        qd.quantize_per_channel.default,
        qd.dequantize_per_channel.default,
        qd.dequantize_per_channel_group.default,
        torch.ops.diffopt.unpack_int4.default,
    )
    return is_part or weight(node) is not None


def is_fp8_scaling(node: fx.Node) -> bool:
    """Tell whether a node scales a value to E4M3 numbers or from them; these stay apart."""
    narrow = [m for n in node.users if is_call(n, aten.clamp.default) for m in n.users]
    near = [*node.all_input_nodes, *(m for n in node.all_input_nodes for m in n.all_input_nodes)]
    values = [n.meta["val"] for n in (*narrow, *near)]
    return any(isinstance(v, Tensor) and v.dtype == FP8 for v in values)
