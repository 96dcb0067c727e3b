"""Recover the structure of a denoiser's body (residual streams, blocks, skips) from its graph.

Terms:

- A value is *loop-variant* if it depends on the arguments that change with the latents and an
  output depends on it. Everything else (weights, the timestep's rows, the prompt's keys and values)
  is *loop-invariant*.
- A *residual* is an addition of two loop-variant values, `stream_out = stream_in + value`, where
  the branch `value` is computed by layers from the stream: from `stream_in`, from what `stream_in`
  is another layout, scale or projection of (`source`; a shortcut's convolution), or, for branches
  side by side, from an earlier value of the same stream.
- A *residual stream* is a chain of such values, x[k+1] = x[k] + f[k](x[k]). It begins where its
  first source is not a residual's result: at an embedding, a concatenation, a resampling. A stream
  whose first value is loop-invariant (the text of a joint attention) begins with that value plus an
  attention.
- A *gate* multiplies a branch's value by a loop-invariant one; `ungated` is what it multiplies.
- An *attention* is one fused operator, or products of activations with no layer between them
  (softmax(QK)V, linear attention). It is *cross* if its keys and values are loop-invariant.
- A branch's *kind* is the first that holds of what it does outside of residuals inside it:
  attention or cross-attention, convolution (with a kernel larger than 1 over mixed channels), mlp
  (layers and an activation). It is *other* if none does, and if another stream is inside it: around
  the blocks of a UNet's transformer, or around the denoiser where the solver adds to the latents.
- A *block* is the attentions of a stream and the mlp that follows them, or one branch of another
  kind; blocks of several streams that share an attention are one.
- A *skip* concatenates a value (`shallow`, to which features from outside may have been added) and
  one that layers computed from it (`deep`).

Algorithm: each node's ancestors and descendants are bit sets in the graph's order, so that "between
a and b" is one `&`. Additions are visited in order; `Reachability.origin` steps back over what does
not change a value's meaning. Names of modules are never read.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from diffopt.analysis.attention import Attention, find_attentions
from diffopt.analysis.reachability import Reach, packet, shape
from diffopt.analysis.residuals import Residual, attention_before, find_streams, operands, previous

aten = torch.ops.aten

BranchKind = Literal["attention", "cross-attention", "mlp", "convolution", "other"]


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
    kind: BranchKind
    attentions: tuple[Attention, ...]
    inner: tuple["Branch", ...]


@dataclass(frozen=True, eq=False)
class Stream:
    """A residual stream: its values from the first source on, and all that branches off it."""

    values: tuple[fx.Node, ...]
    branches: tuple[Branch, ...]


@dataclass(frozen=True, eq=False)
class Block:
    """Branches of one block, and the values of their streams before and after them.

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
class DenoiserStructure:
    """The parts of a body: branches, blocks and streams in the graph's order, skips by index."""

    streams: tuple[Stream, ...]
    blocks: tuple[Block, ...]
    branches: tuple[Branch, ...]
    skips: tuple[Skip, ...]
    attentions: tuple[Attention, ...]

    @property
    def middle(self) -> fx.Node | None:
        """The result of the deepest level: the deep operand of the first skip."""
        return self.skips[-1].deep if self.skips else None


def analyze_denoiser(body: fx.GraphModule, loop_variant: Collection[fx.Node]) -> DenoiserStructure:
    """Return the structure of a body; `loop_variant` are the placeholders that see the latents."""
    reach = Reach(body, loop_variant)
    attentions = find_attentions(reach)
    chains = find_streams(reach, attentions)
    branches: dict[fx.Node, Branch] = {}
    stream_of = {residual: i for i, chain in enumerate(chains) for residual in chain}
    for residual in sorted(stream_of, key=lambda r: reach.index[r.out]):
        branches[residual.out] = _branch(reach, residual, stream_of, branches, attentions)
    streams = [_stream(reach, chain, branches) for chain in chains]
    return DenoiserStructure(
        tuple(streams),
        tuple(_find_blocks(reach, streams)),
        tuple(branches.values()),
        tuple(_find_skips(reach, branches)),
        tuple(attentions),
    )


# Branches, streams and blocks


def _branch(
    reach: Reach,
    residual: Residual,
    stream_of: Mapping[Residual, int],
    branches: dict[fx.Node, Branch],
    attentions: Sequence[Attention],
) -> Branch:
    exclusive = nodes = _branch_nodes(reach, residual, attentions)
    inner, others = [], False
    for other, stream in stream_of.items():
        if other is not residual and nodes >> reach.index[other.out] & 1:
            inner.append(branches[other.out])
            exclusive &= ~_branch_nodes(reach, other, attentions)
            others |= stream != stream_of[residual]
    used = tuple(a for a in attentions if exclusive >> reach.index[a.node] & 1)
    return Branch(
        residual.value,
        _ungated(reach, residual.value),
        residual.stream,
        residual.out,
        residual.source,
        "other" if others else _kind(reach, exclusive, used),
        used,
        tuple(inner),
    )


def _branch_nodes(reach: Reach, residual: Residual, attentions: Sequence[Attention]) -> int:
    """Return the nodes of a branch."""
    nodes = reach.between(residual.source, residual.value)
    if not reach.is_loop_variant(residual.source):
        # Its inputs of the attention may be computed in a prologue: the result never is.
        end = attention_before(reach, residual.value, attentions)
        if end is not None:
            nodes |= reach.between(end, residual.value) | reach.bits([end])
    return nodes


def _ungated(reach: Reach, value: fx.Node) -> fx.Node:
    """Return the operand of the last gate in front of a value, or the value itself."""
    for node in reach.origins(value):
        if packet(node) in (aten.add, aten.sub):
            break
        invariant = [n for n in node.all_input_nodes if not reach.is_loop_variant(n)]
        if packet(node) is aten.mul and invariant:
            return reach.loop_variant_inputs(node)[0]
    return value


def _kind(reach: Reach, nodes: int, attentions: Sequence[Attention]) -> BranchKind:
    if attentions:
        return "cross-attention" if all(a.cross for a in attentions) else "attention"
    if nodes & reach.spatial:
        return "convolution"
    return "mlp" if nodes & reach.layers and nodes & reach.activations else "other"


def _stream(reach: Reach, chain: Sequence[Residual], branches: Mapping[fx.Node, Branch]) -> Stream:
    by_out = {residual.out: residual for residual in chain}
    current: fx.Node | None = chain[-1].out
    values = []
    while current is not None:
        values.append(current)
        first = by_out[current].source
        current = previous(reach, by_out[current], by_out)
    return Stream((first, *reversed(values)), tuple(branches[r.out] for r in chain))


def _find_blocks(reach: Reach, streams: Sequence[Stream]) -> list[Block]:
    """Find the blocks of all streams, in the graph's order."""
    runs: list[list[list[Branch]]] = []  # [block][stream]: branches
    shared: dict[Attention, list[list[Branch]]] = {}
    for stream in streams:
        for run in _runs(stream.branches):
            used = [a for branch in run for a in branch.attentions]
            block = next((shared[a] for a in used if a in shared), None)
            if block is None:
                block = []
                runs.append(block)
            block.append(run)
            shared.update(dict.fromkeys(used, block))
    blocks = [_block(reach, block_runs) for block_runs in runs]
    return sorted(blocks, key=lambda block: reach.index[block.last])


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


def _block(reach: Reach, runs: Sequence[Sequence[Branch]]) -> Block:
    branches = sorted((b for run in runs for b in run), key=lambda b: reach.index[b.stream_out])
    nodes = 0
    for branch in branches:
        nodes |= reach.between(branch.source, branch.stream_out)
    nodes &= reach.loop_variant
    return Block(
        reach.nodes[(nodes & -nodes).bit_length() - 1],
        branches[-1].stream_out,
        tuple(run[0].source for run in runs),
        tuple(_final_value(reach, run[-1].stream_out) for run in runs),
        tuple(branches),
    )


def _final_value(reach: Reach, node: fx.Node) -> fx.Node:
    """Return a stream's value after the casts and scalings that all its readers see."""
    while len(node.users) == 1:
        (user,) = node.users
        if (
            not reach.is_loop_variant(user)
            or reach.origin(user) is not node
            or shape(user) != shape(node)
        ):
            break
        node = user
    return node


# Skips


def _find_skips(reach: Reach, residuals: Collection[fx.Node]) -> list[Skip]:
    """Return concatenations of a value with one that is computed from it, the last one first."""
    skips: list[Skip] = []
    for node in reversed(reach.nodes):
        operands = reach.loop_variant_inputs(node)
        if packet(node) is not aten.cat or len(operands) != 2 or not reach.is_loop_variant(node):
            continue
        for shallow, deep in (operands, operands[::-1]):
            terms = _summands(reach, shallow, residuals)
            if any(reach.between(n, deep) & reach.layers for n in terms):
                skips.append(Skip(node, deep, shallow, len(skips)))
                break
    return skips


def _summands(reach: Reach, value: fx.Node, residuals: Collection[fx.Node]) -> list[fx.Node]:
    """Return a value in all its layouts, and the operands of the sum that the first of them is."""
    terms = list(reach.origins(value))
    # The sum of a residual is no sum with features from outside (a ControlNet's).
    pair = operands(terms[-1]) if terms[-1] not in residuals else None
    return [*terms, *(n for term in pair or () for n in reach.origins(term))]
