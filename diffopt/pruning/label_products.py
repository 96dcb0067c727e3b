"""What products do to labels: layers, products of activations, attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from diffopt.analysis.reachability import packet
from diffopt.ir.nodes import args, argument, conv_geometry, stored_tensor
from diffopt.ir.printing import target_name
from diffopt.pruning.index_labels import Factors, along, compressed, narrow, varying
from diffopt.pruning.label_propagation import Body, Operand, note_layer, note_source, pointwise

aten = torch.ops.aten

Factor = tuple[str, Operand, fx.Node | None]
"""What is multiplied: a letter for each axis, shape and factors, and what the node reads."""


def contract(
    body: Body, node: fx.Node, one: Factor, other: Factor, shape: Sequence[int], to: str
) -> Factors:
    """Multiply two operands whose axes have letters, and sum over those that the result lacks.

    Where a factor changes along a letter that all three have (heads), all of it goes by that, or,
    if heads are to stay, by what else it changes along.
    """
    what = target_name(node)
    batch = set(one[0]) & set(other[0]) & set(to)
    sums = (set(one[0]) | set(other[0])) - set(to)
    sides = [_Side(letters, *operand, read) for letters, operand, read in (one, other)]
    if body.flow.in_heads:
        for side in sides:
            side.factors = [_in_heads(body, side, factor, batch) for factor in side.factors]
    by_batch = any(set(side.letters_of(f)) & batch for side in sides for f in side.factors)
    found: Factors = []
    kept: list[dict[str, Tensor]] = []
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
                    body.labels.pin(factor, f"{what} sums over it")
                    continue
                rest = [a for a, x in enumerate(side.letters) if x != inner[0]]
                factor, key = body.labels.collapse(factor, rest), inner[0]
            else:
                found.append(side.spread(factor, to, shape))
                continue
            if key in vectors:
                body.labels.tie(vectors[key], factor)
                continue
            vectors[key] = factor
            if set(key) <= batch and not any(key in theirs for theirs in kept):
                found.append(side.spread(factor, to, shape))
        kept.append(vectors)
    _matched(body, node, sides, kept)
    if by_batch:
        body.flow.heads += found
    return found


def _in_heads(body: Body, side: _Side, factor: Tensor, batch: set[str]) -> Tensor:
    """Let a factor be the same in all heads."""
    letters = side.letters_of(factor)
    if not set(letters) & batch or set(letters) <= batch:
        return factor
    heads = [a for a, x in enumerate(side.letters) if x in batch]
    same = body.labels.collapse(factor, heads)
    body.flow.dims.append(same)
    return same


@dataclass
class _Side:
    """One operand of a product: its axes' letters, its shape and its factors."""

    letters: str
    shape: Sequence[int]
    factors: Factors
    read: fx.Node | None = None

    def letters_of(self, factor: Tensor) -> str:
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
        """Return the labels along some letters, which are all along which a factor changes."""
        axes = [self.letters.index(x) for x in letters]
        rest = [a for a in range(factor.dim()) if a not in axes]
        factor = narrow(factor, rest).permute([*axes, *rest])
        return factor.reshape(factor.shape[: len(axes)])

    def size(self, letters: str) -> int:
        """Return the largest size along some letters, 1 where this side has none of them."""
        sizes = [self.shape[self.letters.index(x)] for x in letters if x in self.letters]
        return max(sizes, default=1)


def _matched(
    body: Body, node: fx.Node, sides: Sequence[_Side], kept: Sequence[dict[str, Tensor]]
) -> None:
    """Tie the labels of both operands along the letters that they share, or pin them."""
    products = all(stored_tensor(body.gm, side.read) is None for side in sides)
    for k, (side, vectors) in enumerate(zip(sides, kept, strict=True)):
        other, theirs = sides[1 - k], kept[1 - k]
        for letters, factor in vectors.items():
            labels = side.along(factor, letters)
            if letters in theirs:
                body.labels.tie(labels, other.along(theirs[letters], letters))
                if products:
                    body.flow.sums.append(labels)
            elif other.size(letters) > 1:
                if products and len(letters) == 1 and not other.factors and other.read is not None:
                    body.flow.pick(node, other.read, other.letters.index(letters), labels)
                else:
                    body.labels.pin(factor, f"{target_name(node)} reads it with what stays")


def _letters(count: int) -> str:
    return "ABCDEFGH"[:count]


def matmul(body: Body, node: fx.Node) -> Factors | None:
    """Multiply matrices, with leading axes that broadcast."""
    a, b = args(node)[-2:] if packet(node) in (aten.addmm, aten.baddbmm) else args(node)[:2]
    found = _product(body, node, a, b)
    if packet(node) in (aten.addmm, aten.baddbmm) and found is not None:
        shape = node.meta["val"].shape
        operands = [(shape, found), body.operand(args(node)[0])]
        return pointwise(body, node, shape, operands, (None, args(node)[0]))
    return found


def _product(body: Body, node: fx.Node, a: fx.Node, b: fx.Node) -> Factors | None:
    (one, mine), (other, theirs) = body.operand(a), body.operand(b)
    if min(len(one), len(other)) < 2:
        return None
    note_source(body, node, b, len(other) - 1)
    note_source(body, node, a, len(one) - 2)
    outer = _letters(max(len(one), len(other)) - 2)
    left = outer[len(outer) - len(one) + 2 :] + "mk"
    right = outer[len(outer) - len(other) + 2 :] + "kn"
    sides = (left, (one, mine), a), (right, (other, theirs), b)
    return contract(body, node, *sides, node.meta["val"].shape, outer + "mn")


def linear(body: Body, node: fx.Node) -> Factors:
    """Multiply by a weight [out, in], and add a bias."""
    x, w = args(node)[:2]
    bias = argument(node, 2, "bias")
    note_layer(body, node, w, 0)
    outer = _letters(x.meta["val"].dim() - 1)
    shape = node.meta["val"].shape
    sides = (outer + "k", body.operand(x), x), ("nk", body.operand(w), w)
    found = contract(body, node, *sides, shape, outer + "n")
    if bias is None:
        return found
    return pointwise(body, node, shape, [(shape, found), body.operand(bias)], (None, bias))


def conv(body: Body, node: fx.Node) -> Factors | None:
    """Convolve; with groups, what a group reads and makes goes together."""
    x, w = args(node)[:2]
    transposed = "transpose" in str(packet(node))
    if packet(node) in (aten.convolution, aten._convolution):
        transposed = argument(node, 6, "transposed", False)
        groups = argument(node, 8, "groups", 1)
    elif transposed:
        groups = argument(node, 6, "groups", 1)
    else:
        *_, groups = conv_geometry(node)
    if args(node)[0].meta["val"].dim() != w.meta["val"].dim():
        return None
    note_layer(body, node, w, 1 if transposed else 0)
    places = len(x.meta["val"].shape) - 2
    inner, outer, kernel = "XYZ"[:places], "UVW"[:places], "PQR"[:places]
    shape, what = node.meta["val"].shape, target_name(node)
    for source, axes in ((x, range(2, 2 + places)), (w, range(2, 2 + places))):
        for factor in body.values[source]:
            body.stays(factor, list(axes), f"{what} mixes the axis")
    x_of, w_of = body.operand(x), body.operand(w)
    x_of = x_of[0], [narrow(f, range(2, 2 + places)).expand(f.shape) for f in x_of[1]]
    w_of = w_of[0], [f for f in w_of[1] if not set(varying(f)) & set(range(2, 2 + places))]
    if groups == 1:
        weight = ("kn" if transposed else "nk") + kernel
        sides = ("bk" + inner, x_of, x), (weight, w_of, w)
        found = contract(body, node, *sides, shape, "bn" + outer)
    else:
        found = _grouped(body, what, x_of, w_of, groups, transposed, shape)
    bias = argument(node, 2, "bias")
    if bias is None:
        return found
    size, factors = body.operand(bias)
    form = [f.reshape(-1, *[1] * places) for f in factors]
    return pointwise(body, node, shape, [(shape, found), ([*size, *[1] * places], form)])


def _grouped(
    body: Body,
    what: str,
    x: Operand,
    w: Operand,
    groups: int,
    transposed: bool,
    shape: Sequence[int],
) -> Factors:
    """Let each group of a convolution go as a whole; the weight's other axis stays."""
    labels = body.labels
    first = next((f for f in w[1] if 0 in varying(f)), None)
    reads = [
        labels.collapse(f, [a for a in range(f.dim()) if a != 1]) for f in x[1] if 1 in varying(f)
    ]
    if first is None or transposed or not reads:
        for factor in [*x[1], *w[1]]:
            labels.pin(factor, f"{what} has groups")
        return []
    for factor in w[1]:
        if factor is not first:
            labels.pin(factor, f"{what} has groups")
    made = labels.collapse(along(first, 0).reshape(groups, -1), [1])
    for factor in reads:
        taken = labels.collapse(along(factor, 1).reshape(groups, -1), [1])
        labels.tie(taken[:, :1], made[:, :1])
    out = made.reshape(-1).reshape(1, -1, *[1] * (len(shape) - 2))
    return [out.expand(tuple(shape))]


def attention(body: Body, node: fx.Node) -> Factors:
    """Two products with a softmax between them; one head has no labels of heads."""
    q, k, v = (body.operand(n) for n in args(node)[:3])
    mask = argument(node, 3, "attn_mask")
    query, key, value = args(node)[:3]
    if argument(node, 7, "enable_gqa", False):
        k, v = (_more_heads(operand, q[0][-3]) for operand in (k, v))
        key = value = None  # they have fewer heads than indices to pick
    outer = _letters(len(q[0]) - 2)
    shape = [*q[0][:-1], k[0][-2]]
    sides = (outer + "ld", q, query), (outer + "md", k, key)
    scores = contract(body, node, *sides, shape, outer + "lm")
    if mask is not None:
        operands = [(shape, scores), body.operand(mask)]
        scores = pointwise(body, node, shape, operands, (None, mask))
    mixed = [len(shape) - 1]
    if argument(node, 5, "is_causal", False):
        mixed.append(len(shape) - 2)  # the mask is of places
    for factor in scores:
        body.stays(factor, mixed, f"{target_name(node)} mixes the axis")
    weighted = (outer + "lm", (shape, scores), None), (outer + "md", v, value)
    return contract(body, node, *weighted, node.meta["val"].shape, outer + "ld")


def _more_heads(operand: Operand, heads: int) -> Operand:
    shape, factors = operand
    times = heads // shape[-3]
    wide = [f.repeat_interleave(times, -3) for f in map(lambda f: narrow(f, [0]), factors)]
    new = [*shape[:-3], heads, *shape[-2:]]
    return new, [compressed(f).expand(new) for f in wide]


def einsum(body: Body, node: fx.Node) -> Factors | None:
    """Multiply two operands, or turn the axes of one."""
    equation, operands = args(node)[:2]
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or "." in equation or any(len(set(t)) != len(t) for t in [*terms, out]):
        return None
    shape = node.meta["val"].shape
    if len(terms) == 1 and set(terms[0]) == set(out):
        side = _Side(terms[0], *body.operand(operands[0]))
        return [side.spread(f, out, shape) for f in side.factors]
    if len(terms) != 2:
        return None
    one, other = ((t, body.operand(n), n) for t, n in zip(terms, operands, strict=True))
    return contract(body, node, one, other, shape, out)


def embedding(body: Body, node: fx.Node) -> Factors:
    """Read rows of a table."""
    table, index = args(node)[:2]
    found = []
    note_source(body, node, table, 1)
    for factor in body.values[table]:
        body.stays(factor, [0], "a table is read by index")
        row = narrow(factor, [0]).reshape([1] * index.meta["val"].dim() + [factor.size(1)])
        if 1 in varying(factor):
            found.append(row.expand(node.meta["val"].shape))
    return found
