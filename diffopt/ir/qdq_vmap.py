"""How `torch.vmap` batches the operators that quantize and dequantize activations.

Without batching rules `vmap` runs each in a loop. Results equal the loop's, bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor

qd = torch.ops.quantized_decomposed

Dims = Sequence[int | None]
"""Of each argument of an operator, the dimension that is the batch; None without one."""

_PER_TENSOR = {
    "quantize_per_tensor.tensor": (qd.quantize_per_tensor.tensor, qd.quantize_per_channel.default),
    "dequantize_per_tensor.tensor": (
        qd.dequantize_per_tensor.tensor,
        qd.dequantize_per_channel.default,
    ),
}
"""Each operator, and the one with a scale for each entry of an axis."""

_PER_TOKEN = {
    "quantize_per_token": qd.quantize_per_token.default,
    "dequantize_per_token": qd.dequantize_per_token.default,
}

_PER_CHANNEL = {
    "quantize_per_channel": qd.quantize_per_channel.default,
    "dequantize_per_channel": qd.dequantize_per_channel.default,
}


def register() -> None:
    """Register the batching rules in torch."""
    for name, (target, channels) in _PER_TENSOR.items():
        torch.library.register_vmap(f"quantized_decomposed::{name}", _per_tensor(target, channels))
    for name, target in _PER_TOKEN.items():
        torch.library.register_vmap(f"quantized_decomposed::{name}", _per_token(target))
    for name, target in _PER_CHANNEL.items():
        torch.library.register_vmap(f"quantized_decomposed::{name}", _per_channel(target))
    torch.library.register_vmap("quantized_decomposed::choose_qparams.tensor", _choose_qparams)


def _per_tensor(target: Any, channels: Any) -> Any:
    def rule(info: Any, dims: Dims, *args: Any, **kwargs: Any) -> tuple[Tensor, int]:
        if dims[1] is None and dims[2] is None:
            return target(_first(args[0], dims[0], info.batch_size), *args[1:], **kwargs), 0
        x, scale, zero = _batch_first(info, dims, args[:3])
        return channels(x, scale.reshape(-1), zero.reshape(-1), 0, *args[3:], **kwargs), 0

    return rule


def _per_token(target: Any) -> Any:
    def rule(info: Any, dims: Dims, *args: Any) -> tuple[Tensor, int]:
        return target(*_batch_first(info, dims, args[:3]), *args[3:]), 0

    return rule


def _per_channel(target: Any) -> Any:
    def rule(info: Any, dims: Dims, *args: Any, **kwargs: Any) -> tuple[Tensor, int]:
        zero, axis = args[2:4]
        if axis:
            raise NotImplementedError("only scales along the first axis can be batched")
        x, scale = _batch_first(info, dims, args[:2])
        if zero is not None:
            zero = _first(zero, dims[2], info.batch_size).flatten()
        result = target(x.flatten(0, 1), scale.flatten(), zero, 0, *args[4:], **kwargs)
        return result.unflatten(0, x.shape[:2]), 0

    return rule


def _choose_qparams(
    info: Any, dims: Dims, x: Tensor, low: int, high: int, eps: float, dtype: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Compute a scale and zero point for each entry of the batch, as the operator does for one."""
    rows = _first(x, dims[0], info.batch_size).flatten(1)
    least = rows.amin(1, keepdim=True).clamp_max(0.0)
    most = rows.amax(1, keepdim=True).clamp_min(0.0)
    scale = ((most - least) / float(high - low)).clamp_min(eps)
    zero = (low - torch.round(least / scale).to(torch.int32)).clamp(low, high)
    return (scale.to(torch.float64), zero.to(torch.int64)), (0, 0)


def _first(value: Tensor, dim: int | None, size: int) -> Tensor:
    """Return a value with its batch dimension first; one without is expanded by it."""
    if dim is None:
        return value.expand(size, *value.shape)
    return value.movedim(dim, 0) if dim else value


def _batch_first(info: Any, dims: Dims, values: Sequence[Tensor]) -> list[Tensor]:
    return [_first(x, dim, info.batch_size) for x, dim in zip(values, dims, strict=False)]
