"""Folds arithmetic behind linear layers and convolutions into their weights."""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from diffopt import graph as g
from diffopt import noops
from diffopt.program import Program
from diffopt.rewrite import (
    args,
    argument,
    calls,
    graphs,
    replace,
    same_layout,
    stored,
    weight_uses,
)

aten = torch.ops.aten

LINEAR = aten.linear.default
CONVS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
_RESHAPES = (
    *(aten.view.default, aten.transpose.int, aten.permute.default, aten.reshape.default),
    *(aten.unsqueeze.default, aten.squeeze.dim),
)
_TIMES = {aten.mul.Tensor: operator.mul, aten.div.Tensor: operator.truediv}
_PLUS = {aten.add.Tensor: operator.add, aten.sub.Tensor: operator.sub}

# With fewer bits a rounding of the weights shows, and a scale may be there to avoid overflow.
_PRECISE = (torch.float32, torch.float64)

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
    while True:
        folds = [
            fold
            for name, gm in graphs(program).items()
            for node in gm.graph.nodes
            if (fold := find(gm, name, node)) is not None
        ]
        uses = weight_uses(program)
        keys = [fold.key for fold in folds]
        made: dict[Any, Weights] = {}
        done = 0
        for fold in folds:
            weight = stored(graphs(program)[fold.graph], args(fold.layer)[1])
            if uses[id(weight)] != keys.count(fold.key):
                skip(str(fold), "the layer's weight is also used in another way")
                continue
            if fold.key not in made:
                made[fold.key] = _rounded(fold.make(), weight)
            if not all(t is None or bool(t.isfinite().all()) for t in made[fold.key]):
                skip(str(fold), "the new weights would not be finite")
                continue
            _apply(graphs(program)[fold.graph], fold, *made[fold.key])
            done += 1
        for gm in graphs(program).values():
            g.prune_unused(gm)
        if not done:
            return count
        count += done


def _rounded(weights: Weights, like: Tensor | None) -> Weights:
    dtype = like.dtype if like is not None else None
    weight, bias = (
        None if t is None else torch.nn.Parameter(t.to(dtype).contiguous(), requires_grad=False)
        for t in weights
    )
    assert weight is not None
    return weight, bias


def _apply(gm: fx.GraphModule, fold: Fold, weight: Tensor, bias: Tensor | None) -> None:
    layer = fold.layer
    stem = str(args(layer)[1].target).removesuffix("_weight").removesuffix("_folded")
    with gm.graph.inserting_before(layer):
        given = [args(layer)[0], g.get_attr(gm, f"{stem}_folded_weight", weight)]
        given.append(None if bias is None else g.get_attr(gm, f"{stem}_folded_bias", bias))
        if bias is None and len(layer.args) <= 3:
            given.pop()
        new = g.call(gm.graph, layer.target, *given, *args(layer)[3:], like=layer)
    value = new if fold.value is layer else fold.value
    layer.replace_all_uses_with(new)
    replace(fold.last, value)


# Layers


def layer_weights(gm: fx.GraphModule, node: Any) -> Weights | None:
    """Return the stored weight and bias of a linear layer or convolution; None for other nodes."""
    if not calls(node, LINEAR, *CONVS) or node.kwargs.keys() - {"bias"} or len(node.args) < 2:
        return None
    weight, bias = stored(gm, args(node)[1]), argument(node, 2, "bias")
    if weight is None or not weight.is_floating_point():
        return None
    return None if bias is not None and stored(gm, bias) is None else (weight, stored(gm, bias))


def _key(weights: Weights, *more: Any) -> tuple[Any, ...]:
    return (*map(id, weights), *more)


def _double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().double()


def _geometry(node: fx.Node) -> tuple[Any, ...]:
    """Return stride, padding, dilation and groups of a convolution."""
    defaults = [[1], [0], [1], 1]
    given = [args(node)[i] if len(node.args) > i else defaults[i - 3] for i in range(3, 7)]
    dims = args(node)[1].meta["val"].dim() - 2
    *sizes, groups = given
    lists = [[s] if isinstance(s, int) else list(s) for s in sizes]
    return (*(tuple(s * dims if len(s) == 1 else s) for s in lists), groups)


# LoRA


def find_lora(gm: fx.GraphModule, name: str, node: fx.Node) -> Fold | None:
    """See layer(x) + scale * up(down(x)) as one layer with weight + scale * up @ down."""
    if not calls(node, aten.add.Tensor) or node.kwargs:
        return None
    for base, branch in (args(node)[:2], args(node)[1::-1]):
        weights = layer_weights(gm, base)
        if weights is None or len(base.users) > 1 or not isinstance(branch, fx.Node):
            continue
        scale, up = _scaled(gm, branch)
        down = noops_skipped(gm, args(up)[0]) if layer_weights(gm, up) else None
        second, first = layer_weights(gm, up), layer_weights(gm, down)
        if second is None or first is None or down is None or len(branch.users) > 1:
            continue
        if not _is_low_rank(gm, base, up, down, weights[0], second[0]):
            continue
        if not same_layout(node, base):
            continue
        key = _key(weights, *_key(first, *_key(second, scale)))
        return Fold(name, base, node, base, key, partial(_merged, weights, first, second, scale))
    return None


def noops_skipped(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Return the node whose value `node` passes on unchanged."""
    while (source := noops.unchanged(gm, node)) is not None:
        node = source
    return node


def _scaled(gm: fx.GraphModule, node: fx.Node) -> tuple[float, fx.Node]:
    """Take multiplications by numbers off a node; return their product and what is left."""
    scale = 1.0
    while (found := _factor(gm, node := noops_skipped(gm, node))) is not None:
        scale *= found[0]
        node = found[1]
    return scale, node


def number(gm: fx.GraphModule, value: Any) -> float | None:
    """Return a Python number, or the only element of a floating-point constant."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    tensor = stored(gm, value)
    if tensor is None or tensor.dim() or not tensor.is_floating_point():
        return None
    return float(tensor)


def _is_low_rank(
    gm: fx.GraphModule, base: fx.Node, up: fx.Node, down: fx.Node, weight: Tensor, second: Tensor
) -> bool:
    if noops_skipped(gm, args(down)[0]) is not noops_skipped(gm, args(base)[0]):
        return False
    if not base.target is up.target is down.target:
        return False
    if base.target is LINEAR:
        return True
    plain = _geometry(up) == tuple((n,) * len(second.shape[2:]) for n in (1, 0, 1)) + (1,)
    pointwise = all(size == 1 for size in second.shape[2:])
    alike = _geometry(down) == _geometry(base) and _geometry(base)[-1] == 1
    return plain and pointwise and alike


def _merged(weights: Weights, first: Weights, second: Weights, scale: float) -> Weights:
    weight, bias = map(_double, weights)
    (a, a_bias), (b, b_bias) = map(_double, first), map(_double, second)
    assert weight is not None and a is not None and b is not None  # noqa: PT018
    b = b.flatten(1)
    low_rank = (b @ a.flatten(1)).reshape(weight.shape)
    extra = torch.zeros(len(b), dtype=b.dtype)
    if a_bias is not None:
        extra = extra + b @ a_bias
    if b_bias is not None:
        extra = extra + b_bias
    if a_bias is not None or b_bias is not None:
        bias = scale * extra + (0 if bias is None else bias)
    return weight + scale * low_rank, bias


# Scales and shifts


def find_scale(gm: fx.GraphModule, name: str, node: fx.Node) -> Fold | None:
    """See layer(x) * c, layer(x) / c, layer(x) + c and layer(x) - c as one layer."""
    if not calls(node, *_TIMES, *_PLUS) or node.kwargs or len(node.args) != 2:
        return None
    one, other = args(node)
    commutes = node.target in (aten.mul.Tensor, aten.add.Tensor)
    if commutes and isinstance(other, fx.Node) and not _is_layer_view(gm, one):
        one, other = other, one
    if not isinstance(one, fx.Node) or not same_layout(node, one):
        return None
    layer = _layer_of(gm, one)
    weights = layer_weights(gm, layer)
    if layer is None or weights is None or weights[0].dtype not in _PRECISE:
        return None
    constant = _per_channel(gm, layer, other, whole=layer is not one)
    if constant is None:
        return None
    change = id(stored(gm, other)) if isinstance(other, fx.Node) else other
    key = _key(weights, node.target, type(other), change)
    return Fold(name, layer, node, one, key, partial(_changed, weights, node.target, constant))


def _is_layer_view(gm: fx.GraphModule, node: Any) -> bool:
    return isinstance(node, fx.Node) and _layer_of(gm, node) is not None


def _layer_of(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Return the layer whose result `node` is, perhaps in another shape, if that is its only use."""
    while len(node.users) == 1:
        if layer_weights(gm, node) is not None:
            return node
        if not calls(node, *_RESHAPES):
            return None
        node = args(node)[0]
    return None


def _per_channel(gm: fx.GraphModule, layer: fx.Node, value: Any, *, whole: bool) -> Tensor | None:
    """Return a constant as one number for each output channel of a layer, or one (`whole`: only)."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.tensor([value], dtype=torch.float64)
    tensor = stored(gm, value)
    result = layer.meta["val"]
    if tensor is None or tensor.dtype != result.dtype or tensor.dim() > result.dim():
        return None
    if tensor.numel() == 1:
        return tensor.detach().double().reshape(1)
    axis = result.dim() - 1 if layer.target is LINEAR else result.dim() - tensor_dims(layer)
    shape = [1] * (result.dim() - tensor.dim()) + list(tensor.shape)
    others = [size for index, size in enumerate(shape) if index != axis]
    if whole or shape[axis] != result.shape[axis] or any(size != 1 for size in others):
        return None
    return tensor.detach().double().reshape(-1)


def tensor_dims(layer: fx.Node) -> int:
    """Return how many dimensions a convolution's channels and space have together."""
    return 1 + CONVS.index(layer.target) + 1


def _changed(weights: Weights, target: Any, constant: Tensor) -> Weights:
    weight, bias = map(_double, weights)
    assert weight is not None
    if target in _TIMES:
        column = constant.reshape(-1, *[1] * (weight.dim() - 1))
        times = _TIMES[target]
        return times(weight, column), None if bias is None else times(bias, constant)
    if bias is None:
        bias = weight.new_zeros(len(weight))
    return weight, _PLUS[target](bias, constant)


def combine_scales(gm: fx.GraphModule) -> int:
    """Multiply once where a value is multiplied or divided by numbers twice; return how often."""
    count = 0
    for node in list(gm.graph.nodes):
        outer = _factor(gm, node)
        inner = _factor(gm, outer[1]) if outer and len(outer[1].users) == 1 else None
        if outer is None or inner is None or node.meta["val"].dtype not in _PRECISE:
            continue
        scale, source = outer[0] * inner[0], inner[1]
        if not math.isfinite(scale) or abs(scale) < torch.finfo(torch.float32).tiny:
            continue
        with gm.graph.inserting_before(node):
            single = g.call(gm.graph, aten.mul.Tensor, source, scale, like=node)
        if same_layout(single, node):
            replace(node, single)
            count += 1
        else:
            gm.graph.erase_node(single)
    return count


def _factor(gm: fx.GraphModule, node: fx.Node) -> tuple[float, fx.Node] | None:
    """Return by which number a node multiplies a value, and the value."""
    if not calls(node, *_TIMES) or node.kwargs:
        return None
    one, other = args(node)
    if (
        isinstance(other, fx.Node)
        and node.target is aten.mul.Tensor
        and number(gm, one) is not None
    ):
        one, other = other, one
    factor = number(gm, other)
    if factor is None or not isinstance(one, fx.Node):
        return None
    if node.target is aten.mul.Tensor:
        return factor, one
    return (1 / factor, one) if factor else None
