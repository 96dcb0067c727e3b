"""Finds attentions of tokens with themselves, and the operators that compute each token alone."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from diffopt.analysis.axis_rules import relate, shape
from diffopt.analysis.reachability import FUSED, LAYERS, packet
from diffopt.ir import graph as g
from diffopt.ir import qdq
from diffopt.ir.nodes import args, argument, is_call
from diffopt.ir.op_sets import SPLITS
from diffopt.ir.printing import target_name

aten = torch.ops.aten

ATTENTION = aten.scaled_dot_product_attention.default
LINEAR = aten.linear.default

JOINED = "tokens from several places are joined in it"


class Unfit(Exception):
    """Why tokens cannot be merged in front of an attention."""


@dataclass(frozen=True, eq=False)
class Site:
    """An attention of tokens with themselves.

    Attributes:
        attention: The operator.
        x: What its queries, keys and values are projections of: [batch, tokens, features].
        y: The projection of its result; None where queries are not merged.
        nodes: What works on fewer tokens, in order, each with its axis of them.
        grid: The sizes that the tokens are the product of; one where they are a sequence.
    """

    attention: fx.Node
    x: fx.Node
    y: fx.Node | None
    nodes: Mapping[fx.Node, int]
    grid: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many tokens there are."""
        return int(self.x.meta["val"].shape[1])


def find_site(attention: fx.Node, queries: bool = True) -> Site:
    """Return what can be merged around an attention; raise `Unfit` with the reason if nothing.

    Without `queries`, keys and values alone are of merged tokens.
    """
    mask, causal = argument(attention, 3, "attn_mask"), argument(attention, 5, "is_causal", False)
    if mask is not None or causal:
        raise Unfit("it has a mask, which says which tokens see which")
    x = _source(attention)
    if qdq.activation(x) is not None:
        raise Unfit("its layers are quantized: run merge-tokens before quantize")
    if is_merged(x):
        raise Unfit("its tokens are merged already")
    if x.meta["val"].dim() != 3:
        raise Unfit("its tokens are no [batch, tokens, features]")
    axes = {x: 1}
    above = g.ancestors([attention])
    below = g.descendants([x])
    inner = [node for node in attention.graph.nodes if node in above & below and node is not x]
    for node in inner:
        axes[node] = token_axis(node, axes)
    y = _projection(attention, axes) if queries else None
    del axes[x]
    if not queries:
        needed = g.ancestors([args(attention)[0]])
        if needed & g.ancestors(args(attention)[1:3]) & axes.keys():
            raise Unfit("one layer projects queries and keys: run merge-tokens before fuse")
        axes = {n: axis for n, axis in axes.items() if n not in needed}
    ends = {attention if y is None else y}
    if any(not node.users.keys() <= axes.keys() for node in axes if node not in ends):
        raise Unfit("its projections are read elsewhere as well")
    return Site(attention, x, y, axes, token_grid(x, 1))


def is_merged(x: fx.Node) -> bool:
    """Tell whether a value is tokens that `merge` has merged."""
    inner = args(x)[0] if is_call(x, aten._to_copy.default) else x
    means = args(inner)[0][-1] if is_call(inner, aten.cat.default) else inner
    if not is_call(means, aten.div.Tensor) or not is_call(args(means)[0], aten.add.Tensor):
        return False
    return is_call(args(args(means)[0])[1], aten.matmul.default)


def _source(attention: fx.Node) -> fx.Node:
    """Return the one value that queries, keys and values are projections of."""
    sources = [_sources(node) for node in args(attention)[:3]]
    if not all(sources):
        raise Unfit("it is cross attention" if any(sources) else "no linear projects its tokens")
    while len(every := set().union(*sources)) > 1 and any(map(_factored, every)):
        # Adapters and factored weights are two linears one after the other.
        sources = [{_factored(n) or n for n in side} for side in sources]
    if len(every) == 1:
        return every.pop()
    if sources[0].isdisjoint(sources[1]):
        raise Unfit("it is cross attention")
    raise Unfit(JOINED)


def _sources(node: fx.Node) -> set[fx.Node]:
    """Return what the nearest linears that a value is computed from read."""
    near = g.reachable([node], lambda n: () if packet(n) in LAYERS | FUSED else n.all_input_nodes)
    return {args(n)[0] for n in near if is_call(n, LINEAR)}


def _factored(node: fx.Node) -> fx.Node | None:
    """Return what a linear reads of which a value is the result, or a piece of it."""
    while is_call(node, operator.getitem, *SPLITS):
        node = args(node)[0]
    return args(node)[0] if is_call(node, LINEAR) else None


def _projection(attention: fx.Node, axes: dict[fx.Node, int]) -> fx.Node:
    """Follow the result of an attention to the linear that projects it; add to `axes`."""
    node = attention
    while not is_call(node, LINEAR):
        if len(node.users) != 1:
            raise Unfit("its result is read in several places before it is projected")
        node = next(iter(node.users))
        axes[node] = token_axis(node, axes)
    if axes[node] != 1 or node.meta["val"].dim() != 3:
        raise Unfit("its result is no [batch, tokens, features]")
    return node


# Following the axis of tokens


def token_axis(node: fx.Node, axes: Mapping[fx.Node, int]) -> int:
    """Return the axis of tokens of a node's result, from those of the values that it reads.

    Raises:
        Unfit: An entry of the result needs more than the entry of the same token.
    """
    between = Unfit(f"{target_name(node)} is between the projections")
    rank = len(shape(node))
    if is_call(node, ATTENTION) and all(axes.get(n) == rank - 2 for n in args(node)[:3]):
        return rank - 2  # the keys' tokens are summed over, in any order
    relation = relate(node)
    if relation is None:
        raise between
    read = {indices[axes[n]] for n, indices in relation.operands if n in axes}
    if len(read) != 1 or len(indices := read.pop()) == 0 or indices not in relation.result:
        raise between
    axis = relation.result.index(indices)
    if any(index.kind == "moved" for index in indices):
        raise Unfit(_MOVED[target]) if (target := node.target) in _MOVED else between
    if any(index.kind != "kept" for index in indices):
        raise between
    sources = relation.sources(axis)
    if any(n not in axes and shape(n)[i] > 1 for n, i in sources):
        position = f"{target_name(node)} gives each token something of its own (a position)"
        raise Unfit(position) if torch.Tag.pointwise in node.target.tags else between  # type: ignore[union-attr]
    return axis


_MOVED = {
    aten.slice.Tensor: "some of its tokens are treated in another way",
    aten.cat.default: JOINED,
}


def token_grid(node: fx.Node, axis: int) -> tuple[int, ...]:
    """Return the sizes of the axes that one was merged of, far back; its size if it never was."""
    size = shape(node)[axis]
    stack, seen = [(node, axis)], set[tuple[fx.Node, int]]()
    while stack:
        node, axis = at = stack.pop()
        relation = relate(node)
        if at in seen or relation is None:
            continue
        seen.add(at)
        if len(merged := relation.merged(axis)) > 1:
            return tuple(shape(relation.operands[0][0])[i] for i in merged)
        stack += [(n, i) for n, i in relation.sources(axis) if shape(n)[i] == size]
    return (size,)
