"""Cuts a body into segments that run one after the other, each for many samples at a time.

Between two segments only what later ones read is kept, so that memory does not grow with the depth.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx

from diffopt.ir import graph as g
from diffopt.ir.interpreter import Hook, Interpreter, Values


@dataclass(eq=False)
class Segment:
    """Some nodes of a body.

    Attributes:
        body: The whole.
        ends: What the segment is for.
        nodes: What it computes for each sample, in order.
        reads: Arguments of the body and values of earlier segments that it reads.
        constant: What it reads that is the same for all samples.
        kept: Arguments and values, up to this segment, that later ones read.
    """

    body: fx.GraphModule
    ends: list[fx.Node]
    nodes: list[fx.Node]
    reads: list[fx.Node]
    constant: list[fx.Node]
    kept: set[fx.Node]

    def constants(self) -> Values:
        """Return the values of `constant`."""
        with torch.no_grad():
            values = Interpreter(self.body, self.constant).values()
        return {n: v.detach() if isinstance(v, Tensor) else v for n, v in values.items()}

    def run(
        self,
        inputs: Sequence[Tensor],
        constants: Mapping[fx.Node, Tensor],
        hook: Hook | None = None,
    ) -> Values:
        """Return the values of the ends, and of what later segments read.

        Args:
            inputs: Values of `reads`.
            constants: Values of `constant`.
            hook: Computes nodes in another way.
        """
        known = {**constants, **dict(zip(self.reads, inputs, strict=True))}
        return self._interpreter.values(known=known, hook=hook)

    @cached_property
    def _interpreter(self) -> Interpreter:
        wanted = [*self.ends, *(n for n in self.nodes if n in self.kept)]
        return Interpreter(self.body, wanted, [*self.reads, *self.constant])


def cut(body: fx.GraphModule, ends: Sequence[Sequence[fx.Node]]) -> list[Segment]:
    """Return the segments that compute some values, each what is left of those before it."""
    variant = g.descendants(g.placeholders(body))
    done: set[fx.Node] = set(g.placeholders(body))
    segments = []
    for wanted in ends:
        segments.append(_segment(body, list(wanted), variant, done))
        done.update(segments[-1].nodes)
    later: set[fx.Node] = set()
    for segment in reversed(segments):
        segment.kept = set(later)
        later = (later - set(segment.nodes)) | set(segment.reads)
    return segments


def _segment(
    body: fx.GraphModule, ends: list[fx.Node], variant: set[fx.Node], done: set[fx.Node]
) -> Segment:
    def is_kept(node: fx.Node) -> bool:
        # Several results at once are computed again: what is kept is tensors.
        return node in done and isinstance(node.meta["val"], Tensor)

    def sources(node: fx.Node) -> Iterable[fx.Node]:
        return () if node not in variant or is_kept(node) else node.all_input_nodes

    reached = g.reachable(ends, sources)
    order = [node for node in body.graph.nodes if node in reached]
    return Segment(
        body,
        ends,
        [n for n in order if n in variant and not is_kept(n)],
        [n for n in order if n in variant and is_kept(n)],
        [n for n in order if n not in variant],
        set(),
    )


class Sample:
    """One sample on its way through the segments of a body.

    Attributes:
        values: Those that later segments read.
    """

    def __init__(self, body: fx.GraphModule, arguments: Sequence[Tensor]) -> None:
        self.values: Values = dict(zip(g.placeholders(body), arguments, strict=True))

    def inputs(self, segment: Segment) -> list[Tensor]:
        """Return what a segment reads."""
        return [self.values[node] for node in segment.reads]

    def advance(self, segment: Segment, constants: Mapping[fx.Node, Tensor]) -> list[Tensor]:
        """Run a segment; keep what later ones read, and return the values of its ends."""
        with torch.no_grad():
            self.values |= segment.run(self.inputs(segment), constants)
        ends = [self.values[end] for end in segment.ends]
        self.values = {node: self.values[node] for node in segment.kept}
        return ends
