"""What products do to labels: layers, products of activations, attention.

The indices of a product are the letters of an einsum (`axis_rules`). Summing over a letter unites
both operands' labels along it; a letter that one operand and the result have carries its labels on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from diffopt.analysis.axis_rules import Axes, relate
from diffopt.analysis.reachability import packet
from diffopt.ir.nodes import args, schema_argument, stored_tensor
from diffopt.ir.printing import target_name
from diffopt.pruning.index_labels import Factors, along, compressed, narrow, varying
from diffopt.pruning.label_propagation import (
    BodyLabels,
    note_layer,
    note_source,
    pointwise,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class Side:
    """One operand of a product.

    Attributes:
        letters: One for each axis.
        shape: Its sizes.
        factors: Its labels.
        read: The operand as the node reads it; None if its indices cannot be selected there.
    """

    letters: str
    shape: Sequence[int]
    factors: Factors
    read: fx.Node | None = None

    def letters_of(self, factor: Tensor) -> str:
        """Return the letters of the axes along which a factor varies."""
        return "".join(self.letters[a] for a in varying(factor))

    def spread(self, factor: Tensor, to: str, shape: Sequence[int]) -> Tensor:
        """Return a factor in the axes of the result."""
        missing = [a for a, x in enumerate(self.letters) if x not in to]
        factor = narrow(factor, missing)
        for axis in reversed(missing):
            factor = factor.squeeze(axis)
        letters = [x for x in self.letters if x in to]
        factor = factor.permute([letters.index(x) for x in to if x in letters])
        for axis, letter in enumerate(to):
            if letter not in letters:
                factor = factor.unsqueeze(axis)
        return factor.expand(tuple(shape))

    def along(self, factor: Tensor, letters: str) -> Tensor:
        """Return the labels along some letters, which are all along which a factor varies."""
        axes = [self.letters.index(x) for x in letters]
        rest = [a for a in range(factor.dim()) if a not in axes]
        factor = narrow(factor, rest).permute([*axes, *rest])
        return factor.reshape(factor.shape[: len(axes)])

    def size(self, letters: str) -> int:
        """Return the largest size along some letters, 1 where this side has none of them."""
        sizes = [self.shape[self.letters.index(x)] for x in letters if x in self.letters]
        return max(sizes, default=1)


def contract(
    body: BodyLabels, node: fx.Node, sides: Sequence[Side], to: str, shape: Sequence[int]
) -> Factors:
    """Multiply two operands, and sum over the letters that the result lacks.

    A factor that varies along a letter that all three have (heads) is united along its other axes,
    so that whole heads are removed; or, if heads are kept, along the heads.
    """
    batch = set(sides[0].letters) & set(sides[1].letters) & set(to)
    sums = {*sides[0].letters, *sides[1].letters} - set(to)
    if body.flow.in_heads:
        sides = [
            replace(side, factors=[_in_heads(body, side, factor, batch) for factor in side.factors])
            for side in sides
        ]
    by_batch = any(set(side.letters_of(f)) & batch for side in sides for f in side.factors)
    results: Factors = []
    shared: list[dict[str, Tensor]] = []  # of each side: factors by the letters of both sides
    for side in sides:
        vectors: dict[str, Tensor] = {}
        for factor in side.factors:
            letters = side.letters_of(factor)
            if by_batch and set(letters) & batch:
                rest = [a for a, x in enumerate(side.letters) if x not in batch]
                factor = body.labels.collapse(factor, rest)
                key = "".join(x for x in letters if x in batch)
            elif set(letters) & sums:
                inner = [x for x in letters if x in sums]
                if len(inner) > 1 or by_batch:
                    body.labels.constrain(factor, f"{target_name(node)} sums over it")
                    continue
                rest = [a for a, x in enumerate(side.letters) if x != inner[0]]
                factor, key = body.labels.collapse(factor, rest), inner[0]
            else:
                results.append(side.spread(factor, to, shape))
                continue
            if key in vectors:
                body.labels.union(vectors[key], factor)
                continue
            vectors[key] = factor
            if set(key) <= batch and not any(key in others for others in shared):
                results.append(side.spread(factor, to, shape))
        shared.append(vectors)
    _unite(body, node, sides, shared)
    if by_batch:
        body.flow.heads += results
    return results


def _in_heads(body: BodyLabels, side: Side, factor: Tensor, batch: set[str]) -> Tensor:
    """Unite the labels of all heads."""
    letters = side.letters_of(factor)
    if not set(letters) & batch or set(letters) <= batch:
        return factor
    heads = [a for a, x in enumerate(side.letters) if x in batch]
    same = body.labels.collapse(factor, heads)
    body.flow.dims.append(same)
    return same


def _unite(
    body: BodyLabels, node: fx.Node, sides: Sequence[Side], shared: Sequence[dict[str, Tensor]]
) -> None:
    """Unite the labels of both operands along the letters that they share, or constrain them."""
    products = all(stored_tensor(body.gm, side.read) is None for side in sides)
    for k, (side, vectors) in enumerate(zip(sides, shared, strict=True)):
        other, others = sides[1 - k], shared[1 - k]
        for letters, factor in vectors.items():
            labels = side.along(factor, letters)
            if letters in others:
                body.labels.union(labels, other.along(others[letters], letters))
                if products:
                    body.flow.sums.append(labels)
            elif other.size(letters) > 1:
                if products and len(letters) == 1 and not other.factors and other.read is not None:
                    axis = other.letters.index(letters)
                    body.flow.index_select(node, other.read, axis, labels)
                else:
                    reason = f"{target_name(node)} reads it with what stays"
                    body.labels.constrain(factor, reason)


def _sides(body: BodyLabels, node: fx.Node) -> tuple[list[Side], str] | None:
    """Return the operands of a product, and the letters of its result."""
    relation = relate(node)
    if relation is None:
        return None
    sides = [Side(_letters(axes), *body.operand(n), n) for n, axes in relation.operands]
    return sides, _letters(relation.result)


def _letters(axes: Axes) -> str:
    return "".join(index.name for axis in axes for index in axis)


def product(body: BodyLabels, node: fx.Node) -> Factors | None:
    """Multiply two operands and add a third to their product, or permute the axes of one."""
    if (terms := _sides(body, node)) is None or len(terms[0]) > 3:
        return None
    (one, *others), to = terms
    shape = node.meta["val"].shape
    if not others:
        same = len(one.letters) == len(to)
        return [one.spread(f, to, shape) for f in one.factors] if same else None
    factors = contract(body, node, [one, others[0]], to, shape)
    for bias in others[1:]:
        operands = [(shape, factors), (bias.shape, bias.factors)]
        factors = pointwise(body, node, shape, operands, (None, bias.read))
    return factors


def matmul(body: BodyLabels, node: fx.Node) -> Factors | None:
    """Multiply matrices, either of which may be a weight."""
    if relate(node) is None:
        return None
    a, b = args(node)[-2:] if packet(node) in (aten.addmm, aten.baddbmm) else args(node)[:2]
    note_source(body, node, b, b.meta["val"].dim() - 1)
    note_source(body, node, a, a.meta["val"].dim() - 2)
    return product(body, node)


def linear(body: BodyLabels, node: fx.Node) -> Factors | None:
    """Multiply by a weight [out, in], and add a bias."""
    note_layer(body, node, args(node)[1], 0)
    return product(body, node)


def convolution(body: BodyLabels, node: fx.Node) -> Factors | None:
    """Multiply by a weight as a linear layer does, and mix places."""
    if (terms := _sides(body, node)) is None:
        return None
    (x, w, *biases), to = terms
    shape, what = node.meta["val"].shape, target_name(node)
    transposed, groups = w.letters[0] == "i", schema_argument(node, "groups")
    note_layer(body, node, args(node)[1], w.letters.index("o"))
    places = range(2, len(shape))
    for factor in (*x.factors, *w.factors):
        body.constrain_along(factor, places, f"{what} mixes the axis")
    x = replace(x, factors=[narrow(f, places) for f in x.factors])
    w = replace(w, factors=[f for f in w.factors if not set(varying(f)) & set(places)])
    if groups == 1:
        factors = contract(body, node, [x, w], to, shape)
    elif transposed:
        factors = _constrain_all(body, what, x, w)
    else:
        factors = _grouped(body, node, x, w, groups)
    ones = [1] * len(places)
    for bias in biases:
        vectors = [f.reshape(-1, *ones) for f in bias.factors]
        operands = [(shape, factors), ([*bias.shape, *ones], vectors)]
        factors = pointwise(body, node, shape, operands)
    return factors


def _constrain_all(body: BodyLabels, what: str, *sides: Side) -> Factors:
    for side in sides:
        for factor in side.factors:
            body.labels.constrain(factor, f"{what} has groups")
    return []


def _grouped(body: BodyLabels, node: fx.Node, x: Side, w: Side, groups: int) -> Factors:
    """Unite what each group of a convolution reads and computes; keep the weight's other axis."""
    labels, what = body.labels, target_name(node)
    outputs = next((f for f in w.factors if 0 in varying(f)), None)
    inputs = [
        labels.collapse(f, [a for a in range(f.dim()) if a != 1])
        for f in x.factors
        if 1 in varying(f)
    ]
    if outputs is None or not inputs:
        return _constrain_all(body, what, x, w)
    _constrain_all(body, what, replace(w, factors=[f for f in w.factors if f is not outputs]))
    computed = labels.collapse(along(outputs, 0).reshape(groups, -1), [1])
    for factor in inputs:
        read = labels.collapse(along(factor, 1).reshape(groups, -1), [1])
        labels.union(read[:, :1], computed[:, :1])
    shape = node.meta["val"].shape
    return [computed.reshape(1, -1, *[1] * (len(shape) - 2)).expand(shape)]


def attention(body: BodyLabels, node: fx.Node) -> Factors | None:
    """Multiply twice, with a softmax between; one head has no labels of heads.

    As einsums: scores = ...ld,...md->...lm, and the result is ...lm,...mv->...lv.
    """
    if (terms := _sides(body, node)) is None:
        return None
    (q, k, v, *masks), to = terms
    if schema_argument(node, "enable_gqa"):
        # They have fewer heads than indices to select.
        k, v = (_more_heads(side, q.shape[-3]) for side in (k, v))
    letters, shape = q.letters[:-1] + k.letters[-2], [*q.shape[:-1], k.shape[-2]]
    scores = contract(body, node, [q, k], letters, shape)
    for mask in masks:
        operands = [(shape, scores), (mask.shape, mask.factors)]
        scores = pointwise(body, node, shape, operands, (None, mask.read))
    mixed = [len(shape) - 1]  # by the softmax
    if schema_argument(node, "is_causal"):
        mixed.append(len(shape) - 2)  # the mask is of places
    for factor in scores:
        body.constrain_along(factor, mixed, f"{target_name(node)} mixes the axis")
    weights = Side(letters, shape, scores)
    return contract(body, node, [weights, v], to, node.meta["val"].shape)


def _more_heads(side: Side, heads: int) -> Side:
    """Repeat heads of keys or values, so that each head of queries has its own."""
    times = heads // side.shape[-3]
    wide = [narrow(f, [0]).repeat_interleave(times, -3) for f in side.factors]
    shape = [*side.shape[:-3], heads, *side.shape[-2:]]
    return replace(
        side, shape=shape, factors=[compressed(f).expand(shape) for f in wide], read=None
    )
