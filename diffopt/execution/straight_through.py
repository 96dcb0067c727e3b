"""Gradients through what quantizes activations: a hook for the interpreter.

A rounding has no gradient. The straight-through estimator treats it as the identity, and lets no
gradient through where a value is clipped.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.ir import qdq
from diffopt.ir.interpreter import Interpreter

aten = torch.ops.aten
qd = torch.ops.quantized_decomposed


def estimate(run: Interpreter, node: fx.Node) -> Any:
    """Compute an operator with gradients straight through: numbers are floats all the way."""
    args, kwargs = run.arguments(node)
    target: Any = node.target
    return _RULES.get(target, target)(*args, **kwargs)


def roundings(nodes: Iterable[fx.Node]) -> Counter[Any]:
    """Count the operators that gradients are estimated for, by operator."""
    return Counter(n.target for n in nodes if n.target in _ROUNDINGS)


def fake_int8(x: Tensor, within: Tensor, *, rows: bool = False) -> Tensor:
    """Return `x` quantized to int8 and back, as the operators that `qdq.quantize` inserts do.

    Args:
        x: An activation.
        within: Whose range is that of the numbers, if `rows` is not set.
        rows: Use for each row a scale for its own range.
    """
    if rows:
        scale, zero = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=qdq.EPS), torch.zeros(())
    else:
        scale, zero = _choose(within, -128, 127, qdq.EPS, torch.int8)
    limits = (scale, zero, -128, 127, torch.int8)
    return _dequantize(_quantize(x, *limits), *limits)


def clip(x: Tensor, low: float, high: float) -> Tensor:
    """Return `x` within limits; the gradient goes through at the limits themselves.

    `clamp` of torch 2.14 lets none through there, where rounded values often are; 2.13's does.
    """
    return torch.where((x < low) | (x > high), x.detach().clamp(low, high), x)


def _round(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def _quantize(
    x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int, dtype: torch.dtype
) -> Tensor:
    return clip(_round(x.float() / scale.detach()) + zero, low, high)


def _dequantize(
    q: Tensor,
    scale: Tensor,
    zero: Tensor,
    low: int,
    high: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    return ((q - zero) * scale.detach()).to(out_dtype or torch.float32)


def _choose(
    x: Tensor, low: int, high: int, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        least, most = x.amin().clamp(max=0), x.amax().clamp(min=0)
        scale = ((most - least) / (high - low)).clamp(min=eps)
        return scale, (low - (least / scale).round()).clamp(low, high)


def _to_copy(x: Tensor, **kwargs: Any) -> Tensor:
    if kwargs.get("dtype") == qdq.FP8:
        return x + (x.detach().to(qdq.FP8).to(x.dtype) - x.detach())
    result: Tensor = aten._to_copy.default(x, **kwargs)
    return result


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *dropout_and_causal: Any,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if any(dropout_and_causal) or enable_gqa:
        fused: Tensor = aten.scaled_dot_product_attention.default(
            query, key, value, mask, *dropout_and_causal, scale=scale, enable_gqa=enable_gqa
        )
        return fused
    # The fused operator has no rule for vmap: it would run for one call after the other.
    scores = query @ key.transpose(-2, -1) * (scale or 1 / math.sqrt(query.shape[-1]))
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ value


_ROUNDINGS: dict[Any, Callable[..., Any]] = {
    qd.quantize_per_tensor.tensor: _quantize,
    qd.dequantize_per_tensor.tensor: _dequantize,
    qd.quantize_per_token.default: _quantize,
    qd.dequantize_per_token.default: _dequantize,
    qd.choose_qparams.tensor: _choose,
    aten._to_copy.default: _to_copy,
}
_RULES: dict[Any, Callable[..., Any]] = {
    **_ROUNDINGS,
    # What is viewed may be strided in another way than it was.
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    aten.scaled_dot_product_attention.default: _attention,
}
