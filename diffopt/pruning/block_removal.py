"""Remove whole residual blocks from bodies: x + f(x) becomes x.

A block is one of `denoiser_structure`: a resnet, or the branches of a transformer block, in all of
its streams. A layer on the shortcut is kept. A block is removed from all bodies that share its
weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from diffopt.analysis.denoiser_structure import Branch, analyze_denoiser
from diffopt.ir import graph as g
from diffopt.ir.nodes import args, module_path, stored_tensor
from diffopt.ir.program import Program


@dataclass(frozen=True, eq=False)
class ResidualBlock:
    """A residual block, in all bodies that share its weights.

    Attributes:
        name: The component and the module of the first of them.
        weights: The ids of its weights.
        branches: Of all bodies.
    """

    name: str
    weights: frozenset[int]
    branches: tuple[Branch, ...]

    @property
    def fits(self) -> bool:
        """Whether each stream can replace the sum: its shape and dtype are equal."""
        streams = [(_stream(b).meta["val"], b.stream_out.meta["val"]) for b in self.branches]
        return all(a.shape == b.shape and a.dtype == b.dtype for a, b in streams)


def residual_blocks(program: Program, names: Sequence[str]) -> list[ResidualBlock]:
    """Return the blocks of some components that have weights, in the graph's order."""
    blocks: dict[frozenset[int], ResidualBlock] = {}
    for name in names:
        gm = program.components[name]
        for block in analyze_denoiser(gm, g.placeholders(gm)).blocks:
            weights = _weights(gm, block.branches)
            if not weights or any(b.stream_out in g.outputs(gm) for b in block.branches):
                continue
            path = module_path(block.last)
            known = blocks.get(weights)
            branches = (*known.branches, *block.branches) if known else block.branches
            blocks[weights] = ResidualBlock(
                known.name if known else f"{name}.{path}", weights, branches
            )
    return list(blocks.values())


def _weights(gm: fx.GraphModule, branches: Sequence[Branch]) -> frozenset[int]:
    """Return the ids of the stored tensors that the branches' nodes read."""
    inside: set[fx.Node] = set()
    for branch in branches:
        inside |= g.ancestors([branch.value]) & g.descendants([branch.source]) - {branch.source}
    tensors = (stored_tensor(gm, n) for node in inside for n in node.all_input_nodes)
    return frozenset(id(tensor) for tensor in tensors if tensor is not None)


def block_score(block: ResidualBlock, importance: Mapping[int, Tensor]) -> float:
    """Return the importance of a block: the sum over its weights."""
    # In the order of `importance`: a set's would give other sums in each process.
    return sum(float(values.sum()) for key, values in importance.items() if key in block.weights)


def remove_blocks(blocks: Sequence[ResidualBlock]) -> None:
    """Replace the results of blocks by their streams."""
    for block in blocks:
        for branch in block.branches:
            branch.stream_out.replace_all_uses_with(_stream(branch))


def _stream(branch: Branch) -> fx.Node:
    """Return the operand to which a branch's value is added."""
    a, b = args(branch.stream_out)[:2]
    stream: fx.Node = b if a is branch.value else a
    return stream
