"""ONNX forms of operators that torch's exporter has none for, or none that compilers fuse.

Functions of ONNX Script: their arguments with a tensor type are inputs, the others attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import onnxscript
import torch

from diffopt.lowering.onnx import prepare

aten = torch.ops.aten
qd = torch.ops.quantized_decomposed

FLOAT, BOOL, FLOAT8E4M3FN, INT64, DOUBLE = 1, 9, 17, 7, 11

opset18: Any = onnxscript.opset18
opset21: Any = onnxscript.opset21

if TYPE_CHECKING:
    Value = Any
else:  # the exporter takes arguments with this annotation for inputs
    from onnxscript.onnx_types import TensorType as Value


def table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the forms by operator."""
    prepared = torch.ops.diffopt
    assert prepare.quantize_fp8
    return {
        aten.amax.default: _amax,
        aten.amin.default: _amin,
        aten.squeeze.dim: _squeeze,
        aten.squeeze.dims: _squeeze_many,
        aten.split.Tensor: _split,
        aten.split_with_sizes.default: _split_with_sizes,
        aten.scaled_dot_product_attention.default: _attention,
        qd.quantize_per_tensor.tensor: _quantize_per_tensor,
        qd.dequantize_per_tensor.tensor: _dequantize_per_tensor,
        qd.quantize_per_token.default: _quantize_per_token,
        qd.dequantize_per_token.default: _dequantize_per_token,
        qd.choose_qparams.tensor: _choose_qparams,
        qd.quantize_per_channel.default: _quantize_per_channel,
        qd.dequantize_per_channel.default: _dequantize_per_channel,
        qd.dequantize_per_channel_group.default: _dequantize_per_channel_group,
        prepared.quantize_fp8.default: _quantize_fp8,
        prepared.dequantize_fp8.default: _dequantize_fp8,
    }


def _constant(value: Any, dtype: Any) -> Any:
    return opset18.Constant(value=ir.tensor(value, dtype=ir.DataType(dtype)))


def _as(x: Any, dtype: int) -> Any:
    return x if x.dtype == dtype else opset18.Cast(x, to=dtype)


# Gaps


def _amax(self: Value, dim: Sequence[int] = (), keepdim: bool = False) -> Any:
    return opset18.ReduceMax(self, *_axes(dim), keepdims=int(keepdim))


def _amin(self: Value, dim: Sequence[int] = (), keepdim: bool = False) -> Any:
    return opset18.ReduceMin(self, *_axes(dim), keepdims=int(keepdim))


def _axes(dim: Sequence[int] | None) -> list[Any]:
    """Return the axes as an input; none stand for all."""
    return [_constant(list(dim), INT64)] if dim else []


def _squeeze(self: Value, dim: int) -> Any:
    return _squeeze_many(self, [dim])


def _squeeze_many(self: Value, dim: Sequence[int]) -> Any:
    """Drop axes of size one; others stay, which torch allows and ONNX does not."""
    ones = [axis for axis in dim if self.shape is None or self.shape[axis] == 1]
    return opset18.Squeeze(self, _constant(ones, INT64)) if ones else opset18.Identity(self)


# Cutting


def _split(self: Value, split_size: int, dim: int = 0) -> Any:
    size = int(self.shape[dim])
    sizes = [split_size] * (size // split_size)
    return _pieces(self, [*sizes, size % split_size] if size % split_size else sizes, dim)


def _split_with_sizes(self: Value, split_sizes: Sequence[int], dim: int = 0) -> Any:
    return _pieces(self, list(split_sizes), dim)


def _pieces(x: Any, sizes: list[int], dim: int) -> Any:
    """Return pieces, without the sequences that the exporter makes and few compilers know."""
    if len(sizes) == 1:
        return (opset18.Identity(x),)
    if len(set(sizes)) == 1:
        return opset18.Split(x, axis=dim, num_outputs=len(sizes))
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return tuple(
        opset18.Slice(
            x, _constant([end - size], INT64), _constant([end], INT64), _constant([dim], INT64)
        )
        for size, end in zip(sizes, ends, strict=True)
    )


# Attention


def _attention(
    query: Value,
    key: Value,
    value: Value,
    attn_mask: Value | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Write attention out in the fewest operators; compilers look for this form."""
    dtype, rank = query.dtype, len(query.shape)
    factor = float(query.shape[-1]) ** -0.5 if scale is None else scale
    turned = opset18.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2])
    scores = opset18.MatMul(opset18.Mul(query, _constant(factor, dtype)), turned)
    if attn_mask is None:
        return opset18.MatMul(opset18.Softmax(scores, axis=-1), value)
    if attn_mask.dtype != BOOL:
        scores = opset18.Add(scores, attn_mask)
        return opset18.MatMul(opset18.Softmax(scores, axis=-1), value)
    least = _constant(float("-inf"), dtype)
    weights = opset18.Softmax(opset18.Where(attn_mask, scores, least), axis=-1)
    # A row that may look at nothing is 0, and not 0/0.
    weights = opset18.Where(attn_mask, weights, _constant(0.0, dtype))
    return opset18.MatMul(weights, value)


# Quantized values


def _scalar(x: Any) -> Any:
    return (
        x if x.shape is not None and len(x.shape) == 0 else opset18.Reshape(x, _constant([], INT64))
    )


def _quantize_per_tensor(
    input: Value,
    scale: Value,
    zero_point: Value,
    quant_min: int,
    quant_max: int,
    dtype: int,
) -> Any:
    zero = opset18.Cast(_scalar(zero_point), to=dtype)
    return opset21.QuantizeLinear(_as(input, FLOAT), _scalar(scale), zero)


def _dequantize_per_tensor(
    input: Value,
    scale: Value,
    zero_point: Value,
    quant_min: int,
    quant_max: int,
    dtype: int,
    out_dtype: int = -1,
) -> Any:
    zero = opset18.Cast(_scalar(zero_point), to=dtype)
    return _out(opset21.DequantizeLinear(input, _scalar(scale), zero), out_dtype)


def _out(x: Any, dtype: int | None) -> Any:
    return x if dtype in (None, -1, FLOAT) else opset18.Cast(x, to=dtype)


def _quantize_per_token(
    input: Value,
    scales: Value,
    zero_points: Value,
    quant_min: int,
    quant_max: int,
    dtype: int,
) -> Any:
    """Write it out: QuantizeLinear has no scale for each row. Rows have no zero point here."""
    scaled = opset18.Round(opset18.Div(_as(input, FLOAT), scales))
    least, most = _constant(float(quant_min), FLOAT), _constant(float(quant_max), FLOAT)
    return opset18.Cast(opset18.Clip(scaled, least, most), to=dtype)


def _dequantize_per_token(
    input: Value,
    scales: Value,
    zero_points: Value,
    quant_min: int,
    quant_max: int,
    dtype: int,
    output_dtype: int = FLOAT,
) -> Any:
    return _out(opset18.Mul(opset18.Cast(input, to=FLOAT), scales), output_dtype)


def _choose_qparams(input: Value, quant_min: int, quant_max: int, eps: float, dtype: int) -> Any:
    """Return the scale and zero point of what has the range of a tensor, as float64 and int64."""
    zero = _constant(0.0, FLOAT)
    wide = _as(input, FLOAT)
    least = opset18.Min(opset18.ReduceMin(wide, keepdims=0), zero)
    most = opset18.Max(opset18.ReduceMax(wide, keepdims=0), zero)
    steps = _constant(float(quant_max - quant_min), FLOAT)
    scale = opset18.Max(opset18.Div(opset18.Sub(most, least), steps), _constant(eps, FLOAT))
    first = opset18.Round(opset18.Div(least, scale))
    point = opset18.Sub(_constant(float(quant_min), FLOAT), first)
    limits = _constant(float(quant_min), FLOAT), _constant(float(quant_max), FLOAT)
    point = opset18.Clip(point, *limits)
    one = _constant([1], INT64)
    scale, point = opset18.Reshape(scale, one), opset18.Reshape(point, one)
    return opset18.Cast(scale, to=DOUBLE), opset18.Cast(point, to=INT64)


def _quantize_per_channel(
    input: Value,
    scales: Value,
    zero_points: Value,
    axis: int,
    quant_min: int,
    quant_max: int,
    dtype: int,
) -> Any:
    """Leave the limits out: the scales of weights are such that none is beyond them."""
    zeros = opset18.Cast(zero_points, to=dtype)
    return opset21.QuantizeLinear(_as(input, FLOAT), scales, zeros, axis=axis)


def _dequantize_per_channel(
    input: Value,
    scales: Value,
    zero_points: Value | None,
    axis: int,
    quant_min: int,
    quant_max: int,
    dtype: int,
    out_dtype: int = -1,
) -> Any:
    zeros = None if zero_points is None else opset18.Cast(zero_points, to=dtype)
    return _out(opset21.DequantizeLinear(input, scales, zeros, axis=axis), out_dtype)


def _dequantize_per_channel_group(
    w_int8: Value,
    scales: Value,
    zero_points: Value | None,
    quant_min: int,
    quant_max: int,
    dtype: int,
    group_size: int,
    output_dtype: int = FLOAT,
) -> Any:
    made = opset21.DequantizeLinear(w_int8, scales, axis=1, block_size=group_size)
    return _out(made, output_dtype)


def _quantize_fp8(x: Value, scale: Value) -> Any:
    zero = _constant(0.0, FLOAT8E4M3FN)
    return opset21.QuantizeLinear(_as(x, FLOAT), _scalar(scale), zero)


def _dequantize_fp8(values: Value, scale: Value, dtype: int) -> Any:
    axis = {} if len(scale.shape) == 0 else {"axis": 0}
    return _out(opset21.DequantizeLinear(values, scale, **axis), dtype)
