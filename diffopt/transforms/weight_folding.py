"""Folds of nodes into the weights of the linear layers and convolutions before them."""

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.ir import graph as g
from diffopt.ir.nodes import (
    args,
    argument,
    is_call,
    replace_node,
    stored_tensor,
    weight_uses,
)
from diffopt.ir.program import Program
from diffopt.transforms import canonicalize

aten = torch.ops.aten

LINEAR = aten.linear.default
CONVS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
TIMES = {aten.mul.Tensor: operator.mul, aten.div.Tensor: operator.truediv}

# With fewer bits a rounding of the weights shows, and a scale may be there to avoid overflow.
PRECISE = (torch.float32, torch.float64)

Skip = Callable[[str, str], None]
Weights = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Fold:
    """Say that `last`, computed from `value`, disappears when `layer` gets other weights.

    Attributes:
        graph: Name of the graph.
        layer: The linear layer or convolution.
        last: The node that goes away; `value` takes its place.
        value: What `last` is computed from.
        key: Equal for folds that make the same weights.
        make: Returns the new weight and bias in float64.
    """

    graph: str
    layer: fx.Node
    last: fx.Node
    value: fx.Node
    key: tuple[Any, ...]
    make: Callable[[], Weights]

    def __str__(self) -> str:
        return f"{self.graph}.{self.last.name}" if self.graph else self.last.name


Find = Callable[[fx.GraphModule, str, fx.Node], Fold | None]


def fold_all(program: Program, find: Find, skip: Skip) -> int:
    """Apply the folds that `find` sees until there are no more; return how many.

    A weight that is used elsewhere too stays as it is: the new one would come on top.
    """
    count = 0
    reasons: dict[str, str] = {}
    while True:
        reasons.clear()
        folds = [
            fold
            for name, gm in program.graphs.items()
            for node in gm.graph.nodes
            if (fold := find(gm, name, node)) is not None
        ]
        uses = weight_uses(program)
        keys = [fold.key for fold in folds]
        made: dict[Any, Weights] = {}
        done = 0
        for fold in folds:
            weight = stored_tensor(program.graphs[fold.graph], args(fold.layer)[1])
            assert weight is not None
            if uses[id(weight)] != keys.count(fold.key):
                reasons[str(fold)] = "the layer's weight is also used in another way"
                continue
            if fold.key not in made:
                made[fold.key] = rounded(fold.make(), weight)
            if not all(t is None or bool(t.isfinite().all()) for t in made[fold.key]):
                reasons[str(fold)] = "the new weights would not be finite"
                continue
            _apply(program.graphs[fold.graph], fold, *made[fold.key])
            done += 1
        for gm in program.graphs.values():
            g.prune_unused(gm)
        count += done
        if not done:
            break
    for where, reason in reasons.items():
        skip(where, reason)
    return count


def rounded(weights: Weights, like: Tensor) -> Weights:
    """Return weights in the type and memory layout of the weight that they replace."""
    weight, bias = weights
    new = torch.nn.Parameter(torch.empty_like(like).copy_(weight), requires_grad=False)
    if bias is None:
        return new, None
    return new, torch.nn.Parameter(bias.to(like.dtype), requires_grad=False)


def _apply(gm: fx.GraphModule, fold: Fold, weight: Tensor, bias: Tensor | None) -> None:
    new = with_weights(gm, fold.layer, weight, bias)
    value = new if fold.value is fold.layer else fold.value
    fold.layer.replace_all_uses_with(new)
    replace_node(fold.last, value)


# Layers


def with_weights(
    gm: fx.GraphModule, layer: fx.Node, weight: Tensor, bias: Tensor | None
) -> fx.Node:
    """Insert, before a layer, the same one with other weights."""
    stem = re.sub(r"_(folded_)?weight(_\d+)?$", "", str(args(layer)[1].target))
    with gm.graph.inserting_before(layer):
        given = [args(layer)[0], g.get_attr(gm, f"{stem}_folded_weight", weight)]
        given.append(None if bias is None else g.get_attr(gm, f"{stem}_folded_bias", bias))
        if bias is None and len(layer.args) <= 3:
            given.pop()
        return g.call(gm.graph, layer.target, *given, *args(layer)[3:], like=layer)


def layer_weights(gm: fx.GraphModule, node: Any) -> Weights | None:
    """Return the stored weight and bias of a linear layer or convolution; None for other nodes."""
    if not is_call(node, LINEAR, *CONVS) or node.kwargs.keys() - {"bias"} or len(node.args) < 2:
        return None
    weight, bias = stored_tensor(gm, args(node)[1]), argument(node, 2, "bias")
    if weight is None or not weight.is_floating_point():
        return None
    return (
        None
        if bias is not None and stored_tensor(gm, bias) is None
        else (weight, stored_tensor(gm, bias))
    )


def weights_key(weights: Weights, *more: Any) -> tuple[Any, ...]:
    """Return what tells weights, and whatever else, apart by identity."""
    return (*map(id, weights), *more)


def double(tensor: Tensor | None) -> Tensor | None:
    """Return a weight in float64, in which new weights are computed."""
    return None if tensor is None else tensor.detach().double()


def channel_axis(layer: fx.Node) -> int:
    """Return which dimension, from the end, of a layer's input and result the channels are."""
    return -1 if layer.target is LINEAR else -2 - CONVS.index(layer.target)


# Numbers


def per_channel(gm: fx.GraphModule, value: Any, like: Tensor, axis: int | None) -> Tensor | None:
    """Return a constant as one number, or as one for each channel, in float64.

    Args:
        gm: The graph.
        value: A number or a node.
        like: What it is combined with.
        axis: Where the channels of `like` are, from the end; None if only one number will do.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.tensor([value], dtype=torch.float64)
    tensor = stored_tensor(gm, value)
    if tensor is None or tensor.dtype != like.dtype or tensor.dim() > like.dim():
        return None
    if tensor.numel() == 1:
        return tensor.detach().double().reshape(1)
    shape = [1] * (like.dim() - tensor.dim()) + list(tensor.shape)
    if axis is None or shape[axis] != like.shape[axis] or tensor.numel() != shape[axis]:
        return None
    return tensor.detach().double().reshape(-1)


def noops_skipped(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Return the node whose value `node` passes on unchanged."""
    while (source := canonicalize.unchanged(gm, node)) is not None:
        node = source
    return node


def number(gm: fx.GraphModule, value: Any) -> float | None:
    """Return a Python number, or the only element of a floating-point constant."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    tensor = stored_tensor(gm, value)
    if tensor is None or tensor.dim() or not tensor.is_floating_point():
        return None
    return float(tensor)


@dataclass(frozen=True)
class Factor:
    """Describe a multiplication of `source` by a number, and whether that is a stored constant."""

    number: float
    source: fx.Node
    stored: bool


def factor_of(gm: fx.GraphModule, node: fx.Node) -> Factor | None:
    """Return by which number a node multiplies or divides what; None if it does not."""
    if not is_call(node, *TIMES) or node.kwargs:
        return None
    one, other = args(node)
    if node.target is aten.mul.Tensor and number(gm, one) is not None:
        one, other = other, one
    factor = number(gm, other)
    if factor is None or not isinstance(one, fx.Node):
        return None
    if node.target is aten.div.Tensor:
        if factor == 0:
            return None
        factor = 1 / factor
    return Factor(factor, one, isinstance(other, fx.Node))
