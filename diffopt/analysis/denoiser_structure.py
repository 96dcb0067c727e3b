"""What a denoiser's body consists of, found in its graph alone.

Terms:

- A value *lives* if it depends on the arguments that change with the latents and an output depends
  on it. Everything else (weights, the timestep's rows, the prompt's keys and values) is *fixed*.
- A *residual* is an addition of two living values, `stream_out = stream_in + value`, where the
  branch `value` is computed by layers from the stream: from `stream_in`, from what `stream_in` is
  another layout, scale or projection of (`source`; a shortcut's convolution), or, for branches side
  by side, from an earlier value of the same stream.
- A *residual stream* is a chain of such values, x[k+1] = x[k] + f[k](x[k]). It begins where its
  first source is not a residual's result: at an embedding, a concatenation, a resampling. A stream
  whose first value is fixed (the text of a joint attention) begins with `fixed + attention`.
- A *gate* multiplies a branch's value by a fixed value; `ungated` is what it multiplies.
- An *attention* is one fused operator, or products of activations with no layer between them
  (softmax(QK)V, linear attention). It is *cross* if its keys and values are fixed.
- A branch's *kind* is the first that holds of what it does outside of residuals inside it:
  attention or cross-attention, convolution (with a kernel larger than 1 over mixed channels), mlp
  (layers and an activation). It is *other* if none does, and if another stream is inside it: around
  the blocks of a UNet's transformer, or around the denoiser where the solver adds to the latents.
- A *block* is the attentions of a stream and the mlp that follows them, or one branch of another
  kind; blocks of several streams that share an attention are one.
- A *skip* concatenates a value (`shallow`, to which features from outside may have been added) and
  one that layers computed from it (`deep`).

Algorithm: each node's ancestors and descendants are bit sets in the graph's order, so that "between
a and b" is one `&`. Additions are visited in order; the back walks (`Walk.back`) step over what
does not change a value's meaning. Names of modules are never read.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from diffopt.analysis.attention import Attention, find_attentions
from diffopt.analysis.reachability import Walk, packet, shape
from diffopt.analysis.residuals import Residual, attention_before, find_streams, operands, previous

aten = torch.ops.aten

Kind = Literal["attention", "cross-attention", "mlp", "convolution", "other"]


@dataclass(frozen=True, eq=False)
class Branch:
    """What is added to a residual stream: `stream_out` = `stream_in` + `value`.

    Attributes:
        value: The operand of the addition.
        ungated: What the gate multiplies; `value` where there is no gate.
        stream_in: The other operand.
        stream_out: The addition.
        source: The value of the stream that the branch is computed from.
        kind: What the branch does itself.
        attentions: Those of the branch itself.
        inner: The residual branches inside it.
    """

    value: fx.Node
    ungated: fx.Node
    stream_in: fx.Node
    stream_out: fx.Node
    source: fx.Node
    kind: Kind
    attentions: tuple[Attention, ...]
    inner: tuple["Branch", ...]


@dataclass(frozen=True, eq=False)
class Stream:
    """A residual stream: its values from the first source on, and all that branches off it."""

    values: tuple[fx.Node, ...]
    branches: tuple[Branch, ...]


@dataclass(frozen=True, eq=False)
class Block:
    """Branches that belong together, and the values of their streams before and after them.

    Attributes:
        first: The first node, in the graph's order, that works on a stream.
        last: The last addition.
        stream_in: What the first branch of each stream is computed from.
        stream_out: What each stream is afterwards, cast and scaled as later blocks read it.
        branches: In the graph's order.
    """

    first: fx.Node
    last: fx.Node
    stream_in: tuple[fx.Node, ...]
    stream_out: tuple[fx.Node, ...]
    branches: tuple[Branch, ...]


@dataclass(frozen=True, eq=False)
class Skip:
    """A long skip: the concatenation, and its operands; the last in the graph has `index` 0."""

    node: fx.Node
    deep: fx.Node
    shallow: fx.Node
    index: int


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The parts of a body: branches, blocks and streams in the graph's order, skips by index."""

    streams: tuple[Stream, ...]
    blocks: tuple[Block, ...]
    branches: tuple[Branch, ...]
    skips: tuple[Skip, ...]
    attentions: tuple[Attention, ...]

    @property
    def middle(self) -> fx.Node | None:
        """What comes up from the deepest part: the deep operand of the first skip."""
        return self.skips[-1].deep if self.skips else None


def anatomy(body: fx.GraphModule, changing: Collection[fx.Node]) -> Anatomy:
    """Find the parts of a body, of which the placeholders `changing` change with the latents."""
    walk = Walk(body, changing)
    attentions = find_attentions(walk)
    chains = find_streams(walk, attentions)
    made: dict[fx.Node, Branch] = {}
    stream_of = {residual: i for i, chain in enumerate(chains) for residual in chain}
    for residual in sorted(stream_of, key=lambda r: walk.index[r.out]):
        made[residual.out] = _branch(walk, residual, stream_of, made, attentions)
    streams = [_stream(walk, chain, made) for chain in chains]
    return Anatomy(
        tuple(streams),
        tuple(_find_blocks(walk, streams)),
        tuple(made.values()),
        tuple(_find_skips(walk, made)),
        tuple(attentions),
    )


# Branches, streams and blocks


def _branch(
    walk: Walk,
    residual: Residual,
    stream_of: Mapping[Residual, int],
    made: dict[fx.Node, Branch],
    attentions: Sequence[Attention],
) -> Branch:
    own = nodes = _nodes(walk, residual, attentions)
    inner, others = [], False
    for other, stream in stream_of.items():
        if other is not residual and nodes >> walk.index[other.out] & 1:
            inner.append(made[other.out])
            own &= ~_nodes(walk, other, attentions)
            others |= stream != stream_of[residual]
    used = tuple(a for a in attentions if own >> walk.index[a.node] & 1)
    return Branch(
        residual.value,
        _ungated(walk, residual.value),
        residual.stream,
        residual.out,
        residual.source,
        "other" if others else _kind(walk, own, used),
        used,
        tuple(inner),
    )


def _nodes(walk: Walk, residual: Residual, attentions: Sequence[Attention]) -> int:
    """Return the nodes of a branch."""
    nodes = walk.between(residual.source, residual.value)
    if not walk.lives(residual.source):
        # Its own part of the attention may be in a prologue: the result is the least it has.
        end = attention_before(walk, residual.value, attentions)
        if end is not None:
            nodes |= walk.between(end, residual.value) | walk.mask([end])
    return nodes


def _ungated(walk: Walk, value: fx.Node) -> fx.Node:
    """Return what the last gate on the way to a value multiplies."""
    for node in walk.trail(value):
        if packet(node) in (aten.add, aten.sub):
            break
        fixed = [n for n in node.all_input_nodes if not walk.lives(n)]
        if packet(node) is aten.mul and fixed:
            return walk.living_inputs(node)[0]
    return value


def _kind(walk: Walk, own: int, attentions: Sequence[Attention]) -> Kind:
    if attentions:
        return "cross-attention" if all(a.cross for a in attentions) else "attention"
    if own & walk.kernels:
        return "convolution"
    return "mlp" if own & walk.layers and own & walk.activations else "other"


def _stream(walk: Walk, chain: Sequence[Residual], made: Mapping[fx.Node, Branch]) -> Stream:
    by_out = {residual.out: residual for residual in chain}
    current: fx.Node | None = chain[-1].out
    values = []
    while current is not None:
        values.append(current)
        first = by_out[current].source
        current = previous(walk, by_out[current], by_out)
    return Stream((first, *reversed(values)), tuple(made[r.out] for r in chain))


def _find_blocks(walk: Walk, streams: Sequence[Stream]) -> list[Block]:
    """Find the blocks of all streams, in the graph's order."""
    parts: list[list[list[Branch]]] = []  # of each block, for each of its streams the branches
    shared: dict[Attention, list[list[Branch]]] = {}
    for stream in streams:
        for run in _runs(stream.branches):
            used = [a for branch in run for a in branch.attentions]
            block = next((shared[a] for a in used if a in shared), None)
            if block is None:
                block = []
                parts.append(block)
            block.append(run)
            shared.update(dict.fromkeys(used, block))
    blocks = [_block(walk, part) for part in parts]
    return sorted(blocks, key=lambda block: walk.index[block.last])


def _runs(branches: Sequence[Branch]) -> Iterator[list[Branch]]:
    """Split the branches of a stream into those of blocks."""
    waiting: list[Branch] = []
    for branch in branches:
        if "attention" in branch.kind:
            waiting.append(branch)
            continue
        if branch.kind == "mlp":
            yield [*waiting, branch]
        else:
            yield from ([b] for b in [*waiting, branch])
        waiting = []
    yield from ([b] for b in waiting)


def _block(walk: Walk, runs: Sequence[Sequence[Branch]]) -> Block:
    branches = sorted((b for run in runs for b in run), key=lambda b: walk.index[b.stream_out])
    nodes = 0
    for branch in branches:
        nodes |= walk.between(branch.source, branch.stream_out)
    nodes &= walk.alive
    return Block(
        walk.nodes[(nodes & -nodes).bit_length() - 1],
        branches[-1].stream_out,
        tuple(run[0].source for run in runs),
        tuple(_settled(walk, run[-1].stream_out) for run in runs),
        tuple(branches),
    )


def _settled(walk: Walk, node: fx.Node) -> fx.Node:
    """Return a stream's value after the casts and scalings that all its readers see."""
    while len(node.users) == 1:
        (user,) = node.users
        if not walk.lives(user) or walk.back(user) is not node or shape(user) != shape(node):
            break
        node = user
    return node


# Skips


def _find_skips(walk: Walk, residuals: Collection[fx.Node]) -> list[Skip]:
    """Find concatenations of a value with one that is computed from it, the last one first."""
    found: list[Skip] = []
    for node in reversed(walk.nodes):
        operands = walk.living_inputs(node)
        if packet(node) is not aten.cat or len(operands) != 2 or not walk.lives(node):
            continue
        for shallow, deep in (operands, operands[::-1]):
            terms = _terms(walk, shallow, residuals)
            if any(walk.between(n, deep) & walk.layers for n in terms):
                found.append(Skip(node, deep, shallow, len(found)))
                break
    return found


def _terms(walk: Walk, value: fx.Node, residuals: Collection[fx.Node]) -> list[fx.Node]:
    """Return what a value is in other layouts, and what the last of them is the sum of."""
    terms = list(walk.trail(value))
    # A branch is not from outside: its stream goes on.
    pair = operands(terms[-1]) if terms[-1] not in residuals else None
    return [*terms, *(n for term in pair or () for n in walk.trail(term))]
