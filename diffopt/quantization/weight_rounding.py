"""Round weights to few bits: w ≈ s * q with a scale s for each output channel or group of inputs.

Scales are symmetric, float32 for each output channel or float16 for each group of inputs along the
flattened rest of it. With "max" no weight is clipped by more than half a step; with "mse" each
channel or group has the scale of least squared error on a grid of smaller ranges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, fx

from diffopt.errors import DiffoptError
from diffopt.ir import graph as g
from diffopt.ir import qdq
from diffopt.ir.nodes import args

qd = torch.ops.quantized_decomposed

Scale = Literal["max", "mse"]

_CACHED = 2**17  # float32 numbers that a core's cache holds, with a copy of them
_RATIOS = torch.linspace(1.0, 0.4, 31).tolist()  # of the largest range: the grid of "mse"


@dataclass(frozen=True)
class WeightFormat:
    """How a weight is rounded: the arguments of `quantize_weight`."""

    number: qdq.Number = "int8"
    group: int | None = None
    scale: Scale = "max"

    def quantize(self, weight: Tensor) -> qdq.Packed:
        """Return a weight [out, in, …] rounded to the nearest numbers."""
        return quantize_weight(weight, self.number, self.group, self.scale)


def quantize_weight(
    weight: Tensor, number: qdq.Number, group: int | None = None, scale: Scale = "max"
) -> qdq.Packed:
    """Return a weight [out, in, …] rounded to the nearest numbers.

    Args:
        weight: Of any floating-point type.
        number: The format.
        group: How many weights in a row share a scale; None: all of an output.
        scale: How the scales are chosen.

    Raises:
        DiffoptError: A weight is not finite, or groups do not divide an output's weights.
    """
    rows = _rows(weight, number, group)
    scales = _max_scales(rows, number, group)
    if scale == "mse":
        scales = _best_scales(rows, number, scales)
    values = round_to(rows / scales.float(), number).reshape(weight.shape)
    shape = (len(weight),) if group is None else (len(weight), -1)
    return qdq.Packed.of(number, values, scales.reshape(shape), group)


def dequantized(packed: qdq.Packed) -> Tensor:
    """Return the float32 weight that stored numbers stand for."""
    weight = stored_numbers(packed).float() * broadcast_scales(packed)
    if packed.wide is None:
        return weight
    wide = packed.wide.reshape(-1, *[1] * (weight.dim() - 1))
    return round_to(weight / wide, "int8").float() * wide


def rounded_to_int8(packed: qdq.Packed) -> qdq.Packed:
    """Round a weight to int8 again, with one scale for each output, for integer kernels."""
    most = dequantized(packed).flatten(1).abs().amax(1)
    return replace(packed, wide=most.clamp_min(qdq.EPS) / qdq.LIMITS["int8"][1])


def stored_numbers(packed: qdq.Packed) -> Tensor:
    """Return stored numbers in the weight's shape, int8 or E4M3."""
    if packed.number == "int4":
        values: Tensor = qdq.unpack_int4(packed.values, list(packed.shape))
        return values
    return packed.values


def broadcast_scales(packed: qdq.Packed) -> Tensor:
    """Return the float32 scale of every weight, in a shape that broadcasts with the weight."""
    scales = packed.scales.float()
    if packed.group is None:
        return scales.reshape(-1, *[1] * (len(packed.shape) - 1))
    return scales.repeat_interleave(packed.group, 1).reshape(packed.shape)


def stored_weight(node: fx.Node) -> qdq.Weight | None:
    """Return a quantized weight as stored: without the second rounding to int8, if there is one."""
    weight = qdq.weight(node)
    if weight is None or weight.values.target is not qd.quantize_per_channel.default:
        return weight
    return qdq.weight(args(weight.values)[0])


def stored_name(node: fx.Node) -> str:
    """Return the name of the stored tensor that a chain of operators widens."""
    while node.op != "get_attr":
        node = node.all_input_nodes[0]
    return str(node.target)


def packed_weight(gm: fx.GraphModule, weight: qdq.Weight, shape: Sequence[int]) -> qdq.Packed:
    """Return the stored numbers and scales of a quantized weight of this shape."""
    values, scales = (g.attribute(gm, stored_name(n)) for n in (weight.values, weight.scales))
    return qdq.Packed(weight.number, values, scales, tuple(shape), weight.group)


def round_to(scaled: Tensor, number: qdq.Number) -> Tensor:
    """Round weights that were divided by their scale to the nearest numbers of a format."""
    if number == "fp8":
        return scaled.clamp(-qdq.FP8_MAX, qdq.FP8_MAX).to(qdq.FP8)
    return scaled.round().clamp(*qdq.LIMITS[number]).to(torch.int8)


def _rows(weight: Tensor, number: qdq.Number, group: int | None) -> Tensor:
    """Return the weights as [rows, n], with one scale for each row."""
    length = weight[0].numel()
    if not bool(weight.isfinite().all()):
        raise DiffoptError("a weight has values that are not finite, so it has no scale")
    if group is None:
        return weight.detach().float().reshape(len(weight), length)
    if number == "fp8":
        raise DiffoptError("fp8 weights have one scale for each output: leave the group out")
    if group < 1 or length % group:
        raise DiffoptError(
            f"an output's {length} weights are not whole groups of {group}: take a group that "
            f"divides them, such as {_divisor(length, group)}"
        )
    return weight.detach().float().reshape(-1, group)


def _divisor(length: int, most: int) -> int:
    return next(d for d in range(max(1, min(most, length)), 0, -1) if length % d == 0)


def _max_scales(rows: Tensor, number: qdq.Number, group: int | None) -> Tensor:
    """Return the scales with which the largest weight is the largest number: [rows, 1]."""
    low, high = qdq.LIMITS.get(number, (-qdq.FP8_MAX, qdq.FP8_MAX))
    # Of 4 bits the range is half a step more than the largest number: it is rounded like others.
    scales = rows.abs().amax(1, keepdim=True) / ((high - low) / 2)
    return _stored(scales, torch.float32 if group is None else torch.float16)


def _stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    return scales.clamp(qdq.EPS, torch.finfo(dtype).max).to(dtype)


def _best_scales(rows: Tensor, number: qdq.Number, most: Tensor) -> Tensor:
    """Return the scales of least squared error |s q(w / s) - w|^2 on a grid below `most`."""
    # Some rows at a time, which stay in the processor's cache for all scales that are tried.
    count = max(1, _CACHED // max(1, rows.shape[1]))
    blocks = zip(torch.split(rows, count), torch.split(most, count), strict=True)
    return torch.cat([_best_of_block(block, number, scales) for block, scales in blocks])


def _best_of_block(rows: Tensor, number: qdq.Number, most: Tensor) -> Tensor:
    best, least = most, torch.full_like(most, torch.inf, dtype=torch.float32)
    scaled = torch.empty_like(rows)
    for ratio in _RATIOS:
        scales = _stored(most.float() * ratio, most.dtype)
        wide = scales.float()
        torch.div(rows, wide, out=scaled)
        if number == "fp8":
            scaled.copy_(round_to(scaled, number))
        else:
            scaled.round_().clamp_(*qdq.LIMITS[number])
        error = scaled.mul_(wide).sub_(rows).square_().sum(1, keepdim=True)
        best = torch.where(error < least, scales, best)
        least = torch.minimum(error, least)
    return best
