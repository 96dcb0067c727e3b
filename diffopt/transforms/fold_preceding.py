"""Folds constant scales and shifts in front of layers, and norms' weights, into the layers.

A scale in front of a linear layer or convolution is a scale of its weight's input channels, a shift
is one of its bias: W (s x + t) + b = (W s) x + (W t + b).
"""

import math
from collections import Counter
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
    same_layout,
    stored_tensor,
    weight_uses,
)
from diffopt.ir.program import Program
from diffopt.transforms.weight_folding import (
    LINEAR,
    PRECISE,
    TIMES,
    Skip,
    Weights,
    channel_axis,
    double,
    layer_weights,
    per_channel,
    rounded,
    weights_key,
    with_weights,
)

aten = torch.ops.aten

_NORMS = (aten.layer_norm.default, aten.group_norm.default, aten.rms_norm.default)
_PLUS: dict[Any, int] = {aten.add.Tensor: 1, aten.sub.Tensor: -1}
_VIEWS = (aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default)


@dataclass(frozen=True, eq=False)
class Front:
    """A node whose constants can go into the layers that take its result, all of them.

    Attributes:
        graph: Name of the graph.
        node: The norm, multiplication or addition.
        scale: What it multiplies each channel by, or one number.
        shift: What it adds to each channel afterwards, or one number.
        layers: All that reads the result, through views; empty if something else does.
        key: Equal for nodes that have the same constants.
    """

    graph: str
    node: fx.Node
    scale: Tensor | None
    shift: Tensor | None
    layers: tuple[fx.Node, ...]
    key: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.graph}.{self.node.name}" if self.graph else self.node.name


def fold_fronts(program: Program, skip: Skip) -> dict[str, int]:
    """Fold until there is nothing more to fold; return how many norms and how many others."""
    counts = {"norms folded": 0, "scales in front folded": 0}
    while True:
        reasons: dict[str, str] = {}
        found = [
            front
            for name, gm in program.graphs.items()
            for node in gm.graph.nodes
            if (front := _front(gm, name, node)) is not None
        ]
        made: dict[Any, Weights] = {}
        done = 0
        for front in _agreeing(program, found, reasons):
            gm = program.graphs[front.graph]
            new = [_new_weights(gm, front, layer, made) for layer in front.layers]
            if not all(t is None or bool(t.isfinite().all()) for pair in new for t in pair):
                reasons[str(front)] = "the next layer's new weights would not be finite"
                continue
            is_norm = front.node.target in _NORMS
            counts["norms folded" if is_norm else "scales in front folded"] += 1
            _apply(gm, front, new)
            done += 1
        for gm in program.graphs.values():
            g.prune_unused(gm)
        if not done:
            break
    for where, reason in reasons.items():
        skip(where, reason)
    return counts


def _agreeing(program: Program, found: list[Front], reasons: dict[str, str]) -> list[Front]:
    """Return those whose layers' weights have no use but behind equal constants."""
    uses = weight_uses(program)
    keys = {
        front: [_key(program.graphs[front.graph], front, layer) for layer in front.layers]
        for front in found
    }
    kept: list[Front] = []
    while len(kept) != len(found):  # one that is left out can leave others out
        kept = found
        counts = Counter(key for front in kept for key in keys[front])
        found = [f for f in kept if all(uses[key[0]] == counts[key] for key in keys[f])]
        for front in kept:
            if front not in found:
                reasons[str(front)] = "the next layer's weight is also used in another way"
    return kept


def _key(gm: fx.GraphModule, front: Front, layer: fx.Node) -> tuple[Any, ...]:
    """Return what is equal for layers that get the same new weights; the old weight is first."""
    weights = layer_weights(gm, layer)
    assert weights is not None
    return weights_key(weights, *front.key)


def _front(gm: fx.GraphModule, name: str, node: fx.Node) -> Front | None:
    """See a norm with weights, x * c, x / c, x + c or x - c whose result only layers read."""
    if not is_call(node, *_NORMS, *TIMES, *_PLUS) or node.meta["val"].dtype not in PRECISE:
        return None
    readers = _readers(gm, node)
    axes = {axis for _, axis in readers}
    if len(axes) != 1:
        return None
    if node.target in _NORMS:
        constants = _norm_constants(gm, node, *axes)
    else:
        constants = _pointwise_constants(gm, node, *axes)
    if constants is None:
        return None
    scale, shift, key = constants
    layers = tuple(layer for layer, _ in readers)
    if any(_geometry(layer)[1] != 1 for layer in layers):
        return None
    if shift is not None and any(_geometry(layer)[0] for layer in layers):
        return None  # W * (x + t), padded with zeros, is not W * x + W * t at the border
    return Front(name, node, scale, shift, layers, (node.target, *key))


def _readers(gm: fx.GraphModule, node: fx.Node) -> list[tuple[fx.Node, int]]:
    """Return the layers that read a value, through views, and which dimension their channels are.

    Nothing, if anything else reads it.
    """
    found = []
    for user in node.users:
        if layer_weights(gm, user) is not None and user.args[0] is node:
            found.append((user, node.meta["val"].dim() + channel_axis(user)))
            continue
        inner = _readers(gm, user) if is_call(user, *_VIEWS) else []
        before = [(layer, _before_view(user, axis)) for layer, axis in inner]
        if not before or any(axis is None for _, axis in before):
            return []
        found += [(layer, axis) for layer, axis in before if axis is not None]
    return found


def _before_view(view: fx.Node, axis: int) -> int | None:
    """Return which dimension of what a view is of became its dimension `axis`."""
    source: Tensor = args(view)[0].meta["val"]
    result: Tensor = view.meta["val"]
    if view.target is aten.transpose.int:
        one, other = (int(dim) % result.dim() for dim in args(view)[1:3])
        return other if axis == one else one if axis == other else axis
    if view.target is aten.permute.default:
        return int(args(view)[1][axis]) % result.dim()
    inner = math.prod(result.shape[axis + 1 :])
    for dim in range(source.dim()):
        if source.shape[dim] == result.shape[axis] and math.prod(source.shape[dim + 1 :]) == inner:
            return dim
    return None


def _geometry(layer: fx.Node) -> tuple[bool, int]:
    """Return whether a layer pads its input, and in how many groups it takes the channels."""
    if layer.target is LINEAR:
        return False, 1
    padding = args(layer)[4] if len(layer.args) > 4 else 0
    groups = args(layer)[6] if len(layer.args) > 6 else 1
    return any(padding) if isinstance(padding, (list, tuple)) else bool(padding), groups


Constants = tuple[Tensor | None, Tensor | None, tuple[Any, ...]]
"""Scale, shift, and what tells them apart."""


def _norm_constants(gm: fx.GraphModule, node: fx.Node, axis: int) -> Constants | None:
    if node.target is aten.group_norm.default:
        own = 1
    else:
        own = node.meta["val"].dim() - 1
        if len(args(node)[1]) != 1:
            return None
    weight, bias = argument(node, 2, "weight"), None
    if node.target is not aten.rms_norm.default:
        bias = argument(node, 3, "bias")
    tensors = [stored_tensor(gm, weight), stored_tensor(gm, bias)]
    known = all(t is not None for n, t in zip((weight, bias), tensors, strict=True) if n)
    if axis != own or not known or tensors == [None, None]:
        return None
    return double(tensors[0]), double(tensors[1]), tuple(map(id, tensors))


def _pointwise_constants(gm: fx.GraphModule, node: fx.Node, axis: int) -> Constants | None:
    one, other = _operands(gm, node)
    if node.kwargs or one is None or not same_layout(node, one):
        return None
    value = node.meta["val"]
    constant = per_channel(gm, other, value, axis - value.dim())
    if constant is None:
        return None
    tensor = stored_tensor(gm, other)
    key = (type(other), other) if tensor is None else (Tensor, id(tensor))
    if node.target in TIMES:
        scale = TIMES[node.target](torch.ones_like(constant), constant)
        return scale, None, key
    return None, _PLUS[node.target] * constant, key


def _operands(gm: fx.GraphModule, node: fx.Node) -> tuple[fx.Node | None, Any]:
    """Return the value and the constant of an operator on both."""
    one, other = args(node)[:2]
    if node.target in (aten.mul.Tensor, aten.add.Tensor) and stored_tensor(gm, one) is not None:
        one, other = other, one
    return (one if isinstance(one, fx.Node) and one.op != "get_attr" else None), other


def _new_weights(
    gm: fx.GraphModule, front: Front, layer: fx.Node, made: dict[Any, Weights]
) -> Weights:
    key = _key(gm, front, layer)
    if key not in made:
        weights = layer_weights(gm, layer)
        assert weights is not None
        weight, bias = map(double, weights)
        assert weight is not None
        if front.shift is not None:
            inputs = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
            bias = inputs @ front.shift.expand(inputs.shape[1]) + (0 if bias is None else bias)
        if front.scale is not None:
            weight = weight * front.scale.reshape(-1, *[1] * (weight.dim() - 2))
        made[key] = rounded((weight, bias), weights[0])
    return made[key]


def _apply(gm: fx.GraphModule, front: Front, new: list[Weights]) -> None:
    for layer, (weight, bias) in zip(front.layers, new, strict=True):
        replace_node(layer, with_weights(gm, layer, weight, bias))
    node = front.node
    if node.target not in _NORMS:
        replace_node(node, _operands(gm, node)[0] or node)
        return
    given = list(args(node))
    count = 1 if node.target is aten.rms_norm.default else 2
    given[2 : 2 + count] = [None] * len(given[2 : 2 + count])
    kwargs = {k: v for k, v in node.kwargs.items() if k not in ("weight", "bias")}
    with gm.graph.inserting_before(node):
        replace_node(node, g.call(gm.graph, node.target, *given, like=node, **kwargs))
