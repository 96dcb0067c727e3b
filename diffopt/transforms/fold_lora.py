"""Sees low-rank adapters as a change of the weights that they adapt."""

from functools import partial

import torch
from torch import Tensor, fx

from diffopt.ir.nodes import args, conv_geometry, is_call, same_layout
from diffopt.transforms.weight_folding import (
    LINEAR,
    Fold,
    Weights,
    double,
    factor_of,
    layer_weights,
    noops_skipped,
    weights_key,
)

aten = torch.ops.aten


def find_lora(gm: fx.GraphModule, name: str, node: fx.Node) -> Fold | None:
    """See layer(x) + scale * up(down(x)) as one layer with weight + scale * up @ down."""
    if not is_call(node, aten.add.Tensor) or node.kwargs:
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
        key = weights_key(weights, *weights_key(first, *weights_key(second, scale)))
        return Fold(name, base, node, base, key, partial(_merged, weights, first, second, scale))
    return None


def _scaled(gm: fx.GraphModule, node: fx.Node) -> tuple[float, fx.Node]:
    """Take multiplications by numbers off a node; return their product and what is left."""
    scale = 1.0
    while (found := factor_of(gm, node := noops_skipped(gm, node))) is not None:
        scale *= found.number
        node = found.source
    return scale, node


def _is_low_rank(
    gm: fx.GraphModule, base: fx.Node, up: fx.Node, down: fx.Node, weight: Tensor, second: Tensor
) -> bool:
    if noops_skipped(gm, args(down)[0]) is not noops_skipped(gm, args(base)[0]):
        return False
    if not base.target is up.target is down.target:
        return False
    if base.target is LINEAR:
        return True
    plain = conv_geometry(up)[:-1] == tuple([n] * (second.dim() - 2) for n in (1, 0, 1))
    pointwise = all(size == 1 for size in second.shape[2:])
    alike = conv_geometry(down) == conv_geometry(base)
    grouped = conv_geometry(up)[-1] != 1 or conv_geometry(base)[-1] != 1
    return plain and pointwise and alike and not grouped


def _merged(weights: Weights, first: Weights, second: Weights, scale: float) -> Weights:
    weight, bias = map(double, weights)
    (a, a_bias), (b, b_bias) = map(double, first), map(double, second)
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
