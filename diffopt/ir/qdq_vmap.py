"""How `torch.vmap` batches the operators that quantize and dequantize activations.

Without rules of their own it makes a loop of each. Numbers are those of the loop, bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor

qd = torch.ops.quantized_decomposed

_PER_TENSOR = {
    "quantize_per_tensor.tensor": (qd.quantize_per_tensor.tensor, qd.quantize_per_channel.default),
    "dequantize_per_tensor.tensor": (
        qd.dequantize_per_tensor.tensor,
        qd.dequantize_per_channel.default,
    ),
}
"""Each operator, and what does the same with a scale for each entry of an axis."""

_PER_TOKEN = {
    "quantize_per_token": qd.quantize_per_token.default,
    "dequantize_per_token": qd.dequantize_per_token.default,
}

_PER_CHANNEL = {
    "quantize_per_channel": qd.quantize_per_channel.default,
    "dequantize_per_channel": qd.dequantize_per_channel.default,
}


def register() -> None:
    """Give torch the rules."""
    for name, (whole, channels) in _PER_TENSOR.items():
        torch.library.register_vmap(f"quantized_decomposed::{name}", _per_tensor(whole, channels))
    for name, target in _PER_TOKEN.items():
        torch.library.register_vmap(f"quantized_decomposed::{name}", _per_token(target))
    for name, target in _PER_CHANNEL.items():
        torch.library.register_vmap(f"quantized_decomposed::{name}", _per_channel(target))
    torch.library.register_vmap("quantized_decomposed::choose_qparams.tensor", _choose)


def _per_tensor(whole: Any, channels: Any) -> Any:
    def rule(info: Any, dims: Sequence[int | None], *given: Any, **more: Any) -> tuple[Tensor, int]:
        if dims[1] is None and dims[2] is None:
            return whole(_first(given[0], dims[0], info.batch_size), *given[1:], **more), 0
        x, scale, zero = (
            _first(v, d, info.batch_size) for v, d in zip(given, dims[:3], strict=False)
        )
        return channels(x, scale.reshape(-1), zero.reshape(-1), 0, *given[3:], **more), 0

    return rule


def _per_token(target: Any) -> Any:
    def rule(info: Any, dims: Sequence[int | None], *given: Any) -> tuple[Tensor, int]:
        x, scale, zero = (
            _first(v, d, info.batch_size) for v, d in zip(given, dims[:3], strict=False)
        )
        return target(x, scale, zero, *given[3:]), 0

    return rule


def _per_channel(target: Any) -> Any:
    def rule(
        info: Any,
        dims: Sequence[int | None],
        x: Any,
        scale: Any,
        zero: Any,
        axis: int,
        *rest: Any,
        **more: Any,
    ) -> tuple[Tensor, int]:
        if axis:
            raise NotImplementedError("only scales along the first axis can be batched")
        x, scale = (_first(v, d, info.batch_size) for v, d in zip((x, scale), dims, strict=False))
        if zero is not None:
            zero = _first(zero, dims[2], info.batch_size).flatten()
        made = target(x.flatten(0, 1), scale.flatten(), zero, 0, *rest, **more)
        return made.unflatten(0, x.shape[:2]), 0

    return rule


def _choose(
    info: Any, dims: Sequence[int | None], x: Tensor, low: int, high: int, eps: float, dtype: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Choose one scale and zero point for each entry, as the operator does for one tensor."""
    rows = _first(x, dims[0], info.batch_size).flatten(1)
    least = rows.amin(1, keepdim=True).clamp_max(0.0)
    most = rows.amax(1, keepdim=True).clamp_min(0.0)
    scale = ((most - least) / float(high - low)).clamp_min(eps)
    zero = (low - torch.round(least / scale).to(torch.int32)).clamp(low, high)
    return (scale.to(torch.float64), zero.to(torch.int64)), (0, 0)


def _first(value: Tensor, dim: int | None, size: int) -> Tensor:
    """Return a value with its batch in front; one without a batch is repeated."""
    if dim is None:
        return value.expand(size, *value.shape)
    return value.movedim(dim, 0) if dim else value
