"""Moves the range of activations into weights, channel by channel: SmoothQuant.

    linear(x, w)  becomes  linear(x / s, w * s),  s = max|x|^a / max|w|^(1-a) of each input channel

A large `a` makes activations easier to quantize and weights harder. `search` tries a grid of them
on samples, and takes the one with which the quantized layer returns most nearly what it should.
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
from diffopt.ir.nodes import args, argument, stored_tensor
from diffopt.quantization import weight_rounding

aten = torch.ops.aten

GRID = 20
_LEAST, _MOST = 1e-4, 1e4  # of s: beyond, half precision has no room for both sides


@dataclass(frozen=True, eq=False)
class Smoothing:
    """What a search has found.

    Attributes:
        scales: s of each input channel; None: no s is better than 1.
        alpha: Where on the grid.
        error: The relative squared error of what the quantized layer returns, weighted.
        plain: The same without smoothing.
    """

    scales: Tensor | None
    alpha: float
    error: float
    plain: float


def search(
    gm: fx.GraphModule,
    layer: qdq.Layer,
    samples: Sequence[Tensor],
    *,
    number: qdq.Number = "int8",
    group: int | None = None,
    scale: weight_rounding.Scale = "max",
    scaling: qdq.Scaling | None = None,
    repeats: int = 1,
    grid: int = GRID,
) -> Smoothing:
    """Return the best scales for a layer.

    Args:
        gm: Where the layer is.
        layer: Not quantized.
        samples: What it reads.
        number: Of the weight.
        group: How many of the weights in a row share a scale; None: all of an output.
        scale: How the ranges of the weight are chosen.
        scaling: Of the activations, in int8; None: these are not quantized.
        repeats: How often a loop calls the layer. What rounding the weight changes is the same
            every time and adds up, while errors of activations are different ones each time.
        grid: How many values of `a` are tried.
    """
    weight = _weight(gm, layer)
    wide = [x.detach().float() for x in samples]
    exact = [_apply(layer, x, weight) for x in wide]
    power = sum(float(y.square().sum()) for y in exact) or 1.0
    x_most, w_most = input_range(layer, wide), weight_range(layer, weight)

    def error(s: Tensor) -> float:
        moved = weight * _of_weight(layer, weight, s)
        rounded = weight_rounding.dequantized(
            weight_rounding.quantize_weight(moved, number, group, scale)
        )
        given = [x / _of_input(layer, s) for x in wide]
        read = _rounded(given, scaling)
        wrong = repeats * distance(given, rounded)
        if scaling is not None:
            wrong += distance(read, moved)
        return wrong / power

    def distance(read: list[Tensor], by: Tensor) -> float:
        made = (_apply(layer, x, by) for x in read)
        return sum(float((m - y).square().sum()) for m, y in zip(made, exact, strict=True))

    plain = error(torch.ones_like(x_most))
    best = Smoothing(None, 0.0, plain, plain)
    for i in range(grid):
        alpha = (i + 1) / grid
        s = scales(x_most, w_most, alpha)
        found = error(s)
        if found < best.error:
            best = Smoothing(s, alpha, found, plain)
    return best


def scales(x_most: Tensor, w_most: Tensor, alpha: float) -> Tensor:
    """Return s of each input channel, from the largest absolute values; 1 where one of them is 0.

    Args:
        x_most: Of the activations.
        w_most: Of the weights.
        alpha: The larger, the more of the activations' range moves.
    """
    s = x_most.float() ** alpha / w_most.float() ** (1 - alpha)
    return torch.where((x_most > 0) & (w_most > 0), s, 1.0).clamp(_LEAST, _MOST)


def input_range(layer: qdq.Layer, samples: Sequence[Tensor]) -> Tensor:
    """Return the largest absolute value of each input channel in samples of what a layer reads."""
    axis = _axis(layer)
    each = [x.abs().movedim(axis, 0).flatten(1).amax(1) for x in samples]
    if not each:
        raise DiffoptError(f"{layer.node.name} has no samples to smooth with: calibrate on some")
    return torch.stack(each).amax(0)


def weight_range(layer: qdq.Layer, weight: Tensor) -> Tensor:
    """Return the largest absolute weight of each input channel."""
    most = weight.abs().flatten(2).amax(2) if weight.dim() > 2 else weight.abs()
    return most.reshape(_groups(layer), -1, weight.shape[1]).amax(1).flatten()


def scaled(layer: qdq.Layer, weight: Tensor, s: Tensor) -> torch.nn.Parameter:
    """Return the weight of a layer times `s`."""
    product = weight.detach().double() * _of_weight(layer, weight, s.double())
    return torch.nn.Parameter(product.to(weight.dtype), requires_grad=False)


def smooth_layer(
    gm: fx.GraphModule, layer: qdq.Layer, s: Tensor, new: Tensor | None = None
) -> qdq.Layer:
    """Divide what a layer reads by `s`, and multiply its weight by it; return the layer.

    `new` is that product, where it is at hand.
    """
    weight = _weight(gm, layer)
    name, node = str(layer.weight.target), layer.node
    wide = s.double()
    new = scaled(layer, weight, s) if new is None else new
    inverse = (1 / _of_input(layer, wide)).to(weight.dtype)
    with gm.graph.inserting_before(node):
        factor = g.get_attr(gm, f"{name}_inverse", inverse)
        # Not of `layer.x`, which a branch beside the layer before has replaced.
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
    """Return where the channels of what a layer reads are, from the end."""
    return 1 - layer.weight.meta["val"].dim() if layer.convolution else -1


def _groups(layer: qdq.Layer) -> int:
    return int(argument(layer.node, 6, "groups", 1)) if layer.convolution else 1


def _of_input(layer: qdq.Layer, s: Tensor) -> Tensor:
    """Return s in a shape that broadcasts with what a layer reads."""
    return s.reshape(-1, *[1] * (-1 - _axis(layer)))


def _of_weight(layer: qdq.Layer, weight: Tensor, s: Tensor) -> Tensor:
    """Return s in a shape that broadcasts with its weight."""
    groups = _groups(layer)
    each = s.reshape(groups, -1).repeat_interleave(len(weight) // groups, 0)
    return each.reshape(*each.shape, *[1] * (weight.dim() - 2))


def _apply(layer: qdq.Layer, x: Tensor, weight: Tensor) -> Tensor:
    """Return what a layer returns, but for its bias."""
    result: Tensor = layer.node.target(x, weight.float(), None, *args(layer.node)[3:])  # type: ignore[operator]
    return result


def _rounded(samples: list[Tensor], scaling: qdq.Scaling | None) -> list[Tensor]:
    """Return activations as they are after quantization."""
    if scaling is None:
        return samples
    if scaling == "static":
        both = torch.stack([torch.stack([x.amin(), x.amax()]) for x in samples])
        return [straight_through.fake_int8(x, both) for x in samples]
    return [straight_through.fake_int8(x, x, rows=scaling == "rows") for x in samples]
