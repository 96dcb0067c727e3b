"""Let a component compute one shard of its results: the half of a batch that is needed.

Before, the second half alone being read:

    %both: float32[2,4,8,8] = aten.cat([%x, %x])
    %unet: (float32[2,4,8,8]) = unet(%both, %row, %keys)
    …
    %half: float32[1,4,8,8] = aten.slice.Tensor(%result, 0, 1, 2)

After:

    %keys_half: float32[1,16,16] = aten.slice.Tensor(%keys, 0, 1, 2)
    %unet: (float32[1,4,8,8]) = unet_half(%x, %row, %keys_half)

The shard that is read is followed backwards through the body by the rules of `sharding`. What has
no rule, or is read whole as well, is computed whole and the shard is cut out of it: never wrong,
only no cheaper. Such a body is compared with the whole one, on random inputs, before it is used.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from diffopt.analysis.sharding import Shard, ShardedCall, shard_call
from diffopt.core.equivalence import difference
from diffopt.ir import graph as g
from diffopt.ir.nodes import args, is_call
from diffopt.ir.step_tables import first_after_arguments

aten = torch.ops.aten

Results = Mapping[int, int | None]
"""Results by index, in order: the axis along which a shard is wanted; None: all of it."""


@dataclass(frozen=True)
class ShardedBody:
    """A body that computes a shard of its results.

    Attributes:
        body: Its graph.
        parameters: For each argument: which one of the whole body's it is, and the axis along which
            it is the shard; None: it is whole.
        blocked: The operators that no rule led through, from the results back.
    """

    body: fx.GraphModule
    parameters: list[tuple[int, int | None]]
    blocked: list[fx.Node]

    def arguments(self, whole: Sequence[Tensor], shard: Shard) -> list[Tensor]:
        """Return its arguments from those of the whole body."""
        pairs = ((whole[index], axis) for index, axis in self.parameters)
        return [tensor if axis is None else shard.cut(tensor, axis) for tensor, axis in pairs]


def shard_body(whole: fx.GraphModule, results: Results, shard: Shard) -> ShardedBody:
    """Return the body that computes a shard of some results; the body lacks others."""
    body = g.clone(whole)
    returned, parameters = g.outputs(body), g.placeholders(body)
    work = _BodySharder(body, shard)
    work.demand([(returned[index], axis) for index, axis in results.items()])
    work.rewrite()
    g.set_outputs(body, [work.shard_of(returned[i], axis) for i, axis in results.items()])
    g.prune_unused(body)
    read = [(index, node) for index, node in enumerate(parameters) if node.users]
    for node in parameters:
        if not node.users:
            body.graph.erase_node(node)
    body.recompile()
    return ShardedBody(body, [(index, work.axes.get(node)) for index, node in read], work.blocked)


class _BodySharder:
    """Rewrites a body in place.

    Attributes:
        axes: The nodes of which a shard is computed, with its axis.
        blocked: The operators without a rule.
    """

    def __init__(self, body: fx.GraphModule, shard: Shard) -> None:
        self.body = body
        self.shard = shard
        self.axes: dict[fx.Node, int] = {}
        self.blocked: list[fx.Node] = []
        self._calls: dict[fx.Node, ShardedCall] = {}
        self._cuts: dict[tuple[fx.Node, int], fx.Node] = {}

    def demand(self, wanted: Sequence[tuple[fx.Node, int | None]]) -> None:
        """Find out of which nodes a shard is enough, from the results back."""
        demands: dict[fx.Node, set[int | None]] = {}
        for node, axis in wanted:
            demands.setdefault(node, set()).add(axis)
        for node in reversed(self.body.graph.nodes):
            if node not in demands:
                continue
            call = self._enough(node, demands[node])
            sources = g.nodes_in((call.args, node.kwargs)) if call else node.all_input_nodes
            for source in sources:
                axis = call.axes.get(source) if call else None
                demands.setdefault(source, set()).add(axis)
        for node in self.body.graph.nodes:  # an item of a split that is computed whole is whole
            if is_call(node, operator.getitem) and args(node)[0] not in self.axes:
                self.axes.pop(node, None)

    def _enough(self, node: fx.Node, wanted: set[int | None]) -> ShardedCall | None:
        """Note that a shard of a node is enough where it is, and return how it is computed."""
        axis = next(iter(wanted))
        if len(wanted) > 1 or axis is None:
            return None
        if node.op == "placeholder" and self.shard.divides(node, axis):
            self.axes[node] = axis
        call = shard_call(node, axis, self.shard)
        if call is not None:
            self.axes[node], self._calls[node] = axis, call
        elif node.op == "call_function":
            self.blocked.append(node)
        return call

    def rewrite(self) -> None:
        """Make these nodes compute a shard alone."""
        for node in list(self.body.graph.nodes):
            if node not in self.axes:
                continue
            if node.op == "placeholder":
                node.meta["val"] = g.fake(self.shard.cut(node.meta["val"], self.axes[node]))
                continue
            self._rewrite(node, self._calls[node])

    def _rewrite(self, node: fx.Node, call: ShardedCall) -> None:
        node.target = call.target
        node.args, node.kwargs = fx.map_arg(
            (call.args, node.kwargs), lambda n: self.shard_of(n, call.axes.get(n))
        )
        node.meta["val"] = g.fake_call(node.target, node.args, node.kwargs)

    def shard_of(self, node: fx.Node, axis: int | None) -> fx.Node:
        """Return a node or, where it is whole and a shard is wanted, the shard of it."""
        if axis is None or self.axes.get(node) == axis:
            return node
        if (node, axis) not in self._cuts:
            self._cuts[node, axis] = _slice(self.body, node, axis, self.shard)
        return self._cuts[node, axis]


def error(whole: fx.GraphModule, sharded: ShardedBody, results: Results, shard: Shard) -> float:
    """Return the error of the results against the shard of the whole body's, on random arguments.

    It is relative, in units of the rounding that the results' type allows.
    """
    source = torch.Generator().manual_seed(0)
    arguments = [_random(node.meta["val"], source) for node in g.placeholders(whole)]
    with torch.no_grad():
        expected = whole(*arguments)
        actual = sharded.body(*sharded.arguments(arguments, shard))
    worst = 0.0
    for tensor, (index, axis) in zip(actual, results.items(), strict=True):
        other = expected[index] if axis is None else shard.cut(expected[index], axis)
        # A deep network makes more of a rounding than the rounding itself.
        allowed = torch.finfo(other.dtype).eps ** (2 / 3) if other.is_floating_point() else 1e-9
        worst = max(worst, difference([tensor], [other])[1] / allowed)
    return worst


def _random(value: Tensor, source: torch.Generator) -> Tensor:
    if value.is_floating_point():
        sample = torch.randn(value.shape, generator=source)
    else:
        sample = torch.randint(0, 2, value.shape, generator=source)
    return sample.to(value.dtype)


class Cutter:
    """Cuts a shard out of values of the outer graph, early where computing it again is cheap.

    Attributes:
        known: Shards by value and axis, to which those that are known can be added.
    """

    def __init__(self, root: fx.GraphModule, shard: Shard) -> None:
        self.root = root
        self.shard = shard
        self.known: dict[tuple[fx.Node, int], fx.Node] = {}

    def cut(self, node: fx.Node, axis: int) -> fx.Node:
        """Return the shard of a value: through casts, scalings and views up to a concatenation."""
        trail: list[tuple[fx.Node, int, ShardedCall]] = []
        at, dim = node, axis
        while (at, dim) not in self.known:
            call = shard_call(at, dim, self.shard)
            if call is None or len(call.axes) > 1:
                break
            if not call.axes:
                self._note_operand(at, dim, call)
                break
            trail.append((at, dim, call))
            ((at, dim),) = call.axes.items()
        if (at, dim) not in self.known:
            trail = []  # nothing to compute again: the value itself is cut
            self.known[node, axis] = _slice(self.root, node, axis, self.shard)
        for at, dim, call in reversed(trail):
            self.known[at, dim] = self._insert(at, call)
        return self.known[node, axis]

    def _insert(self, node: fx.Node, call: ShardedCall) -> fx.Node:
        """Insert a node's operator for the shard."""

        def shard_of(source: fx.Node) -> fx.Node:
            return self.known[source, call.axes[source]] if source in call.axes else source

        with self.root.graph.inserting_before(node.next):
            arguments, kwargs = fx.map_arg((call.args, node.kwargs), shard_of)
            return g.call(self.root.graph, call.target, *arguments, like=node, **kwargs)

    def _note_operand(self, node: fx.Node, axis: int, call: ShardedCall) -> None:
        """Note the shard of a concatenation that is one of its operands."""
        if is_call(node, aten.cat.default) and len(call.args[0]) == 1:
            self.known[node, axis] = call.args[0][0]


def _slice(gm: fx.GraphModule, node: fx.Node, axis: int, shard: Shard) -> fx.Node:
    """Insert a node that cuts a shard out of a value, as early as that can be."""
    before = first_after_arguments(gm) if node.op == "placeholder" else node.next
    bounds = shard.bounds(node.meta["val"].shape[axis])
    with gm.graph.inserting_before(before):
        return g.call(gm.graph, aten.slice.Tensor, node, axis, *bounds, like=node)
