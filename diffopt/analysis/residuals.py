"""Find residuals: the additions of a branch to its stream; see `denoiser_structure` for terms."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from diffopt.analysis.attention import Attention
from diffopt.analysis.reachability import LAYERS, Reach, packet, shape
from diffopt.ir import graph as g

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Residual:
    """`out` = `stream` + `value`, and the stream's value that the branch is computed from."""

    out: fx.Node
    stream: fx.Node
    value: fx.Node
    source: fx.Node


def find_streams(reach: Reach, attentions: Sequence[Attention]) -> list[list[Residual]]:
    """Return the residuals of each stream, in the graph's order."""
    chains = _group(reach, _find_residuals(reach))
    _add_heads(reach, chains, attentions)
    return chains


def operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return the two tensors that a node adds."""
    if packet(node) is not aten.add or node.kwargs.get("alpha", 1) != 1 or len(node.args) != 2:
        return None
    a, b = node.args
    return (a, b) if isinstance(a, fx.Node) and isinstance(b, fx.Node) and a is not b else None


def _find_residuals(reach: Reach) -> dict[fx.Node, Residual]:
    """Return the additions of a branch to its stream, by node, in the graph's order."""
    residuals: dict[fx.Node, Residual] = {}
    for node in reach.nodes:
        pair = operands(node)
        if pair is None or not all(reach.is_loop_variant(n) for n in pair):
            continue
        # The plainest explanation of an addition, whichever operand the stream is.
        for rule in (_identity, _projection, _side_by_side):
            for stream, value in (pair, pair[::-1]):
                source = rule(reach, stream, value, residuals)
                if source is not None and node not in residuals:
                    residuals[node] = Residual(node, stream, value, source)
    return residuals


_Known = dict[fx.Node, Residual]


def _identity(reach: Reach, stream: fx.Node, value: fx.Node, known: _Known) -> fx.Node | None:
    """Return the branch's source where it is the stream itself, in whichever layout."""
    sources = (n for n in reach.origins(stream) if reach.between(n, value) & reach.layers)
    return next(sources, None)


def _projection(reach: Reach, stream: fx.Node, value: fx.Node, known: _Known) -> fx.Node | None:
    """Return it where one linear layer is on the stream and the branch is more than linear."""
    *_, last = reach.origins(stream)
    if packet(last) not in LAYERS:
        return None
    source = _identity(reach, reach.loop_variant_inputs(last)[0], value, known)
    if source is None or not reach.between(source, value) & reach.nonlinear:
        return None
    return source


def _side_by_side(reach: Reach, stream: fx.Node, value: fx.Node, known: _Known) -> fx.Node | None:
    """Return it where parallel branches were added to the stream before this one."""
    before = next((known[n] for n in reach.origins(stream) if n in known), None)
    while before is not None:
        source = _identity(reach, before.stream, value, known)
        if source is not None:
            return source
        before = next((known[n] for n in reach.origins(before.stream) if n in known), None)
    return None


def _group(reach: Reach, residuals: _Known) -> list[list[Residual]]:
    """Put the residuals of each stream together."""
    chains: list[list[Residual]] = []
    chain_of: dict[fx.Node, list[Residual]] = {}
    starts: dict[fx.Node, list[Residual]] = {}
    for residual in residuals.values():
        before = previous(reach, residual, chain_of)
        *_, start = reach.origins(residual.source)
        chain = chain_of[before] if before is not None else starts.setdefault(start, [])
        if not chain:
            chains.append(chain)
        chain.append(residual)
        chain_of[residual.out] = chain
    return chains


def previous(reach: Reach, residual: Residual, known: Collection[fx.Node]) -> fx.Node | None:
    """Return the result of the residual before this one in its stream."""
    for start in (residual.stream, residual.source):
        for node in reach.origins(start):
            if node in known:
                return node
    return None


def _add_heads(
    reach: Reach, chains: Sequence[list[Residual]], attentions: Sequence[Attention]
) -> None:
    """Put the sum of a loop-invariant value and an attention in front of streams that begin so."""
    for chain in chains:
        for node in reach.origins(chain[0].source):
            head = _head(reach, node)
            if head is None or not attention_before(reach, head.value, attentions):
                continue
            sides = (_head(reach, user) for user in head.stream.users if user is not node)
            before = reach.ancestors[head.value]
            inner = [
                side for side in sides if side is not None and before >> reach.index[side.out] & 1
            ]
            chain[:0] = sorted([*inner, head], key=lambda r: reach.index[r.out])
            break


def _head(reach: Reach, node: fx.Node) -> Residual | None:
    """Return a sum of a loop-variant value and an invariant one of full shape, not a weight."""
    pair = operands(node)
    if pair is None or len(reach.loop_variant_inputs(node)) != 1:
        return None
    value, stream = pair if reach.is_loop_variant(pair[0]) else pair[::-1]
    if shape(stream) != shape(node) or not reach.ancestors[stream] & reach.arguments:
        return None
    return Residual(node, stream, value, stream)


def attention_before(
    reach: Reach, value: fx.Node, attentions: Sequence[Attention]
) -> fx.Node | None:
    """Return the last attention if a value depends on attentions alone; else None."""
    ends = {attention.node for attention in attentions}
    seen = g.reachable([value], lambda n: () if n in ends else reach.loop_variant_inputs(n))
    if not all(map(reach.loop_variant_inputs, seen)):
        return None
    return max(seen & ends, key=lambda n: reach.index[n])
