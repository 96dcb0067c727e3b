"""Quantized values in a graph: how they are written, and how they are found again.

A layer (a linear or a convolution) stays the operator that it was; what it reads is quantized and
dequantized in front of it, in torch's own `quantized_decomposed` operators:

    %q: int8[4,8] = quantized_decomposed.quantize_per_tensor.tensor(%x, %scale, %zero, -128, 127, …)
    %d: float32[4,8] = quantized_decomposed.dequantize_per_tensor.tensor(%q, %scale, %zero, …)
    %w: float32[16,8] = quantized_decomposed.dequantize_per_channel(%values, %scales, None, 0, …)
    %y: float32[4,16] = aten.linear(%d, %w, %bias)

Every target computes that as it stands; one with kernels for integers finds the pattern (`layers`,
`weight`, `activation`) and takes these. Weights are stored as `Packed` is, those of 4 bits two in a
byte. Activations are quantized with a scale and a zero point for the whole tensor, which are
constants of the body, arguments of it (one row of a table for each step) or computed from the
tensor; or with a scale for each row (token). E4M3 floats are scaled, clamped and cast.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor, fx

from diffopt.ir import graph as g
from diffopt.ir import qdq_vmap
from diffopt.ir.nodes import args, argument, is_call

aten = torch.ops.aten
qd = torch.ops.quantized_decomposed

Number = Literal["int8", "int4", "fp8"]
"""The format of stored numbers."""

Scaling = Literal["static", "dynamic", "rows"]
"""Where an activation's scales come from: calibration, the tensor, or each of its rows."""

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max

LIMITS: dict[Number, tuple[int, int]] = {"int8": (-127, 127), "int4": (-8, 7)}
"""Of weights. Activations of 8 bits have -128 as well."""

_LAYERS = {
    aten.linear.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
}
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
        wide: Scales [out] with which the weight is rounded again, to int8: kernels for integers
            take one scale for each output, and to int8 the finer ones of a group hardly matter.
    """

    number: Number
    values: Tensor
    scales: Tensor
    shape: tuple[int, ...]
    group: int | None = None
    wide: Tensor | None = None

    @staticmethod
    def of(number: Number, values: Tensor, scales: Tensor, group: int | None = None) -> Packed:
        """Return whole (or E4M3) numbers in the shape of the weight as they are stored."""
        kept = pack_int4(values) if number == "int4" else values.contiguous()
        return Packed(number, kept, scales, tuple(values.shape), group)

    @property
    def bytes(self) -> int:
        """How much memory it takes."""
        return self.values.nbytes + self.scales.nbytes


def place_weight(gm: fx.GraphModule, name: str, packed: Packed, dtype: torch.dtype) -> fx.Node:
    """Insert, at the graph's insertion point, a weight in `dtype`; return its node."""
    graph = gm.graph
    values = g.get_attr(gm, f"{name}_{packed.number}", packed.values)
    scales = g.get_attr(gm, f"{name}_scales", packed.scales)
    if packed.scales.dtype != torch.float32:
        scales = g.call(graph, aten._to_copy.default, scales, dtype=torch.float32)
    if packed.number == "fp8":
        wide = g.call(graph, aten._to_copy.default, values, dtype=torch.float32)
        rows = [-1] + [1] * (len(packed.shape) - 1)
        scales = g.call(graph, aten.view.default, scales, rows)
        product = g.call(graph, aten.mul.Tensor, wide, scales)
        return g.call(graph, aten._to_copy.default, product, dtype=dtype)
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


def weight(node: fx.Node) -> Weight | None:
    """Return what `place_weight` wrote, by the node that it returned; None for anything else."""
    inner = node
    if is_call(node, aten.view.default):
        inner = args(node)[0]
    if is_call(inner, qd.dequantize_per_channel_group.default):
        values, scales, group = args(inner)[0], args(inner)[1], args(inner)[6]
        return Weight(node, _integers(inner, 3), values, scales, group)
    if is_call(node, qd.dequantize_per_channel.default):
        return Weight(node, _integers(node, 5), args(node)[0], args(node)[1], None)
    product = args(node)[0] if is_call(node, aten._to_copy.default) else node
    if not is_call(product, aten.mul.Tensor):
        return None
    wide, rows = args(product)[:2]
    if not is_call(wide, aten._to_copy.default) or not is_call(rows, aten.view.default):
        return None
    values = args(wide)[0]
    if values.op != "get_attr" or values.meta["val"].dtype != FP8:
        return None
    return Weight(node, "fp8", values, args(rows)[0], None)


def _integers(node: fx.Node, at: int) -> Number:
    return "int4" if args(node)[at] == LIMITS["int4"][1] or args(node)[at] == -8 else "int8"


# Activations


def quantize(
    gm: fx.GraphModule, x: fx.Node, scaling: Scaling, *given: fx.Node, number: Number = "int8"
) -> fx.Node:
    """Insert, at the graph's insertion point, a quantized and dequantized `x`; return its node.

    Args:
        gm: Where.
        x: [..., features] for "rows".
        scaling: Where the scales come from.
        given: For "static", the float32 scale and, for int8, the int32 zero point: tensors of one
            element.
        number: "int8" or "fp8".
    """
    graph, dtype = gm.graph, x.meta["val"].dtype
    if number == "fp8":
        return _quantize_fp8(graph, x, scaling, given, dtype)
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
        found = [g.call(graph, operator.getitem, both, i) for i in (0, 1)]
        types = (torch.float32, torch.int32)  # the operator has float64 and int64
        pairs = zip(found, types, strict=True)
        given = tuple(g.call(graph, aten._to_copy.default, n, dtype=t) for n, t in pairs)
    limits = (*given, *limits)
    q = g.call(graph, qd.quantize_per_tensor.tensor, x, *limits)
    return g.call(graph, qd.dequantize_per_tensor.tensor, q, *limits, out_dtype=dtype)


def _quantize_fp8(
    graph: fx.Graph, x: fx.Node, scaling: Scaling, given: tuple[fx.Node, ...], dtype: torch.dtype
) -> fx.Node:
    wide = g.to_dtype(graph, x, torch.float32)
    if scaling == "rows":
        scale = _row_scale(graph, wide, FP8_MAX)
    elif scaling == "dynamic":
        most = g.call(graph, aten.amax.default, g.call(graph, aten.abs.default, wide))
        least = g.call(graph, aten.clamp_min.default, most, EPS * FP8_MAX)
        scale = g.call(graph, aten.div.Tensor, least, FP8_MAX)
    else:
        (scale,) = given
    scaled = g.call(graph, aten.div.Tensor, wide, scale)
    inside = g.call(graph, aten.clamp.default, scaled, -FP8_MAX, FP8_MAX)
    q = g.call(graph, aten._to_copy.default, inside, dtype=FP8)
    back = g.call(graph, aten._to_copy.default, q, dtype=torch.float32)
    product = g.call(graph, aten.mul.Tensor, back, scale)
    return g.call(graph, aten._to_copy.default, product, dtype=dtype)


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
    return g.call(graph, aten._to_copy.default, inside, dtype=dtype)


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


def activation(node: fx.Node) -> Activation | None:
    """Return what `quantize` wrote, by the node that it returned; None for anything else."""
    if is_call(node, qd.dequantize_per_tensor.tensor):
        q, scale, zero = args(node)[:3]
        if not is_call(q, qd.quantize_per_tensor.tensor) or args(q)[1:3] != (scale, zero):
            return None
        return Activation(node, args(q)[0], q, scale, zero, "int8", False)
    if is_call(node, qd.dequantize_per_token.default):
        q, scale = args(node)[:2]
        if not is_call(q, qd.quantize_per_token.default) or args(q)[1] is not scale:
            return None
        return Activation(node, _narrow(args(q)[0]), q, scale, None, "int8", True)
    product = args(node)[0] if is_call(node, aten._to_copy.default) else node
    if not is_call(product, aten.mul.Tensor):
        return None
    back, scale = args(product)[:2]
    q = args(back)[0] if is_call(back, aten._to_copy.default) else back
    if not is_call(q, aten._to_copy.default) or q.meta["val"].dtype != FP8:
        return None
    clamped = args(q)[0]
    if not is_call(clamped, aten.clamp.default) or not is_call(args(clamped)[0], aten.div.Tensor):
        return None
    source, by = args(args(clamped)[0])[:2]
    if by is not scale:
        return None
    return Activation(node, _narrow(source), q, scale, None, "fp8", scale.meta["val"].numel() > 1)


def _narrow(x: fx.Node) -> fx.Node:
    """Return what was widened to float32 to be quantized."""
    is_cast = is_call(x, aten._to_copy.default) and x.meta["val"].dtype == torch.float32
    return args(x)[0] if is_cast else x


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


def layer(node: fx.Node) -> Layer | None:
    """Return the layer that a node is; None if its weight is neither stored nor quantized."""
    if not is_call(node, *_LAYERS):
        return None
    x, w, bias = args(node)[0], args(node)[1], argument(node, 2, "bias")
    if w.op != "get_attr" and weight(w) is None:
        return None
    return Layer(node, x, w, bias, node.target is not aten.linear.default)


def layers(gm: fx.GraphModule) -> list[Layer]:
    """Return the layers of a body, in order."""
    found = (layer(node) for node in gm.graph.nodes)
    return [own for own in found if own is not None]


def is_stored_small(node: fx.Node) -> bool:
    """Tell whether a node widens stored numbers: what nobody may evaluate ahead of time."""
    widens = is_call(
        node,
        qd.quantize_per_channel.default,
        qd.dequantize_per_channel.default,
        qd.dequantize_per_channel_group.default,
        torch.ops.diffopt.unpack_int4.default,
    )
    return widens or weight(node) is not None


def is_fp8_scaling(node: fx.Node) -> bool:
    """Tell whether a node scales a value to E4M3 numbers or from them; these stay apart."""
    narrow = [m for n in node.users if is_call(n, aten.clamp.default) for m in n.users]
    near = [*node.all_input_nodes, *(m for n in node.all_input_nodes for m in n.all_input_nodes)]
    values = [n.meta["val"] for n in (*narrow, *near)]
    return any(isinstance(v, Tensor) and v.dtype == FP8 for v in values)
