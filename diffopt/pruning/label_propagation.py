"""The labels of all values of a program's bodies, node by node, and what they are tied to."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.analysis.reachability import packet
from diffopt.ir import graph as g
from diffopt.ir.nodes import args, stored_tensor
from diffopt.ir.printing import target_name
from diffopt.pruning.index_labels import Factors, Labels, along, changes, narrow, varying

aten = torch.ops.aten

Operand = tuple[Sequence[int], Factors]
"""A tensor's shape and its factors; no factors: nothing of it goes."""

Rule = Callable[["Body", fx.Node], Any]
"""Returns the factors of what an operator makes; of several results a list; None: it is unknown."""

Check = Callable[[Tensor], None]
"""What has to wait until it is known which labels are one; gets their roots."""


@dataclass(frozen=True, eq=False)
class Source:
    """An axis of a stored tensor that a layer makes its results of."""

    component: str
    node: fx.Node
    tensor: Tensor
    axis: int


@dataclass(frozen=True, eq=False)
class Gather:
    """An operand that has all indices, where others of a node may have lost some.

    Attributes:
        operand: What the node reads.
        axis: Of it.
        labels: Along that axis, those of the others.
    """

    operand: fx.Node
    axis: int
    labels: Tensor


@dataclass
class Flow:
    """The labels of all values of a program's bodies, as far as they are known.

    Attributes:
        labels: All labels.
        checks: What has to be tied or pinned once it is known along which axis each value changes.
        stored: The factors of stored tensors, by identity and axis.
        tensors: The stored tensors.
        sources: What layers make their results of.
        computed: Layers whose weight is computed, with the name of their body.
        heads: Labels that products of activations have in common.
        dims: Labels of what is in such heads, the same in all of them.
        in_heads: Let heads stay, and what is in them go, in place of whole heads.
        sums: Labels of values that are added to each other.
        gathers: What has to be picked of operands, by the node that reads them.
        values: The factors of each node of each body.
    """

    labels: Labels = field(default_factory=Labels)
    checks: list[Check] = field(default_factory=list)
    stored: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    tensors: dict[int, Tensor] = field(default_factory=dict)
    sources: list[Source] = field(default_factory=list)
    computed: list[tuple[str, fx.Node]] = field(default_factory=list)
    heads: list[Tensor] = field(default_factory=list)
    dims: list[Tensor] = field(default_factory=list)
    in_heads: bool = False
    sums: list[Tensor] = field(default_factory=list)
    gathers: dict[fx.Node, list[Gather]] = field(default_factory=dict)
    values: dict[str, dict[fx.Node, Any]] = field(default_factory=dict)

    def of(self, tensor: Tensor) -> Factors:
        """Return the factors of a stored tensor: the same wherever it is read.

        Tables that are no parameters have none: of them what is left is picked where it is read.
        """
        if not tensor.is_floating_point():
            return []
        if tensor.dim() > 1 and not isinstance(tensor, torch.nn.Parameter):
            return []
        if id(tensor) not in self.stored:
            self.stored[id(tensor)] = self.labels.axes_of(tensor.shape)
            self.tensors[id(tensor)] = tensor
        return list(self.stored[id(tensor)].values())

    def pick(self, node: fx.Node, operand: fx.Node, axis: int, labels: Tensor) -> None:
        """Let a node read of an operand what is left of some labels."""
        own = self.gathers.setdefault(node, [])
        if not any(each.operand is operand and each.axis == axis for each in own):
            own.append(Gather(operand, axis, labels))

    def read(self, name: str, gm: fx.GraphModule, rules: Mapping[Any, Rule]) -> None:
        """Follow the labels through one body; its arguments have none, its results keep all."""
        body = self.values[name] = Body(self, name, gm, rules).values
        for node in g.outputs(gm):
            for factor in body.get(node) or ():
                self.labels.pin(factor, "a result of its component")


class Body:
    """One body on its way."""

    def __init__(
        self, flow: Flow, name: str, gm: fx.GraphModule, rules: Mapping[Any, Rule]
    ) -> None:
        self.flow, self.labels, self.name, self.gm = flow, flow.labels, name, gm
        self.rules = rules
        self.values: dict[fx.Node, Any] = {}
        for node in gm.graph.nodes:
            if node.op == "output":
                continue
            self.values[node] = self._value(node)

    def _value(self, node: fx.Node) -> Any:
        tensor = stored_tensor(self.gm, node)
        if tensor is not None:
            return self.flow.of(tensor)
        if node.op == "placeholder":
            return []
        inputs = [n for n in node.all_input_nodes if self.values[n]]
        if node.op == "call_module":
            self.pin(inputs, "an argument of a component")
            return [[] for _ in node.meta["val"]]
        if node.target is operator.getitem:
            values = self.values[args(node)[0]]
            return values[args(node)[1]] if values else []
        if not inputs:
            return []
        rule = self.rules.get(packet(node))
        if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
            rule = combine
        found = rule(self, node) if rule is not None else None
        if found is None:
            self.pin(inputs, f"{target_name(node)} has no rule")
            return []
        if isinstance(node.meta["val"], (list, tuple)):
            return [self._that_vary(each) for each in found]
        return self._that_vary(found)

    def _that_vary(self, factors: Factors) -> Factors:
        """Leave out factors that are one label, which stays."""
        for factor in factors:
            if not varying(factor):
                self.labels.pin(factor, "one index of it is read by itself")
        return [factor for factor in factors if varying(factor)]

    def pin(self, nodes: Sequence[fx.Node], reason: str) -> None:
        """Let all labels of some values stay."""
        for node in nodes:
            values = self.values[node]
            for item in values:
                for factor in item if isinstance(item, list) else [item]:
                    self.labels.pin(factor, reason)

    def operand(self, node: Any) -> Operand:
        """Return shape and factors of an argument, which may be a number or None."""
        if not isinstance(node, fx.Node):
            return (), []
        return node.meta["val"].shape, self.values[node]

    def stays(self, factor: Tensor, axes: Sequence[int], reason: str) -> None:
        """Pin a factor if it turns out to change along some axes."""

        def check(roots: Tensor) -> None:
            if set(changes(factor, roots)) & set(axes):
                self.labels.pin(factor, reason)

        if set(varying(factor)) & set(axes):
            self.flow.checks.append(check)

    def mixed(self, node: fx.Node, source: fx.Node, axes: Sequence[int]) -> Factors:
        """Return what an operator makes that mixes the indices of some axes alone."""
        shape = node.meta["val"].shape
        found = []
        for factor in self.values[source]:
            self.stays(factor, axes, f"{target_name(node)} mixes the axis")
            found.append(narrow(factor, axes).expand(shape))
        return [factor for factor in found if varying(factor)]


def pointwise(
    body: Body,
    node: fx.Node,
    shape: Sequence[int],
    operands: Sequence[Operand],
    nodes: Sequence[fx.Node | None] = (),
) -> Factors:
    """Combine operands that broadcast to a shape; what they share goes together.

    `nodes` are the operands as `node` reads them; of those that have no labels the indices that
    the others keep are picked.
    """
    aligned = []
    for own, factors in operands:
        sizes = [1] * (len(shape) - len(own)) + list(own)
        aligned.append((sizes, [f.expand(tuple(shape)) for f in factors]))
    found: dict[tuple[int, ...], tuple[Tensor, int]] = {}
    for k, (_, factors) in enumerate(aligned):
        for factor in factors:
            first, _ = found.setdefault(varying(factor), (factor, k))
            if first is not factor:
                body.labels.tie(first, factor)
    reads = [*nodes, *[None] * (len(operands) - len(nodes))]
    for k, (_, factors) in enumerate(aligned):
        for j, (sizes, theirs) in enumerate(aligned):
            if j != k:
                for factor in factors:
                    _aligned(body, node, factor, sizes, theirs, reads[j])
    # What changes along fewer axes than another operand's is tied to that, or stays: see below.
    return [
        factor
        for axes, (factor, k) in found.items()
        if not any(set(axes) < set(more) and j != k for more, (_, j) in found.items())
    ]


def _aligned(
    body: Body,
    node: fx.Node,
    factor: Tensor,
    sizes: list[int],
    theirs: Factors,
    operand: fx.Node | None,
) -> None:
    """Let a factor go with those of another operand along the axis where it changes, or stay."""
    axes = varying(factor)
    if all(sizes[a] == 1 for a in axes) or any(varying(f) == axes for f in theirs):
        return

    def check(roots: Tensor) -> None:
        for axis in changes(factor, roots):
            if sizes[axis] == 1:
                continue
            along_it = [f for f in theirs if axis in changes(f, roots)]
            for other in along_it:
                body.labels.tie(along(factor, axis), along(other, axis))
            if along_it:
                continue
            if theirs or operand is None:
                body.labels.pin(factor, f"{target_name(node)} reads it with what stays")
            else:
                missing = len(sizes) - operand.meta["val"].dim()
                body.flow.pick(node, operand, axis - missing, along(factor, axis))

    body.flow.checks.append(check)


def note_source(body: Body, node: fx.Node, weight: Any, axis: int) -> None:
    """Remember the axis of a weight that a layer's results come from."""
    tensor = stored_tensor(body.gm, weight)
    if tensor is not None and id(tensor) in body.flow.stored:
        body.flow.sources.append(Source(body.name, node, tensor, axis))


def note_layer(body: Body, node: fx.Node, weight: Any, axis: int) -> None:
    """Do so of a layer, whose weight may be none that is stored."""
    note_source(body, node, weight, axis)
    if stored_tensor(body.gm, weight) is None:
        body.flow.computed.append((body.name, node))


def combine(body: Body, node: fx.Node) -> Factors:
    """Combine what a node reads element by element."""
    reads = [n for n in node.all_input_nodes if isinstance(n.meta["val"], Tensor)]
    living = [n for n in reads if body.values[n] and stored_tensor(body.gm, n) is None]
    inputs = [body.operand(n) for n in reads]
    found = pointwise(body, node, node.meta["val"].shape, inputs, reads)
    if packet(node) in (aten.add, aten.sub) and len(living) > 1:
        body.flow.sums += found
    return found
