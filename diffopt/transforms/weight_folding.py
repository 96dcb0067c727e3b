"""Folds of operators into the weights of linear layers and convolutions.

A fold says which operator a layer with other weights computes as well; `fold_all` applies those
that concern all uses of a weight, so that no weight is stored twice. New weights are computed in
float64 and rounded once.
"""

import operator
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.ir import graph as g
from diffopt.ir import weight_origins
from diffopt.ir.matcher import Pattern, Var, any_of, condition, constant_or_none, is_stored
from diffopt.ir.nodes import args, replace_node, stored_tensor, weight_uses
from diffopt.ir.op_sets import CONVOLUTIONS
from diffopt.ir.program import Program

aten = torch.ops.aten

LINEAR = aten.linear.default
TIMES: dict[Any, Any] = {aten.mul.Tensor: operator.mul, aten.div.Tensor: operator.truediv}
PLUS: dict[Any, Any] = {aten.add.Tensor: operator.add, aten.sub.Tensor: operator.sub}

# With fewer bits a rounding of the weights shows, and a scale may be there to avoid overflow.
PRECISE = (torch.float32, torch.float64)

# Conditions in patterns.
number_or_constant = condition(lambda v: is_number(v) or is_stored(v), "is no constant")
_scalar = condition(
    lambda v: is_number(v) or (_is_stored_in_floats(v) and v.meta["val"].dim() == 0),
    "is no constant number",
)
_in_floats = condition(lambda v: _is_stored_in_floats(v), "is not stored in floats")
_node = condition(lambda v: isinstance(v, fx.Node), "is a literal")

Skip = Callable[[str, str], None]
Weights = tuple[Tensor, Tensor | None]


@dataclass(frozen=True, eq=False)
class Affine:
    """What a fold makes of a layer's weight W and bias b: c W s + V, and c b + W t + a.

    All is in float64; None: left out.

    Attributes:
        output_scale: c, one number, or one for each output.
        output_shift: a, one number, or one for each output.
        input_scale: s, one number, or one for each input.
        input_shift: t, one number, or one for each input.
        weight_shift: V, of the shape of the weight.
        sources: What these were computed from.
    """

    output_scale: Tensor | None = None
    output_shift: Tensor | None = None
    input_scale: Tensor | None = None
    input_shift: Tensor | None = None
    weight_shift: Tensor | None = None
    sources: tuple[Tensor | None, ...] = ()

    def apply(self, weight: Tensor, bias: Tensor | None) -> Weights:
        """Return the new weight and bias of those that a layer has, all in float64."""
        terms = [] if bias is None else [self._scaled(bias)]
        if self.input_shift is not None:
            inputs = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
            terms.append(inputs @ self._vector(weight))
        if self.output_shift is not None:
            terms.append(weight.new_zeros(len(weight)) + self.output_shift)
        for factor in self._factors(weight):
            weight = weight * factor
        if self.weight_shift is not None:
            weight = weight + self.weight_shift
        return weight, sum(terms[1:], terms[0]) if terms else None

    def record(self, old: Weights, new: Weights) -> None:
        """Say where the new weight and bias come from, of those that a layer had."""
        (weight, bias), (new_weight, new_bias) = old, new
        known = [source for source in self.sources if source is not None]
        origin, rest = weight_origins.origin_of(weight), weight_origins.unknown
        scaled = origin
        for factor in self._factors(weight):
            scaled = weight_origins.scaled(scaled, factor)
        weight_origins.record(
            new_weight, weight_origins.total([scaled, rest(known, new_weight.shape)])
        )
        if new_bias is None:
            return
        terms = [rest(known, new_bias.shape)]
        if bias is not None:
            of_bias = weight_origins.origin_of(bias)
            scale = self.output_scale
            terms.append(of_bias if scale is None else weight_origins.scaled(of_bias, scale))
        if self.input_shift is not None:
            terms.append(weight_origins.product(origin, self._vector(weight)))
        weight_origins.record(new_bias, weight_origins.total(terms))

    def _scaled(self, bias: Tensor) -> Tensor:
        return bias if self.output_scale is None else self.output_scale * bias

    def _vector(self, weight: Tensor) -> Tensor:
        assert self.input_shift is not None
        return self.input_shift.expand(weight.shape[1])

    def _factors(self, weight: Tensor) -> list[Tensor]:
        """Return the scales as tensors that broadcast to a weight."""
        ones = [1] * (weight.dim() - 2)
        scales = (self.output_scale, (-1, 1)), (self.input_scale, (1, -1))
        return [s.reshape(*shape, *ones) for s, shape in scales if s is not None]


@dataclass(frozen=True, eq=False)
class Fold:
    """An operator that is not needed if some layers have other weights.

    Attributes:
        graph: Name of the graph.
        node: The operator.
        layers: Linear layers and convolutions.
        change: Returns what to make of the layers' weights.
        key: Equal for folds for which `change` returns the same.
        remove: Replaces the operator by what it is computed from, or by a cheaper one.
    """

    graph: str
    node: fx.Node
    layers: tuple[fx.Node, ...]
    change: Callable[[], Affine]
    key: tuple[Any, ...]
    remove: Callable[[fx.Node], None]

    def __str__(self) -> str:
        return f"{self.graph}.{self.node.name}" if self.graph else self.node.name


Find = Callable[[fx.GraphModule, str, fx.Node], Fold | None]
"""Returns the fold of a node in a graph of some name."""

REASONS = (
    "the layer's weight is also used in another way",
    "the new weights would not be finite",
)


def fold_all(
    program: Program, find: Find, skip: Skip, reasons: tuple[str, str] = REASONS
) -> Counter[Any]:
    """Apply the folds that `find` returns until there are no more; count them by operator.

    A weight that is used elsewhere too is kept as it is: the new one would come on top.
    """
    is_used_elsewhere, is_not_finite = reasons
    counts: Counter[Any] = Counter()
    while True:
        skipped: dict[str, str] = {}
        folds = [
            fold
            for name, gm in program.graphs.items()
            for node in gm.graph.nodes
            if (fold := find(gm, name, node)) is not None
        ]
        before = counts.total()
        new: dict[Any, Weights] = {}
        agreeing = _agreeing(program, folds)
        for fold in folds:
            gm = program.graphs[fold.graph]
            if fold not in agreeing:
                skipped[str(fold)] = is_used_elsewhere
                continue
            weights = [_new_weights(gm, fold, layer, new) for layer in fold.layers]
            if not all(t is None or bool(t.isfinite().all()) for pair in weights for t in pair):
                skipped[str(fold)] = is_not_finite
                continue
            counts[fold.node.target] += 1
            fold.remove(fold.node)
            for layer, pair in zip(fold.layers, weights, strict=True):
                replace_node(layer, _with_weights(gm, layer, *pair))
        for gm in program.graphs.values():
            g.prune_unused(gm)
        if counts.total() == before:
            break
    for where, reason in skipped.items():
        skip(where, reason)
    return counts


def _agreeing(program: Program, folds: list[Fold]) -> list[Fold]:
    """Return the folds that concern all uses of their layers' weights, and alike."""
    uses = weight_uses(program)
    keys = {f: [_key(program.graphs[f.graph], f, layer) for layer in f.layers] for f in folds}
    kept: list[Fold] = []
    while len(kept) != len(folds):  # one that is left out can leave others out
        kept = folds
        counts = Counter(key for fold in kept for key in keys[fold])
        folds = [f for f in kept if all(uses[key[0]] == counts[key] for key in keys[f])]
    return kept


def _key(gm: fx.GraphModule, fold: Fold, layer: fx.Node) -> tuple[Any, ...]:
    """Return what is equal for layers with the same new weights; the old weight is first."""
    return (*map(id, layer_weights(gm, layer) or ()), *fold.key)


def _new_weights(
    gm: fx.GraphModule, fold: Fold, layer: fx.Node, new: dict[Any, Weights]
) -> Weights:
    """Return a layer's new weights, of which `new` has those that layers share."""
    key = _key(gm, fold, layer)
    if key not in new:
        old = layer_weights(gm, layer)
        assert old is not None
        (weight, bias), change = old, fold.change()
        new[key] = _rounded(change.apply(weight.detach().double(), double(bias)), weight)
        change.record(old, new[key])
    return new[key]


def _rounded(weights: Weights, like: Tensor) -> Weights:
    """Return weights in the type and memory layout of the weight that they replace."""
    weight, bias = weights
    new = torch.nn.Parameter(torch.empty_like(like).copy_(weight), requires_grad=False)
    if bias is None:
        return new, None
    return new, torch.nn.Parameter(bias.to(like.dtype), requires_grad=False)


# Layers


def _with_weights(
    gm: fx.GraphModule, layer: fx.Node, weight: Tensor, bias: Tensor | None
) -> fx.Node:
    """Insert, before a layer, the same one with other weights."""
    stem = re.sub(r"_(folded_)?weight(_\d+)?$", "", str(args(layer)[1].target))
    with gm.graph.inserting_before(layer):
        arguments = [args(layer)[0], g.get_attr(gm, f"{stem}_folded_weight", weight)]
        if bias is not None or len(layer.args) > 3:
            arguments.append(None if bias is None else g.get_attr(gm, f"{stem}_folded_bias", bias))
        rest = {name: value for name, value in layer.kwargs.items() if name != "bias"}
        return g.call(gm.graph, layer.target, *arguments, *args(layer)[3:], like=layer, **rest)


def _is_stored_in_floats(value: Any) -> bool:
    return is_stored(value) and value.meta["val"].is_floating_point()


def stored_layer(x: Var, weight: Var, bias: Var) -> Var:
    """Return, in a pattern, what a linear layer or convolution with stored weights computes."""
    return any_of(LINEAR, *CONVOLUTIONS)(x, _in_floats(weight), constant_or_none(bias), ...)


LAYER = Pattern(stored_layer)


def layer_weights(gm: fx.GraphModule, node: fx.Node) -> Weights | None:
    """Return the stored weight and bias of a linear layer or convolution; None for other nodes."""
    match = LAYER.match(node)
    if not match:
        return None
    return g.attribute(gm, match["weight"].target), stored_tensor(gm, match["bias"])


def double(tensor: Tensor | None) -> Tensor | None:
    """Return a weight in float64, in which new weights are computed."""
    return None if tensor is None else tensor.detach().double()


def channel_axis(layer: fx.Node) -> int:
    """Return which dimension, from the end, of a layer's input and result the channels are."""
    return -1 if layer.target is LINEAR else -2 - CONVOLUTIONS.index(layer.target)


# Numbers


def is_number(value: Any) -> bool:
    """Tell whether a value is a Python number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def per_channel(gm: fx.GraphModule, value: Any, like: Tensor, axis: int | None) -> Tensor | None:
    """Return a constant as one number, or as one for each channel, in float64.

    Args:
        gm: The graph.
        value: A number or a node.
        like: What it is combined with.
        axis: Where the channels of `like` are, from the end; None if only one number will do.
    """
    if is_number(value):
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


@dataclass(frozen=True)
class Factor:
    """A multiplication of `source` by a number, which is a stored constant or is not."""

    number: float
    source: fx.Node
    stored: bool


@Pattern
def _factor(source: Var, number: Var) -> Var:
    return any_of(*TIMES)(_node(source), _scalar(number))


def factor_of(gm: fx.GraphModule, node: fx.Node) -> Factor | None:
    """Return by which number a node multiplies or divides what; None if it does not."""
    match = _factor.match(node)
    if not match:
        return None
    tensor = stored_tensor(gm, match["number"])
    number = float(match["number"] if tensor is None else tensor)
    if node.target is aten.div.Tensor:
        if number == 0:
            return None
        number = 1 / number
    return Factor(number, match["source"], tensor is not None)
