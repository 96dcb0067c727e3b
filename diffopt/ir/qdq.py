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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor, fx

from diffopt.ir import graph as g
from diffopt.ir import qdq_vmap
from diffopt.ir.insert import cast, insert
from diffopt.ir.matcher import Pattern, Var, any_of, condition, constant, maybe, named
from diffopt.ir.nodes import argument, is_call
from diffopt.ir.op_sets import CONVOLUTIONS

aten = torch.ops.aten
qd = torch.ops.quantized_decomposed
to_copy = aten._to_copy.default
_dequantize_per_channel = qd.dequantize_per_channel.default

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
    values = g.get_attr(gm, f"{name}_{packed.number}", packed.values)
    scales = g.get_attr(gm, f"{name}_scales", packed.scales)
    inner = dtype if packed.wide is None else torch.float32
    weight: fx.Node = insert(gm.graph, _dequantized, values, scales, packed, inner)
    if packed.wide is not None:
        scales = g.get_attr(gm, f"{name}_wide_scales", packed.wide)
        weight = insert(gm.graph, _in_wide_int8, weight, scales, dtype)
    return weight


def _dequantized(values: Var, scales: Var, packed: Packed, dtype: torch.dtype) -> Var:
    scales, rank = cast(scales, torch.float32), len(packed.shape)
    if packed.number == "fp8":
        wide = cast(values, torch.float32)
        return to_copy(wide * aten.view.default(scales, [-1] + [1] * (rank - 1)), dtype=dtype)
    limits = (*LIMITS[packed.number], torch.int8)
    if packed.number == "int4":
        values = torch.ops.diffopt.unpack_int4.default(values, list(packed.shape))
    if packed.group is None:
        return _dequantize_per_channel(values, scales, None, 0, *limits, out_dtype=dtype)
    if rank != 2:
        values = aten.view.default(values, [packed.shape[0], -1])
    in_groups = qd.dequantize_per_channel_group.default
    weight = in_groups(values, scales, None, *limits, packed.group, dtype)
    return weight if rank == 2 else aten.view.default(weight, list(packed.shape))


def _in_wide_int8(weight: Var, scales: Var, dtype: torch.dtype) -> Var:
    limits = (0, *LIMITS["int8"], torch.int8)
    zeros = aten.zeros_like.default(scales)
    values = qd.quantize_per_channel.default(weight, scales, zeros, *limits)
    return _dequantize_per_channel(values, scales, None, *limits, out_dtype=dtype)


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
    return _dequantize_per_channel(values, scales, ..., quant_min=low)


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
    write = _through_fp8 if number == "fp8" else _through_int8
    node: fx.Node = insert(gm.graph, write, x, scaling, *qparams)
    return node


def _through_int8(x: Var, scaling: Scaling, *qparams: Var) -> Var:
    dtype, limits = x.dtype, (-128, 127, torch.int8)
    if scaling == "rows":
        wide = cast(x, torch.float32)
        scale = _row_scale(wide, 127.0)
        zeros = aten.zeros_like.default(scale)
        q = qd.quantize_per_token.default(wide, scale, zeros, *limits)
        return qd.dequantize_per_token.default(q, scale, zeros, *limits, dtype)
    if scaling == "dynamic":
        wide = cast(x, torch.float32)
        both = qd.choose_qparams.tensor(wide, -128, 127, EPS, torch.int8)
        scale, zero = both[0], both[1]  # in float64 and int64
        qparams = to_copy(scale, dtype=torch.float32), to_copy(zero, dtype=torch.int32)
    q = qd.quantize_per_tensor.tensor(x, *qparams, *limits)
    return qd.dequantize_per_tensor.tensor(q, *qparams, *limits, out_dtype=dtype)


def _through_fp8(x: Var, scaling: Scaling, scale: Var = None) -> Var:
    wide = cast(x, torch.float32)
    if scaling == "rows":
        scale = _row_scale(wide, FP8_MAX)
    elif scaling == "dynamic":
        most = aten.amax.default(aten.abs.default(wide))
        scale = aten.clamp_min.default(most, EPS * FP8_MAX) / FP8_MAX
    q = to_copy(aten.clamp.default(wide / scale, -FP8_MAX, FP8_MAX), dtype=FP8)
    return to_copy(to_copy(q, dtype=torch.float32) * scale, dtype=x.dtype)


def _row_scale(x: Var, high: float) -> Var:
    most = aten.amax.default(aten.abs.default(x), [-1], True)
    return aten.clamp_min.default(most, EPS * high) / high


def rounded_rows(node: Var, offset: int = 0) -> Var:
    """Return, by plain operators, the numbers of rows that `node` quantizes.

    With an `offset` they are that much higher, in uint8.
    """
    x, scale, _, low, high, dtype = node.args
    whole = aten.round.default(x * aten.reciprocal.default(scale))
    inside = aten.clamp.default(whole, low, high)
    return to_copy(inside + offset, dtype=torch.uint8) if offset else to_copy(inside, dtype=dtype)


def _dequantized_rows(node: Var) -> Var:
    q, scale, *_, dtype = node.args
    return cast(q * scale, dtype)


ROWS_IN_PLAIN_OPERATORS: dict[Any, Callable[[Var], Var]] = {
    qd.quantize_per_token.default: rounded_rows,
    qd.dequantize_per_token.default: _dequantized_rows,
}
"""What computes the same as an operator on rows, which Inductor has no code for."""


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

    @property
    def groups(self) -> int:
        """The number of groups of a convolution; 1 for a linear layer."""
        return int(argument(self.node, 6, "groups", 1)) if self.convolution else 1


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
