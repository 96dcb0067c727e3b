"""Takes whole residual blocks out of bodies: x + f(x) becomes x.

A block is what `anatomy` calls one: a resnet, or the branches of a transformer block, in all of its
streams. Where a stream goes through a layer beside the block, that layer stays. Bodies that share
the weights of a block lose it alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from diffopt.analysis.denoiser_structure import Branch, analyze_denoiser
from diffopt.ir import graph as g
from diffopt.ir.nodes import args, stored_tensor
from diffopt.ir.program import Program


@dataclass(frozen=True, eq=False)
class Residual:
    """A block of one or more bodies.

    Attributes:
        name: The component and the module of the first of them.
        weights: What is read inside the block, by identity.
        branches: Of all bodies.
    """

    name: str
    weights: frozenset[int]
    branches: tuple[Branch, ...]

    @property
    def fits(self) -> bool:
        """Whether the streams have the shapes and types of the sums that they would replace."""
        streams = [(_stream(b).meta["val"], b.stream_out.meta["val"]) for b in self.branches]
        return all(a.shape == b.shape and a.dtype == b.dtype for a, b in streams)


def residual_blocks(program: Program, names: Sequence[str]) -> list[Residual]:
    """Return the blocks of some components that have weights, in the graph's order."""
    found: dict[frozenset[int], Residual] = {}
    for name in names:
        gm = program.components[name]
        for block in analyze_denoiser(gm, g.placeholders(gm)).blocks:
            own = _weights(gm, block.branches)
            if not own or any(b.stream_out in g.outputs(gm) for b in block.branches):
                continue
            path = block.last.meta.get("module") or block.last.name
            before = found.get(own)
            branches = (*before.branches, *block.branches) if before else block.branches
            found[own] = Residual(before.name if before else f"{name}.{path}", own, branches)
    return list(found.values())


def _weights(gm: fx.GraphModule, branches: Sequence[Branch]) -> frozenset[int]:
    """Return the identities of what the branches' own nodes read."""
    inside: set[fx.Node] = set()
    for branch in branches:
        inside |= g.ancestors([branch.value]) & g.descendants([branch.source]) - {branch.source}
    tensors = (stored_tensor(gm, n) for node in inside for n in node.all_input_nodes)
    return frozenset(id(tensor) for tensor in tensors if tensor is not None)


def block_score(block: Residual, importance: Mapping[int, Tensor]) -> float:
    """Return what the weights of a block matter together."""
    return sum(float(importance[key].sum()) for key in block.weights if key in importance)


def remove_blocks(blocks: Sequence[Residual]) -> None:
    """Let the streams pass by blocks."""
    for block in blocks:
        for branch in block.branches:
            branch.stream_out.replace_all_uses_with(_stream(branch))


def _stream(branch: Branch) -> fx.Node:
    """Return what a branch's value is added to."""
    a, b = args(branch.stream_out)[:2]
    stream: fx.Node = b if a is branch.value else a
    return stream
