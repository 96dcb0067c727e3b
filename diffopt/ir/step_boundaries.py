"""Where one step of sampling ends and the next begins, and what the latents are there.

Between two steps the latents are what the calls of the next one are about: the value that depends
on the calls before, and from which the next one computes something costly. Other values cross the
boundary, too: earlier predictions, which a multistep solver adds to the next one, and cached
features. Where that does not leave one value, the latents are not known.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.ir import call_tags
from diffopt.ir import graph as g
from diffopt.ir.flops import node_flops
from diffopt.ir.program import Program


@dataclass(frozen=True)
class Boundary:
    """The end of a step.

    Attributes:
        after: The name of the last node of the outer graph that belongs to the step.
        latents: The name of the node whose value is left to the next step; None: not known.
        timestep: How much noise the step began with, as its calls were told; None: not known.
    """

    after: str
    latents: str | None
    timestep: float | None


def step_boundaries(program: Program) -> list[Boundary]:
    """Return the ends of all steps, in the order of the graph; none for a program without a loop.

    A step is an evaluation of the denoiser: with all its branches, and the controlnets before it.
    A solver of second order makes two for each step of its own.
    """
    loops = _loops(program.root)
    cuts = _Cuts(program.root, [call for loop in loops for calls in loop for call in calls])
    boundaries = []
    for loop in loops:
        final = cuts.last(loop[-1])
        shape = None if final[1] is None else _shape(final[1])
        ends = [
            cuts.between(calls, _network_inputs(program, following[0]), shape)
            for calls, following in pairwise(loop)
        ]
        for calls, (after, latents) in zip(loop, [*ends, final], strict=True):
            tag = call_tags.tag(calls[0])
            name = None if latents is None else latents.name
            boundaries.append(Boundary(after.name, name, tag.timestep if tag else None))
    return boundaries


def mark(root: fx.GraphModule, boundaries: Iterable[Boundary]) -> None:
    """Put `meta["step_end"]`, the node of the latents or None, on the node that ends each step.

    A boundary of nodes that the graph does not have is a `ValueError`.
    """
    nodes = {node.name: node for node in root.graph.nodes}
    for boundary in boundaries:
        for name in filter(None, (boundary.after, boundary.latents)):
            if name not in nodes:
                raise ValueError(f"a step ends at {name}, which is not in the graph")
        latents = None if boundary.latents is None else nodes[boundary.latents]
        nodes[boundary.after].meta["step_end"] = latents


def _loops(root: fx.GraphModule) -> list[list[list[fx.Node]]]:
    """Return the calls of each step of each loop, of the components that are called in several.

    Calls of two components belong to one loop where they take turns, as a controlnet and a UNet do.
    """
    tagged = [(n, tag) for n in root.graph.nodes if (tag := call_tags.tag(n)) is not None]
    numbers: dict[str, set[int]] = {}
    for _, tag in tagged:
        numbers.setdefault(tag.component, set()).add(tag.step)
    calls = [(n, tag) for n, tag in tagged if len(numbers[tag.component]) > 1]
    last = {tag.component: index for index, (_, tag) in enumerate(calls)}
    first = {tag.component: index for index, (_, tag) in reversed(list(enumerate(calls)))}
    loops: list[list[list[fx.Node]]] = []
    current: dict[str, int] = {}  # the step that each component of the loop is in
    for call, tag in calls:
        if all(last[name] < first[tag.component] for name in current):
            loops.append([[]])
            current = {}
        elif current.get(tag.component, tag.step) != tag.step:
            loops[-1].append([])
            current = {}
        loops[-1][-1].append(call)
        current[tag.component] = tag.step
    return loops


class _Cuts:
    """The outer graph, cut behind the calls of a step where the fewest values cross."""

    def __init__(self, root: fx.GraphModule, calls: Iterable[fx.Node]) -> None:
        self._nodes = list(root.graph.nodes)
        self._place = {node: index for index, node in enumerate(self._nodes)}
        uses = {node: [self._place[user] for user in node.users] for node in self._nodes}
        self._last_use = {node: max(places, default=-1) for node, places in uses.items()}
        self._variant = g.descendants(calls)
        self._live = self._live_at_calls()

    def _live_at_calls(self) -> dict[int, list[fx.Node]]:
        """Return what is computed up to each call of a component, and read behind it."""
        live: dict[fx.Node, None] = {}
        found = {}
        for index, node in enumerate(self._nodes):
            for read in node.all_input_nodes:
                if self._last_use[read] == index:
                    del live[read]
            if self._last_use[node] > index:
                live[node] = None
            if node.op == "call_module":
                found[index] = list(live)
        return found

    def last(self, calls: Sequence[fx.Node]) -> tuple[fx.Node, fx.Node | None]:
        """Return the node behind which the last step ends, and the one value that it leaves.

        That is at the first of the narrowest places: what follows there is the decoder's scale.
        """
        at, crossing = min(self._places(calls), key=lambda place: (_size(place), place[0]))
        left = self._sources(self._nodes[at + 1 :], at, crossing)
        return self._nodes[at], left[0] if len(left) == 1 else None

    def between(
        self, calls: Sequence[fx.Node], reads: Sequence[fx.Node], shape: torch.Size | None
    ) -> tuple[fx.Node, fx.Node | None]:
        """Return the node behind which a step ends, and the latents of which the next one reads.

        That is at the narrowest place where there is one such value, the last of several: behind
        what a pipeline does to the latents of each step.

        Args:
            calls: Of the step.
            reads: What the next step's network computes of.
            shape: Of the latents; None: not known.
        """
        places = sorted(self._places(calls), key=lambda place: (_size(place), -place[0]))
        for at, crossing in places:
            alike = [n for n in self._sources(reads, at, crossing) if _shape(n) == shape]
            if len(alike) == 1 and shape is not None:
                return self._nodes[at], alike[0]
        return self._nodes[places[0][0]], None

    def _places(self, calls: Sequence[fx.Node]) -> list[tuple[int, list[fx.Node]]]:
        """Return the places before the next call of a component, and what crosses each."""
        start = max(self._place[call] for call in calls)
        end = start + 1
        while end + 1 < len(self._nodes) and self._nodes[end].op != "call_module":
            end += 1
        return [(at, self._crossing(start, at, end)) for at in range(start, end)]

    def _crossing(self, start: int, at: int, end: int) -> list[fx.Node]:
        """Return what is computed up to a place and read behind it, of what steps change.

        Args:
            start: The place of the last call before it.
            at: The place.
            end: That of the next call.
        """
        nodes = [*self._live[start], *self._nodes[start + 1 : at + 1]]
        live = (n for n in nodes if self._last_use[n] > at)
        return [n for n in live if n in self._variant or self._becomes_variant(n, end)]

    def _becomes_variant(self, node: fx.Node, end: int) -> bool:
        """Tell whether a value is replaced by one of the loop, as the first latents are."""
        last = self._nodes[self._last_use[node]]
        return (
            self._place[last] < end
            and last in self._variant
            and _shape(last) is not None
            and _shape(last) == _shape(node)
        )

    def _sources(
        self, targets: Iterable[fx.Node], at: int, crossing: Iterable[fx.Node]
    ) -> list[fx.Node]:
        """Return which of the values that cross a place some nodes behind it need."""
        needed = g.reachable(targets, lambda n: n.all_input_nodes if self._place[n] > at else ())
        return [node for node in crossing if node in needed]


def _size(place: tuple[int, list[fx.Node]]) -> int:
    """Return how many values cross a place: the results of a call are items of one."""
    values = [node.meta["val"] for node in place[1]]
    return sum(len(v) + 1 if isinstance(v, (tuple, list)) else 1 for v in values)


def _network_inputs(program: Program, call: fx.Node) -> list[fx.Node]:
    """Return the arguments of a call of which its body computes something costly."""
    body = program.components[str(call.target)]
    costly = [n for n in body.graph.nodes if n.op == "call_function" and node_flops(n)]
    needed = g.ancestors(costly)
    pairs: Iterable[tuple[fx.Node, Any]] = zip(g.placeholders(body), call.args, strict=True)
    return [arg for formal, arg in pairs if formal in needed and not formal.meta.get("reuse")]


def _shape(node: fx.Node) -> torch.Size | None:
    value = node.meta["val"]
    return value.shape if isinstance(value, Tensor) else None
