"""What operators that move elements do to labels, where moving labels alike is not all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.analysis.reachability import packet
from diffopt.ir import graph as g
from diffopt.ir.nodes import args, argument
from diffopt.ir.printing import target_name
from diffopt.pruning.index_labels import Factors, compressed, narrow, varying
from diffopt.pruning.label_propagation import BodyLabels, note_source, run_on_labels

aten = torch.ops.aten


def strided(body: BodyLabels, node: fx.Node) -> Any:
    """Read some indices of an axis, of which none may be missing if there is a step."""
    axis = argument(node, 1, "dim", 0)
    if argument(node, 4, "step", 1) != 1:
        for factor in body.values[args(node)[0]]:
            reason = f"{target_name(node)} takes every other"
            body.constrain_along(factor, [axis % factor.dim()], reason)
    return run_on_labels(body, node)


def scattered(body: BodyLabels, node: fx.Node) -> Factors | None:
    """Write a value over part of another: only labels that do not vary along it can be removed."""
    whole, part = (body.operand(n) for n in args(node)[:2])
    if len(whole[1]) > 1 or len(part[1]) > 1:
        return None
    axis = argument(node, 2, "dim", 0) % len(whole[0])
    filled = []
    for shape, factors in (whole, part):
        factor = factors[0] if factors else body.labels.fresh(1).expand(tuple(shape))
        if not factors:
            body.labels.constrain(factor, "what it is written over stays")
        body.constrain_along(factor, [axis], f"{target_name(node)} writes over part of it")
        filled.append(factor)
    return [compressed(node.target(*filled, *args(node)[2:], **node.kwargs))]  # type: ignore[operator]


def paired(body: BodyLabels, node: fx.Node) -> Factors:
    """View pairs along the last axis as complex numbers, or back."""
    shape = node.meta["val"].shape
    results = []
    for factor in body.values[args(node)[0]]:
        if packet(node) is aten.view_as_real:
            factor = factor.unsqueeze(-1)
        else:
            factor = body.labels.collapse(factor, [factor.dim() - 1])[..., 0]
        results.append(factor.expand(shape))
    return results


def concatenated(body: BodyLabels, node: fx.Node) -> Factors:
    """Concatenate, or stack along a new axis, factors that vary along the same other axes."""
    axis = argument(node, 1, "dim", 0) % node.meta["val"].dim()
    operands = [body.operand(n) for n in args(node)[0]]
    if packet(node) is aten.stack:
        operands = [
            ([*shape[:axis], 1, *shape[axis:]], [f.unsqueeze(axis) for f in factors])
            for shape, factors in operands
        ]
    results = []
    for others in dict.fromkeys(_besides(f, axis) for _, factors in operands for f in factors):
        alike = [[f for f in fs if _besides(f, axis) == others] for _, fs in operands]
        for factors in alike:
            for factor in factors[1:]:
                body.labels.constrain(factor, f"{target_name(node)} of what goes in two ways")
        firsts = [(s, fs[0] if fs else None) for (s, _), fs in zip(operands, alike, strict=True)]
        results.append(_joined(body, node, firsts, axis))
    return results


def _besides(factor: Tensor, axis: int) -> tuple[int, ...]:
    return tuple(a for a in varying(factor) if a != axis)


def _joined(
    body: BodyLabels, node: fx.Node, parts: Sequence[tuple[Sequence[int], Tensor | None]], axis: int
) -> Tensor:
    """Return one factor of a concatenation; parts without one get a label that is constrained."""
    factors = []
    for shape, factor in parts:
        if factor is None:
            factor = body.labels.fresh(1).expand(tuple(shape))
            body.labels.constrain(factor, "what it is concatenated with stays")
        factors.append(factor)
    fixed = [a for a in range(len(parts[0][0])) if a != axis]
    fixed = [a for a in fixed if not any(a in varying(f) for f in factors)]
    whole = torch.cat([narrow(f, fixed) for f in factors], axis)
    return whole.expand(node.meta["val"].shape)


def shuffled(body: BodyLabels, node: fx.Node) -> Factors:
    """Move channels to places or back, and unite all channels that share one."""
    results = []
    for factor in run_on_labels(body, node):
        places = range(factor.dim() - 2, factor.dim())
        results.append(body.labels.collapse(compressed(factor), places))
    return results


def indexed(body: BodyLabels, node: fx.Node) -> Factors | None:
    """Read by index along one axis."""
    source, indices = args(node)
    places = [i for i, index in enumerate(indices) if index is not None]
    if len(places) != 1 or any(body.values[n] for n in g.nodes_in(indices)):
        return None
    (axis,), count = places, indices[places[0]].meta["val"].dim()
    if indices[axis].meta["val"].dtype == torch.bool:
        return None
    results = []
    for factor in body.values[source]:
        body.constrain_along(factor, [axis], f"{target_name(node)} reads by index")
        one = narrow(factor, [axis]).squeeze(axis)
        for _ in range(count):
            one = one.unsqueeze(axis)
        results.append(one.expand(node.meta["val"].shape))
    return results


def looked_up(body: BodyLabels, node: fx.Node) -> Factors:
    """Read rows of a table."""
    table, index = args(node)[:2]
    note_source(body, node, table, 1)
    rows = []
    for factor in body.values[table]:
        body.constrain_along(factor, [0], "a table is read by index")
        row = narrow(factor, [0]).reshape([1] * index.meta["val"].dim() + [factor.size(1)])
        if 1 in varying(factor):
            rows.append(row.expand(node.meta["val"].shape))
    return rows
