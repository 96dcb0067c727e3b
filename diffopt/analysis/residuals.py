"""Residuals in a graph: the additions of a branch to its stream; see `anatomy` for the terms."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from diffopt.analysis.attention import Attention
from diffopt.analysis.reachability import LAYERS, Walk, packet, shape
from diffopt.ir import graph as g

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Residual:
    """`out` = `stream` + `value`, and the stream's value that the branch is computed from."""

    out: fx.Node
    stream: fx.Node
    value: fx.Node
    source: fx.Node


def find_streams(walk: Walk, attentions: Sequence[Attention]) -> list[list[Residual]]:
    """Return the residuals of each stream, in the graph's order."""
    chains = _group(walk, _find_residuals(walk))
    _add_heads(walk, chains, attentions)
    return chains


def operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return the two tensors that a node adds."""
    if packet(node) is not aten.add or node.kwargs.get("alpha", 1) != 1 or len(node.args) != 2:
        return None
    a, b = node.args
    return (a, b) if isinstance(a, fx.Node) and isinstance(b, fx.Node) and a is not b else None


def _find_residuals(walk: Walk) -> dict[fx.Node, Residual]:
    """Find the additions of a branch to its stream, in the graph's order."""
    found: dict[fx.Node, Residual] = {}
    for node in walk.nodes:
        pair = operands(node)
        if pair is None or not all(walk.lives(n) for n in pair):
            continue
        # The plainest explanation of an addition, whichever operand the stream is.
        for rule in (_identity, _projection, _side_by_side):
            for stream, value in (pair, pair[::-1]):
                source = rule(walk, stream, value, found)
                if source is not None and node not in found:
                    found[node] = Residual(node, stream, value, source)
    return found


_Found = dict[fx.Node, Residual]


def _identity(walk: Walk, stream: fx.Node, value: fx.Node, found: _Found) -> fx.Node | None:
    """Find the branch's source where it is the stream itself, in whichever layout."""
    sources = (n for n in walk.trail(stream) if walk.between(n, value) & walk.layers)
    return next(sources, None)


def _projection(walk: Walk, stream: fx.Node, value: fx.Node, found: _Found) -> fx.Node | None:
    """Find it where one linear layer is on the stream; the branch then is more than linear."""
    *_, last = walk.trail(stream)
    if packet(last) not in LAYERS:
        return None
    source = _identity(walk, walk.living_inputs(last)[0], value, found)
    if source is None or not walk.between(source, value) & walk.nonlinear:
        return None
    return source


def _side_by_side(walk: Walk, stream: fx.Node, value: fx.Node, found: _Found) -> fx.Node | None:
    """Find it where branches before this one were added to the stream in the meantime."""
    before = next((found[n] for n in walk.trail(stream) if n in found), None)
    while before is not None:
        source = _identity(walk, before.stream, value, found)
        if source is not None:
            return source
        before = next((found[n] for n in walk.trail(before.stream) if n in found), None)
    return None


def _group(walk: Walk, residuals: _Found) -> list[list[Residual]]:
    """Put the residuals of each stream together."""
    chains: list[list[Residual]] = []
    of: dict[fx.Node, list[Residual]] = {}
    starts: dict[fx.Node, list[Residual]] = {}
    for residual in residuals.values():
        before = previous(walk, residual, of)
        *_, start = walk.trail(residual.source)
        chain = of[before] if before is not None else starts.setdefault(start, [])
        if not chain:
            chains.append(chain)
        chain.append(residual)
        of[residual.out] = chain
    return chains


def previous(walk: Walk, residual: Residual, known: Collection[fx.Node]) -> fx.Node | None:
    """Return the result of the residual before this one in its stream."""
    for start in (residual.stream, residual.source):
        for node in walk.trail(start):
            if node in known:
                return node
    return None


def _add_heads(
    walk: Walk, chains: Sequence[list[Residual]], attentions: Sequence[Attention]
) -> None:
    """Put `fixed + attention` in front of the streams that begin so."""
    for chain in chains:
        for node in walk.trail(chain[0].source):
            head = _head(walk, node)
            if head is None or not attention_before(walk, head.value, attentions):
                continue
            detours = (_head(walk, user) for user in head.stream.users if user is not node)
            before = walk.above[head.value]
            inner = [d for d in detours if d is not None and before >> walk.index[d.out] & 1]
            chain[:0] = sorted([*inner, head], key=lambda r: walk.index[r.out])
            break


def _head(walk: Walk, node: fx.Node) -> Residual | None:
    """Return an addition of a living value to a fixed one of full shape that is no weight."""
    pair = operands(node)
    if pair is None or len(walk.living_inputs(node)) != 1:
        return None
    value, stream = pair if walk.lives(pair[0]) else pair[::-1]
    if shape(stream) != shape(node) or not walk.above[stream] & walk.arguments:
        return None
    return Residual(node, stream, value, stream)


def attention_before(walk: Walk, value: fx.Node, attentions: Sequence[Attention]) -> fx.Node | None:
    """Return the attention that all of a value comes from; None if some of it does not."""
    ends = {attention.node for attention in attentions}
    seen = g.reach([value], lambda n: () if n in ends else walk.living_inputs(n))
    if not all(map(walk.living_inputs, seen)):
        return None
    return max(seen & ends, key=lambda n: walk.index[n])
