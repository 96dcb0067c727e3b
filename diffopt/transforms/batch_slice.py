"""Let a component compute one part of its results' rows: the half of a batch that is needed.

Before, the second half alone being read:

    %both: float32[2,4,8,8] = aten.cat([%x, %x])
    %unet: (float32[2,4,8,8]) = unet(%both, %row, %keys)
    …
    %half: float32[1,4,8,8] = aten.slice.Tensor(%result, 0, 1, 2)

After:

    %keys_half: float32[1,16,16] = aten.slice.Tensor(%keys, 0, 1, 2)
    %unet: (float32[1,4,8,8]) = unet_half(%x, %row, %keys_half)

The part that is read is followed backwards through the body by the rules of `parts`. What has no
rule, or is read whole as well, is computed whole and the part is cut out of it: never wrong, only
no cheaper. A body made so is run against the whole one before it is used.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from diffopt.analysis.axis_rules import Part, Way, way
from diffopt.core.equivalence import difference
from diffopt.ir import graph as g
from diffopt.ir.nodes import args, fake_call, is_call
from diffopt.ir.step_tables import first_after_arguments

aten = torch.ops.aten

Results = Mapping[int, int | None]
"""Results by index, in order: the axis along which a part is wanted; None: all of it."""


@dataclass(frozen=True)
class Halved:
    """A body that computes a part of its results.

    Attributes:
        body: Its graph.
        takes: Of each argument: which one of the whole body's it is, and the axis along which it is
            the part; None: it is whole.
        blocked: The operators that no rule led through, from the results back.
    """

    body: fx.GraphModule
    takes: list[tuple[int, int | None]]
    blocked: list[fx.Node]

    def arguments(self, whole: Sequence[Tensor], part: Part) -> list[Tensor]:
        """Return its arguments from those of the whole body."""
        given = ((whole[index], axis) for index, axis in self.takes)
        return [tensor if axis is None else part.cut(tensor, axis) for tensor, axis in given]


def halve(whole: fx.GraphModule, results: Results, part: Part) -> Halved:
    """Return the body that computes a part of some results; others are left out."""
    body = g.clone(whole)
    returned, takes = g.outputs(body), g.placeholders(body)
    work = _Halving(body, part)
    work.demand([(returned[index], axis) for index, axis in results.items()])
    work.rewrite()
    g.set_outputs(body, [work.given(returned[i], axis) for i, axis in results.items()])
    g.prune_unused(body)
    read = [(index, node) for index, node in enumerate(takes) if node.users]
    for node in takes:
        if not node.users:
            body.graph.erase_node(node)
    body.recompile()
    return Halved(body, [(index, work.axes.get(node)) for index, node in read], work.blocked)


class _Halving:
    """Rewrites a body in place.

    Attributes:
        axes: The nodes of which a part is computed, with its axis.
        blocked: The operators without a rule.
    """

    def __init__(self, body: fx.GraphModule, part: Part) -> None:
        self.body = body
        self.part = part
        self.axes: dict[fx.Node, int] = {}
        self.blocked: list[fx.Node] = []
        self._ways: dict[fx.Node, Way] = {}
        self._cuts: dict[tuple[fx.Node, int], fx.Node] = {}

    def demand(self, wanted: Sequence[tuple[fx.Node, int | None]]) -> None:
        """Find out of which nodes a part is enough, from the results back."""
        demands: dict[fx.Node, set[int | None]] = {}
        for node, axis in wanted:
            demands.setdefault(node, set()).add(axis)
        for node in reversed(self.body.graph.nodes):
            if node not in demands:
                continue
            found = self._enough(node, demands[node])
            sources = g.nodes_in((found.args, node.kwargs)) if found else node.all_input_nodes
            for source in sources:
                axis = found.axes.get(source) if found else None
                demands.setdefault(source, set()).add(axis)
        for node in self.body.graph.nodes:  # what is taken from a split that stays whole is whole
            if is_call(node, operator.getitem) and args(node)[0] not in self.axes:
                self.axes.pop(node, None)

    def _enough(self, node: fx.Node, wanted: set[int | None]) -> Way | None:
        """Note that a part of a node is enough where it is, and return how it is computed."""
        axis = next(iter(wanted))
        if len(wanted) > 1 or axis is None:
            return None
        if node.op == "placeholder" and self.part.divides(node, axis):
            self.axes[node] = axis
        found = way(node, axis, self.part)
        if found is not None:
            self.axes[node], self._ways[node] = axis, found
        elif node.op == "call_function":
            self.blocked.append(node)
        return found

    def rewrite(self) -> None:
        """Make these nodes compute a part alone."""
        for node in list(self.body.graph.nodes):
            if node not in self.axes:
                continue
            if node.op == "placeholder":
                node.meta["val"] = g.fake(self.part.cut(node.meta["val"], self.axes[node]))
                continue
            self._rewrite(node, self._ways[node])

    def _rewrite(self, node: fx.Node, how: Way) -> None:
        given = fx.map_arg((how.args, node.kwargs), lambda n: self.given(n, how.axes.get(n)))
        node.target, (node.args, node.kwargs) = how.target, given
        node.meta["val"] = fake_call(node.target, node.args, node.kwargs)

    def given(self, node: fx.Node, axis: int | None) -> fx.Node:
        """Return a node or, where it is whole and a part is wanted, the part of it."""
        if axis is None or self.axes.get(node) == axis:
            return node
        if (node, axis) not in self._cuts:
            self._cuts[node, axis] = _slice(self.body, node, axis, self.part)
        return self._cuts[node, axis]


def error(whole: fx.GraphModule, halved: Halved, results: Results, part: Part) -> float:
    """Return how far the results are from the part of the whole body's, on random arguments.

    It is relative, in units of the rounding that the results' type allows.
    """
    source = torch.Generator().manual_seed(0)
    given = [_random(node.meta["val"], source) for node in g.placeholders(whole)]
    with torch.no_grad():
        expected = whole(*given)
        made = halved.body(*halved.arguments(given, part))
    worst = 0.0
    for tensor, (index, axis) in zip(made, results.items(), strict=True):
        other = expected[index] if axis is None else part.cut(expected[index], axis)
        # A deep network makes more of a rounding than the rounding itself.
        allowed = torch.finfo(other.dtype).eps ** (2 / 3) if other.is_floating_point() else 1e-9
        worst = max(worst, difference([tensor], [other])[1] / allowed)
    return worst


def _random(value: Tensor, source: torch.Generator) -> Tensor:
    if value.is_floating_point():
        made = torch.randn(value.shape, generator=source)
    else:
        made = torch.randint(0, 2, value.shape, generator=source)
    return made.to(value.dtype)


class Cutter:
    """Cuts a part out of values of the outer graph, where they are made if that costs nothing.

    Attributes:
        known: Parts by value and axis, to which those that are known can be added.
    """

    def __init__(self, root: fx.GraphModule, part: Part) -> None:
        self.root = root
        self.part = part
        self.known: dict[tuple[fx.Node, int], fx.Node] = {}

    def cut(self, node: fx.Node, axis: int) -> fx.Node:
        """Return the part of a value: through casts, scalings and views up to a concatenation."""
        trail: list[tuple[fx.Node, int, Way]] = []
        at, own = node, axis
        while (at, own) not in self.known:
            found = way(at, own, self.part)
            if found is None or len(found.axes) > 1:
                break
            if not found.axes:
                self._take_operand(at, own, found)
                break
            trail.append((at, own, found))
            ((at, own),) = found.axes.items()
        if (at, own) not in self.known:
            trail = []  # nothing to compute again: the value itself is cut
            self.known[node, axis] = _slice(self.root, node, axis, self.part)
        for at, own, found in reversed(trail):
            self.known[at, own] = self._again(at, found)
        return self.known[node, axis]

    def _again(self, node: fx.Node, how: Way) -> fx.Node:
        """Insert a node's operator for the part."""

        def given(source: fx.Node) -> fx.Node:
            return self.known[source, how.axes[source]] if source in how.axes else source

        with self.root.graph.inserting_before(node.next):
            arguments, more = fx.map_arg((how.args, node.kwargs), given)
            return g.call(self.root.graph, how.target, *arguments, like=node, **more)

    def _take_operand(self, node: fx.Node, axis: int, how: Way) -> None:
        """Know the part of a concatenation that is one of its operands."""
        if is_call(node, aten.cat.default) and len(how.args[0]) == 1:
            self.known[node, axis] = how.args[0][0]


def _slice(gm: fx.GraphModule, node: fx.Node, axis: int, part: Part) -> fx.Node:
    """Insert a node that cuts a part out of a value, as early as that can be."""
    before = first_after_arguments(gm) if node.op == "placeholder" else node.next
    bounds = part.bounds(node.meta["val"].shape[axis])
    with gm.graph.inserting_before(before):
        return g.call(gm.graph, aten.slice.Tensor, node, axis, *bounds, like=node)
