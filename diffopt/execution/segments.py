"""Cuts a body into parts that run one after the other, each for many samples at a time.

Between two parts only what later ones read is kept, so that memory does not grow with the depth.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from diffopt.execution import straight_through
from diffopt.ir import graph as g


@dataclass(eq=False)
class Part:
    """Some nodes of a body.

    Attributes:
        body: The whole.
        ends: What the part is for.
        nodes: What it computes for each sample, in order.
        takes: Arguments of the body and values of earlier parts that it reads.
        fixed: What it reads that is the same for all samples.
        kept: Arguments and values, up to this part, that later ones read.
    """

    body: fx.GraphModule
    ends: list[fx.Node]
    nodes: list[fx.Node]
    takes: list[fx.Node]
    fixed: list[fx.Node]
    kept: set[fx.Node]

    def constants(self) -> straight_through.Values:
        """Return the values of `fixed`."""
        values: straight_through.Values = {}
        needed = g.ancestors(self.fixed)
        for node in self.body.graph.nodes:
            if node in needed and node.op == "get_attr":
                values[node] = g.attribute(self.body, str(node.target)).detach()
        with torch.no_grad():
            straight_through.run(
                (n for n in self.body.graph.nodes if n in needed and n not in values), values
            )
        return {node: values[node] for node in self.fixed}


def cut(body: fx.GraphModule, ends: Sequence[Sequence[fx.Node]]) -> list[Part]:
    """Return the parts that compute some values, each what is left of those before it."""
    living = g.descendants(g.placeholders(body))
    done: set[fx.Node] = set(g.placeholders(body))
    parts = []
    for wanted in ends:
        parts.append(_part(body, list(wanted), living, done))
        done.update(parts[-1].nodes)
    later: set[fx.Node] = set()
    for part in reversed(parts):
        part.kept = set(later)
        later = (later - set(part.nodes)) | set(part.takes)
    return parts


def _part(
    body: fx.GraphModule, ends: list[fx.Node], living: set[fx.Node], done: set[fx.Node]
) -> Part:
    def is_given(node: fx.Node) -> bool:
        # Several results at once are computed again: what is kept is tensors.
        return node in done and isinstance(node.meta["val"], Tensor)

    def above(node: fx.Node) -> Iterable[fx.Node]:
        return () if node not in living or is_given(node) else node.all_input_nodes

    met = g.reachable(ends, above)
    order = [node for node in body.graph.nodes if node in met]
    return Part(
        body,
        ends,
        [n for n in order if n in living and not is_given(n)],
        [n for n in order if n in living and is_given(n)],
        [n for n in order if n not in living],
        set(),
    )


class Run:
    """One sample on its way through the parts of a body."""

    def __init__(self, body: fx.GraphModule, arguments: Sequence[Tensor]) -> None:
        self.values: straight_through.Values = dict(
            zip(g.placeholders(body), arguments, strict=True)
        )

    def inputs(self, part: Part) -> list[Tensor]:
        """Return what a part takes."""
        return [self.values[node] for node in part.takes]

    def advance(self, part: Part, constants: straight_through.Values) -> list[Tensor]:
        """Run a part; keep what later ones read, and return what it is for."""
        results = results_of(part, self.inputs(part), constants)
        self.values |= results
        ends = [results[end] for end in part.ends]
        self.values = {node: self.values[node] for node in part.kept}
        return ends


def results_of(
    part: Part, inputs: Sequence[Tensor], constants: straight_through.Values
) -> straight_through.Values:
    """Return the values of a part's nodes."""
    values = {**constants, **dict(zip(part.takes, inputs, strict=True))}
    with torch.no_grad():
        straight_through.run(part.nodes, values)
    return {node: values[node] for node in part.nodes}
