"""Move the range of activations into weights, channel by channel: SmoothQuant.

    linear(x, w)  becomes  linear(x / s, w * s),  s = max|x|^a / max|w|^(1-a) of each input channel

A large `a` makes activations easier to quantize and weights harder. `search_scales` tries a grid of
them on samples and returns the scales of least error (Xiao et al. 2023, arXiv 2211.10438).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from diffopt.errors import DiffoptError
from diffopt.execution import straight_through
from diffopt.ir import graph as g
from diffopt.ir import qdq
from diffopt.ir.nodes import args, stored_tensor
from diffopt.quantization import weight_rounding

aten = torch.ops.aten

GRID = 20
_MIN, _MAX = 1e-4, 1e4  # of s: beyond, half precision overflows or underflows
_INT8 = weight_rounding.WeightFormat()


@dataclass(frozen=True, eq=False)
class Smoothing:
    """The scales that a search has chosen.

    Attributes:
        scales: s of each input channel; None: no s is better than 1.
        alpha: The exponent a.
        error: The relative squared error of the quantized layer's results, see `search_scales`.
        plain: The same without smoothing.
    """

    scales: Tensor | None
    alpha: float
    error: float
    plain: float


def search_scales(
    gm: fx.GraphModule,
    layer: qdq.Layer,
    samples: Sequence[Tensor],
    *,
    rounding: weight_rounding.WeightFormat = _INT8,
    scaling: qdq.Scaling | None = None,
    repeats: int = 1,
    grid: int = GRID,
) -> Smoothing:
    """Return the scales s of least error for a layer y = f(x, w).

    error = repeats * |f(x / s, q(w s)) - y|^2 / |y|^2 + |f(q(x / s), w s) - y|^2 / |y|^2

    Args:
        gm: The graph of the layer.
        layer: Not quantized.
        samples: Its inputs.
        rounding: How its weight is quantized.
        scaling: How its inputs are quantized to int8; None: they are not.
        repeats: How often a loop calls the layer: the error of a rounded weight is the same in
            every call and adds up, while those of activations are independent.
        grid: How many values of `a` are tried.
    """
    weight = _weight(gm, layer)
    samples32 = [x.detach().float() for x in samples]
    exact = [_apply(layer, x, weight) for x in samples32]
    power = sum(float(y.square().sum()) for y in exact) or 1.0
    x_max, w_max = input_range(layer, samples32), weight_range(layer, weight)

    def error(s: Tensor) -> float:
        moved = weight * _of_weight(layer, weight, s)
        rounded = weight_rounding.dequantized(rounding.quantize(moved))
        smoothed = [x / _of_input(layer, s) for x in samples32]
        total = repeats * distance(smoothed, rounded)
        if scaling is not None:
            total += distance(_rounded(smoothed, scaling), moved)
        return total / power

    def distance(inputs: list[Tensor], by: Tensor) -> float:
        results = (_apply(layer, x, by) for x in inputs)
        return sum(float((r - y).square().sum()) for r, y in zip(results, exact, strict=True))

    plain = error(torch.ones_like(x_max))
    best = Smoothing(None, 0.0, plain, plain)
    for i in range(grid):
        alpha = (i + 1) / grid
        s = smoothing_scales(x_max, w_max, alpha)
        if (smoothed := error(s)) < best.error:
            best = Smoothing(s, alpha, smoothed, plain)
    return best


def smoothing_scales(x_max: Tensor, w_max: Tensor, alpha: float) -> Tensor:
    """Return s of each input channel; 1 where one of the ranges is 0.

    Args:
        x_max: The largest absolute activation of each channel.
        w_max: The largest absolute weight of each channel.
        alpha: The exponent; a larger one moves more of the activations' range.
    """
    s = x_max.float() ** alpha / w_max.float() ** (1 - alpha)
    return torch.where((x_max > 0) & (w_max > 0), s, 1.0).clamp(_MIN, _MAX)


def input_range(layer: qdq.Layer, samples: Sequence[Tensor]) -> Tensor:
    """Return the largest absolute value of each channel in samples of a layer's input."""
    axis = _axis(layer)
    each = [x.abs().movedim(axis, 0).flatten(1).amax(1) for x in samples]
    if not each:
        raise DiffoptError(f"{layer.node.name} has no samples to smooth with: calibrate on some")
    return torch.stack(each).amax(0)


def weight_range(layer: qdq.Layer, weight: Tensor) -> Tensor:
    """Return the largest absolute weight of each input channel."""
    most = weight.abs().flatten(2).amax(2) if weight.dim() > 2 else weight.abs()
    return most.reshape(layer.groups, -1, weight.shape[1]).amax(1).flatten()


def smoothed_weight(layer: qdq.Layer, weight: Tensor, s: Tensor) -> torch.nn.Parameter:
    """Return the weight of a layer times `s`."""
    product = weight.detach().double() * _of_weight(layer, weight, s.double())
    return torch.nn.Parameter(product.to(weight.dtype), requires_grad=False)


def smooth_layer(
    gm: fx.GraphModule, layer: qdq.Layer, s: Tensor, new: Tensor | None = None
) -> qdq.Layer:
    """Divide the input of a layer by `s` and multiply its weight by it; return the layer.

    `new` is that product, if it is known.
    """
    weight = _weight(gm, layer)
    name, node = str(layer.weight.target), layer.node
    samples32 = s.double()
    new = smoothed_weight(layer, weight, s) if new is None else new
    inverse = (1 / _of_input(layer, samples32)).to(weight.dtype)
    with gm.graph.inserting_before(node):
        factor = g.get_attr(gm, f"{name}_inverse", inverse)
        # Not `layer.x`: the branch of a layer in front may have replaced it.
        x = g.call(gm.graph, aten.mul.Tensor, args(node)[0], factor, like=node)
        smoothed = g.get_attr(gm, f"{name}_smooth", new)
    node.update_arg(0, x)
    node.update_arg(1, smoothed)
    return qdq.Layer(node, x, smoothed, layer.bias, layer.convolution)


def _weight(gm: fx.GraphModule, layer: qdq.Layer) -> Tensor:
    weight = stored_tensor(gm, layer.weight)
    if weight is None:
        raise DiffoptError(f"{layer.node.name} is not smoothed: its weight is quantized already")
    return weight.detach()


def _axis(layer: qdq.Layer) -> int:
    """Return the channel axis of a layer's input, counted from the end."""
    return 1 - layer.weight.meta["val"].dim() if layer.convolution else -1


def _of_input(layer: qdq.Layer, s: Tensor) -> Tensor:
    """Return s in a shape that broadcasts with a layer's input."""
    return s.reshape(-1, *[1] * (-1 - _axis(layer)))


def _of_weight(layer: qdq.Layer, weight: Tensor, s: Tensor) -> Tensor:
    """Return s in a shape that broadcasts with its weight."""
    groups = layer.groups
    each = s.reshape(groups, -1).repeat_interleave(len(weight) // groups, 0)
    return each.reshape(*each.shape, *[1] * (weight.dim() - 2))


def _apply(layer: qdq.Layer, x: Tensor, weight: Tensor) -> Tensor:
    """Return the result of a layer without its bias."""
    result: Tensor = layer.node.target(x, weight.float(), None, *args(layer.node)[3:])  # type: ignore[operator]
    return result


def _rounded(samples: list[Tensor], scaling: qdq.Scaling | None) -> list[Tensor]:
    """Return activations quantized to int8 and back."""
    if scaling is None:
        return samples
    if scaling == "static":
        both = torch.stack([torch.stack([x.amin(), x.amax()]) for x in samples])
        return [straight_through.fake_int8(x, both) for x in samples]
    return [straight_through.fake_int8(x, x, rows=scaling == "rows") for x in samples]
