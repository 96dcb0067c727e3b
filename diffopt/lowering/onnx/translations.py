"""ONNX translations of operators that torch lacks, or writes in forms that few compilers fuse.

A translation gets the arguments of a call under the names in the operator's schema, and returns
what ONNX Script's operators return.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import onnxscript
import torch
from onnxscript.onnx_types import TensorType

from diffopt.lowering.onnx import prepare

aten = torch.ops.aten
qd = torch.ops.quantized_decomposed

FLOAT, BOOL, FLOAT8E4M3FN, INT64, DOUBLE = 1, 9, 17, 7, 11

opset18: Any = onnxscript.opset18
opset21: Any = onnxscript.opset21

Call = SimpleNamespace
"""The arguments of a call by name: tensors are values of the model, all else is constant."""


def table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the translations by operator, as `torch.onnx.export` takes them."""
    prepared = torch.ops.diffopt
    assert prepare.quantize_fp8
    translations = {
        aten.amax.default: _amax,
        aten.amin.default: _amin,
        aten.clamp.Tensor: _clamp_to_tensors,
        aten.squeeze.dim: lambda call: _squeeze(call.self, [call.dim]),
        aten.squeeze.dims: lambda call: _squeeze(call.self, call.dim),
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
    return {op: _with_schema(op, translate) for op, translate in translations.items()}


def _with_schema(op: Any, translate: Callable[[Call], Any]) -> Callable[..., Any]:
    """Return a translation with the parameters of an operator's schema.

    The exporter reads a function's signature: parameters annotated as tensors are inputs, the
    others are attributes.
    """
    signature = inspect.Signature([_parameter(argument) for argument in op._schema.arguments])

    def translation(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return translate(Call(**bound.arguments))

    translation.__signature__ = signature  # type: ignore[attr-defined]
    translation.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    return translation


def _parameter(argument: torch.Argument) -> inspect.Parameter:
    kind = str(argument.type).removeprefix("Optional[").rstrip("]")
    types: dict[str, Any] = {"Tensor": TensorType, "int": int, "float": float, "bool": bool}
    return inspect.Parameter(
        argument.name,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=argument.default_value if argument.has_default_value() else inspect._empty,
        annotation=types.get(kind, Sequence[int]),
    )


def _constant(value: Any, dtype: Any) -> Any:
    return opset18.Constant(value=ir.tensor(value, dtype=ir.DataType(dtype)))


def _cast(x: Any, dtype: int | None) -> Any:
    return x if dtype is None or x.dtype == dtype else opset18.Cast(x, to=dtype)


# Reductions and shapes


def _amax(call: Call) -> Any:
    return opset18.ReduceMax(call.self, *_axes(call.dim), keepdims=int(call.keepdim))


def _amin(call: Call) -> Any:
    return opset18.ReduceMin(call.self, *_axes(call.dim), keepdims=int(call.keepdim))


def _clamp_to_tensors(call: Call) -> Any:
    """Clamp by two tensors of any shapes that broadcast; ONNX's Clip takes scalars alone."""
    result = call.self
    if call.min is not None:
        result = opset18.Max(result, call.min)
    return result if call.max is None else opset18.Min(result, call.max)


def _axes(dim: Sequence[int] | None) -> list[Any]:
    """Return the axes as an input; without it, ONNX reduces all."""
    return [_constant(list(dim), INT64)] if dim else []


def _squeeze(x: Any, dim: Sequence[int]) -> Any:
    """Drop axes of size one; torch ignores others in `dim`, which ONNX refuses."""
    ones = [axis for axis in dim if x.shape is None or x.shape[axis] == 1]
    return opset18.Squeeze(x, _constant(ones, INT64)) if ones else opset18.Identity(x)


def _split(call: Call) -> Any:
    size, length = int(call.self.shape[call.dim]), call.split_size
    rest = [size % length] if size % length else []
    return _pieces(call.self, [length] * (size // length) + rest, call.dim)


def _split_with_sizes(call: Call) -> Any:
    return _pieces(call.self, list(call.split_sizes), call.dim)


def _pieces(x: Any, sizes: list[int], dim: int) -> Any:
    """Return pieces without the sequence types of torch's translation, which few compilers have."""
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


def _attention(call: Call) -> Any:
    """Decompose attention into MatMul, Softmax, MatMul: the pattern that compilers fuse."""
    dtype, rank = call.query.dtype, len(call.query.shape)
    scale = float(call.query.shape[-1]) ** -0.5 if call.scale is None else call.scale
    transposed = opset18.Transpose(call.key, perm=[*range(rank - 2), rank - 1, rank - 2])
    scores = opset18.MatMul(opset18.Mul(call.query, _constant(scale, dtype)), transposed)
    mask = call.attn_mask
    if mask is None:
        return opset18.MatMul(opset18.Softmax(scores, axis=-1), call.value)
    if mask.dtype != BOOL:
        scores = opset18.Add(scores, mask)
        return opset18.MatMul(opset18.Softmax(scores, axis=-1), call.value)
    minus_infinity = _constant(float("-inf"), dtype)
    weights = opset18.Softmax(opset18.Where(mask, scores, minus_infinity), axis=-1)
    # A row whose mask is false everywhere is 0 in torch, and 0/0 here.
    weights = opset18.Where(mask, weights, _constant(0.0, dtype))
    return opset18.MatMul(weights, call.value)


# Quantized values


def _scalar(x: Any) -> Any:
    is_scalar = x.shape is not None and len(x.shape) == 0
    return x if is_scalar else opset18.Reshape(x, _constant([], INT64))


def _quantize_per_tensor(call: Call) -> Any:
    zero = opset18.Cast(_scalar(call.zero_point), to=call.dtype)
    return opset21.QuantizeLinear(_cast(call.input, FLOAT), _scalar(call.scale), zero)


def _dequantize_per_tensor(call: Call) -> Any:
    zero = opset18.Cast(_scalar(call.zero_point), to=call.dtype)
    wide = opset21.DequantizeLinear(call.input, _scalar(call.scale), zero)
    return _from_float(wide, call.out_dtype)


def _from_float(x: Any, dtype: int | None) -> Any:
    return x if dtype in (None, -1, FLOAT) else opset18.Cast(x, to=dtype)


def _quantize_per_token(call: Call) -> Any:
    """Decompose it: QuantizeLinear has no scale for each row. Zero points are 0 here."""
    scaled = opset18.Round(opset18.Div(_cast(call.input, FLOAT), call.scales))
    low, high = (_constant(float(limit), FLOAT) for limit in (call.quant_min, call.quant_max))
    return opset18.Cast(opset18.Clip(scaled, low, high), to=call.dtype)


def _dequantize_per_token(call: Call) -> Any:
    wide = opset18.Mul(opset18.Cast(call.input, to=FLOAT), call.scales)
    return _from_float(wide, call.output_dtype)


def _choose_qparams(call: Call) -> Any:
    """Return scale and zero point of a tensor's range, as float64[1] and int64[1]."""
    zero = _constant(0.0, FLOAT)
    wide = _cast(call.input, FLOAT)
    low = opset18.Min(opset18.ReduceMin(wide, keepdims=0), zero)
    high = opset18.Max(opset18.ReduceMax(wide, keepdims=0), zero)
    quant_min, quant_max = (
        _constant(float(limit), FLOAT) for limit in (call.quant_min, call.quant_max)
    )
    steps = _constant(float(call.quant_max - call.quant_min), FLOAT)
    scale = opset18.Max(opset18.Div(opset18.Sub(high, low), steps), _constant(call.eps, FLOAT))
    zero_point = opset18.Sub(quant_min, opset18.Round(opset18.Div(low, scale)))
    zero_point = opset18.Clip(zero_point, quant_min, quant_max)
    one = _constant([1], INT64)
    scale, zero_point = opset18.Reshape(scale, one), opset18.Reshape(zero_point, one)
    return opset18.Cast(scale, to=DOUBLE), opset18.Cast(zero_point, to=INT64)


def _quantize_per_channel(call: Call) -> Any:
    """Quantize without quant_min and quant_max: the scales of weights leave none outside."""
    zeros = opset18.Cast(call.zero_points, to=call.dtype)
    return opset21.QuantizeLinear(_cast(call.input, FLOAT), call.scales, zeros, axis=call.axis)


def _dequantize_per_channel(call: Call) -> Any:
    zeros = None if call.zero_points is None else opset18.Cast(call.zero_points, to=call.dtype)
    wide = opset21.DequantizeLinear(call.input, call.scales, zeros, axis=call.axis)
    return _from_float(wide, call.out_dtype)


def _dequantize_per_channel_group(call: Call) -> Any:
    wide = opset21.DequantizeLinear(call.input, call.scales, axis=1, block_size=call.group_size)
    return _from_float(wide, call.output_dtype)


def _quantize_fp8(call: Call) -> Any:
    zero = _constant(0.0, FLOAT8E4M3FN)
    return opset21.QuantizeLinear(_cast(call.x, FLOAT), _scalar(call.scale), zero)


def _dequantize_fp8(call: Call) -> Any:
    axis = {} if len(call.scale.shape) == 0 else {"axis": 0}
    wide = opset21.DequantizeLinear(call.values, call.scale, **axis)
    return _from_float(wide, call.dtype)
