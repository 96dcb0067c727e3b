"""Merges tokens in front of attentions of tokens with themselves: ToMe for SD.

The matching is that of "Token Merging for Fast Stable Diffusion" (Bolya and Hoffman 2023): some
tokens are destinations, every other one finds its most similar destination, and the pairs that are
most alike are merged into their mean. Which are merged is computed from the tokens; how many are is
known at compile time, so that all shapes are fixed. `places` says into which each token is
merged, and gathering results at it puts each one back where the token was.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from diffopt.analysis.token_attention import Site
from diffopt.ir import graph as g
from diffopt.ir.nodes import args, is_call
from diffopt.ir.op_sets import RESHAPES

aten = torch.ops.aten

CELL = 2
"""One token of each square of so many is a destination; of a sequence, one in that squared."""


# Which tokens


def destinations(grid: Sequence[int], random: torch.Generator | None) -> Tensor:
    """Return the indices of the tokens that others are merged into, in order.

    In a grid these are one of each square of 2 x 2 (of its last two axes), in a sequence one in 4:
    the first, or a random one that is the same in every run.
    """
    rows, columns = grid[-2:] if len(grid) > 1 else (1, grid[0])
    high, wide = (CELL, CELL) if len(grid) > 1 else (1, CELL * CELL)
    count = math.prod(grid[:-2])
    down, right = -(-rows // high), -(-columns // wide)
    shape = count, down, right
    y, x = (torch.arange(n) * step for n, step in ((down, high), (right, wide)))
    y, x = y[None, :, None].expand(shape), x[None, None, :].expand(shape)
    if random is not None:
        y = y + torch.randint(high, shape, generator=random)
        x = x + torch.randint(wide, shape, generator=random)
    y, x = y.clamp(max=rows - 1), x.clamp(max=columns - 1)
    frames = torch.arange(count)[:, None, None] * rows * columns
    return (frames + y * columns + x).flatten().sort().values


def merged_count(grid: Sequence[int], ratio: float) -> int:
    """Return how many tokens go when a share of them is merged."""
    total = math.prod(grid)
    return min(int(ratio * total), total - len(destinations(grid, None)))


# Rewriting


def merge(gm: fx.GraphModule, site: Site, count: int, into: Tensor) -> None:
    """Let an attention and its projections work on `count` tokens fewer.

    Args:
        gm: Where.
        site: The attention.
        count: How many tokens are merged into others.
        into: The indices of those others.
    """
    graph, size = gm.graph, site.count - count
    with graph.inserting_before(next(iter(site.nodes))):
        means, places = _merged(gm, site, count, into)
    new = {site.x: means}
    for node in site.nodes:
        with graph.inserting_before(node):
            new[node] = _resized(node, site.nodes, new, size)
    end, back = site.y, new[site.y or site.attention]
    if end is not None:
        with graph.inserting_before(end):
            index = g.call(graph, aten.unsqueeze.default, places, -1, like=end)
            shape = list(end.meta["val"].shape)
            index = g.call(graph, aten.expand.default, index, shape, like=end)
            back = g.call(graph, aten.gather.default, back, 1, index, like=end)
    (end or site.attention).replace_all_uses_with(back)
    for node in reversed(list(site.nodes)):
        graph.erase_node(node)


def _resized(
    node: fx.Node, axes: Mapping[fx.Node, int], new: Mapping[fx.Node, fx.Node], size: int
) -> fx.Node:
    """Insert a copy of a node that reads `new` values, whose axis has another size."""
    arguments, kwargs = fx.map_arg((args(node), node.kwargs), lambda n: new.get(n, n))
    if is_call(node, *RESHAPES):
        shape = list(arguments[1])
        if shape[axes[node]] != -1:
            shape[axes[node]] = size
        arguments = arguments[0], shape
    return g.call(node.graph, node.target, *arguments, like=node, **kwargs)


def _merged(gm: fx.GraphModule, site: Site, removed: int, into: Tensor) -> tuple[fx.Node, fx.Node]:
    """Compute the tokens that are kept, and where among them each token is: [batch, tokens].

    Sums are products with a matrix of zeros and ones: unlike adding up at indices, all targets have
    that, and it sums in the same order in every run.
    """
    graph, x = gm.graph, site.x
    batch, count, features = x.meta["val"].shape
    rest = torch.ones(count, dtype=torch.bool).index_fill(0, into, False).nonzero().flatten()
    kept = len(rest) - removed  # in front of the destinations
    back = torch.cat([rest, into]).argsort()

    def call(target: object, *arguments: object) -> fx.Node:
        return g.call(graph, target, *arguments, like=x)

    def constant(name: str, value: Tensor) -> fx.Node:
        return g.get_attr(gm, f"tokens_{name}", value)

    def picked(values: fx.Node, index: fx.Node, size: int) -> fx.Node:
        wide = call(aten.unsqueeze.default, index, -1)
        wide = call(aten.expand.default, wide, [batch, size, features])
        return call(aten.gather.default, values, 1, wide)

    wide = g.to_dtype(graph, x, torch.float32)
    norm = call(aten.linalg_vector_norm.default, wide, 2, [-1], True)
    unit = call(aten.div.Tensor, wide, call(aten.clamp_min.default, norm, 1e-12))
    free, fixed = constant("free", rest), constant("into", into)
    others = call(aten.index_select.default, unit, 1, fixed)
    alike = call(aten.index_select.default, unit, 1, free)
    alike = call(aten.matmul.default, alike, call(aten.transpose.int, others, 1, 2))
    best = call(aten.max.dim, alike, 2)
    nearest = call(operator.getitem, best, 1)
    order = call(aten.topk.default, call(operator.getitem, best, 0), len(rest), 1)
    order = call(operator.getitem, order, 1)
    merged = call(aten.slice.Tensor, order, 1, 0, removed)
    unmerged = call(aten.slice.Tensor, order, 1, removed, len(rest))
    chosen = call(aten.gather.default, nearest, 1, merged)

    tokens = call(aten.index_select.default, wide, 1, free)
    sources = picked(tokens, merged, removed)
    rows = constant("rows", torch.arange(len(into))[None, :, None])
    ones = call(aten.eq.Tensor, call(aten.unsqueeze.default, chosen, 1), rows)
    ones = call(aten.where.self, ones, *(constant(f"{n}", torch.tensor(float(n))) for n in (1, 0)))
    total = call(aten.index_select.default, wide, 1, fixed)
    total = call(aten.add.Tensor, total, call(aten.matmul.default, ones, sources))
    share = call(aten.add.Tensor, call(aten.sum.dim_IntList, ones, [-1], True), 1)
    means = call(aten.div.Tensor, total, share)
    if kept:
        means = call(aten.cat.default, [picked(tokens, unmerged, kept), means], 1)

    moved = call(aten.add.Tensor, chosen, kept)
    first = constant("own", torch.arange(kept)[None])
    moved = call(aten.cat.default, [moved, call(aten.expand.default, first, [batch, kept])], 1)
    where = call(aten.scatter.src, call(aten.zeros_like.default, nearest), 1, order, moved)
    last = constant("last", torch.arange(kept, kept + len(into))[None])
    both = call(aten.cat.default, [where, call(aten.expand.default, last, [batch, len(into)])], 1)
    places = call(aten.index_select.default, both, 1, constant("back", back))
    return g.to_dtype(graph, means, x.meta["val"].dtype), places
