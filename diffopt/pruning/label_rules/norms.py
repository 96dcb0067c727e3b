"""What norms do to labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.analysis.reachability import packet
from diffopt.ir.nodes import args, argument
from diffopt.ir.printing import target_name
from diffopt.pruning.index_labels import Factors, along, varying
from diffopt.pruning.label_propagation import BodyLabels, Operand, pointwise

aten = torch.ops.aten


def layer_norm(body: BodyLabels, node: fx.Node) -> Factors:
    """Normalize over the last axes: over what is kept of one, but only over all of several."""
    x, normalized = args(node)[:2]
    shape = node.meta["val"].shape
    if len(normalized) > 1:
        last = range(len(shape) - len(normalized), len(shape))
        for factor in body.values[x]:
            body.constrain_along(factor, last, f"{target_name(node)} is over several axes")
    weights = [n for n in args(node)[2:4] if isinstance(n, fx.Node)]
    operands = [body.operand(n) for n in (x, *weights)]
    return pointwise(body, node, shape, operands)  # no index_select of what is normalized


def group_norm(body: BodyLabels, node: fx.Node) -> Factors:
    """Remove whole groups: the statistics of the others remain what they were.

    A single group is as a layer norm: its statistics are those of the channels that are kept.
    """
    x, groups = args(node)[:2]
    factors = []
    for factor in body.values[x]:
        factor = body.labels.collapse(factor, [a for a in range(factor.dim()) if a != 1])
        if groups > 1 and 1 in varying(factor):
            body.labels.collapse(along(factor, 1).reshape(groups, -1), [1])
        factors.append(factor)
    weights = [argument(node, 2, "weight"), argument(node, 3, "bias")]
    return _scaled(body, node, factors, weights)


def batch_norm(body: BodyLabels, node: fx.Node) -> Any:
    """Scale each channel by itself; nothing is known of one that trains."""
    x, *weights = args(node)[:5]
    results = node.meta["val"]
    trains = packet(node) is not aten._native_batch_norm_legit_no_training
    if trains and argument(node, 5, "training"):
        return None  # its statistics are those of the requests
    factors = _scaled(body, node, body.values[x], weights)
    return factors if isinstance(results, Tensor) else [factors, *([] for _ in results[1:])]


def _scaled(
    body: BodyLabels, node: fx.Node, factors: Factors, weights: Sequence[fx.Node | None]
) -> Factors:
    """Combine a value with vectors along its second axis."""
    shape = args(node)[0].meta["val"].shape
    ones = [1] * (len(shape) - 2)
    operands: list[Operand] = [(shape, factors)]
    for size, vectors in (body.operand(n) for n in weights if n is not None):
        operands.append(([*size, *ones], [f.reshape(-1, *ones) for f in vectors]))
    return pointwise(body, node, shape, operands)
