"""The labels of all values of a program's bodies, followed node by node."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.analysis.axis_rules import is_reshape, relate
from diffopt.analysis.reachability import packet
from diffopt.ir import graph as g
from diffopt.ir.nodes import args, stored_tensor
from diffopt.ir.printing import target_name
from diffopt.pruning.index_labels import (
    Factors,
    Labels,
    along,
    compressed,
    narrow,
    reshaped,
    varying,
    varying_by_class,
)

aten = torch.ops.aten

Operand = tuple[Sequence[int], Factors]
"""A tensor's shape and its factors; without factors, all of it is kept."""

Rule = Callable[["BodyLabels", fx.Node], Any]
"""Returns the factors of an operator's result; of several results a list; None: not known."""

Check = Callable[[Tensor], None]
"""A union or constraint that depends on the equivalence classes, which are its argument."""


@dataclass(frozen=True, eq=False)
class Source:
    """An axis of a stored tensor along which a layer computes its outputs."""

    component: str
    node: fx.Node
    tensor: Tensor
    axis: int


@dataclass(frozen=True, eq=False)
class IndexSelect:
    """An operand that keeps all indices, where others of a node may lose some.

    Attributes:
        operand: What the node reads.
        axis: An axis of it.
        labels: Those of the other operands along that axis.
    """

    operand: fx.Node
    axis: int
    labels: Tensor


@dataclass
class Flow:
    """The labels of all values of a program's bodies, as far as they are known.

    Attributes:
        labels: All labels.
        checks: What is done once it is known along which axis each value varies.
        stored: The factors of stored tensors, by identity and axis.
        tensors: The stored tensors.
        sources: The axes of weights that layers' outputs come from.
        computed: Layers whose weight is computed, with the name of their body.
        heads: Labels that both operands and the result of a product have in common.
        dims: Labels inside of such heads, united over all of them.
        in_heads: Keep heads, and remove what is in them, in place of whole heads.
        sums: Labels of values that are added to each other.
        index_selects: The operands of which indices are selected, by the node that reads them.
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
    index_selects: dict[fx.Node, list[IndexSelect]] = field(default_factory=dict)
    values: dict[str, dict[fx.Node, Any]] = field(default_factory=dict)

    def of(self, tensor: Tensor) -> Factors:
        """Return the factors of a stored tensor: the same wherever it is read.

        Tables that are no parameters have none: indices are selected where they are read.
        """
        if not tensor.is_floating_point():
            return []
        if tensor.dim() > 1 and not isinstance(tensor, torch.nn.Parameter):
            return []
        if id(tensor) not in self.stored:
            self.stored[id(tensor)] = self.labels.axes_of(tensor.shape)
            self.tensors[id(tensor)] = tensor
        return list(self.stored[id(tensor)].values())

    def index_select(self, node: fx.Node, operand: fx.Node, axis: int, labels: Tensor) -> None:
        """Let a node read those indices of an operand whose labels are kept."""
        selects = self.index_selects.setdefault(node, [])
        if not any(each.operand is operand and each.axis == axis for each in selects):
            selects.append(IndexSelect(operand, axis, labels))

    def read(self, name: str, gm: fx.GraphModule, rules: Mapping[Any, Rule]) -> None:
        """Follow the labels through one body; all of its arguments and results is kept."""
        body = self.values[name] = BodyLabels(self, name, gm, rules).values
        for node in g.outputs(gm):
            for factor in body.get(node) or ():
                self.labels.constrain(factor, "a result of its component")


class BodyLabels:
    """The labels of one body's values, as far as they have been followed."""

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
            self.constrain(inputs, "an argument of a component")
            return [[] for _ in node.meta["val"]]
        if node.target is operator.getitem:
            values = self.values[args(node)[0]]
            return values[args(node)[1]] if values else []
        if not inputs:
            return []
        is_pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        rule: Rule = self.rules.get(packet(node), combine if is_pointwise else by_axes)
        factors = rule(self, node)
        if factors is None:
            self.constrain(inputs, f"{target_name(node)} has no rule")
            return []
        if isinstance(node.meta["val"], (list, tuple)):
            return [self._that_vary(each) for each in factors]
        return self._that_vary(factors)

    def _that_vary(self, factors: Factors) -> Factors:
        """Leave out factors of one label, which is kept."""
        for factor in factors:
            if not varying(factor):
                self.labels.constrain(factor, "one index of it is read by itself")
        return [factor for factor in factors if varying(factor)]

    def constrain(self, nodes: Sequence[fx.Node], reason: str) -> None:
        """Keep all labels of some values."""
        for node in nodes:
            values = self.values[node]
            for item in values:
                for factor in item if isinstance(item, list) else [item]:
                    self.labels.constrain(factor, reason)

    def operand(self, node: Any) -> Operand:
        """Return shape and factors of an argument, which may be a number or None."""
        if not isinstance(node, fx.Node):
            return (), []
        return node.meta["val"].shape, self.values[node]

    def constrain_along(self, factor: Tensor, axes: Sequence[int], reason: str) -> None:
        """Keep all labels of a factor if it turns out to vary along some axes."""

        def check(classes: Tensor) -> None:
            if set(varying_by_class(factor, classes)) & set(axes):
                self.labels.constrain(factor, reason)

        if set(varying(factor)) & set(axes):
            self.flow.checks.append(check)


def pointwise(
    body: BodyLabels,
    node: fx.Node,
    shape: Sequence[int],
    operands: Sequence[Operand],
    nodes: Sequence[fx.Node | None] = (),
) -> Factors:
    """Combine operands that broadcast to a shape: what varies along the same axes is united.

    `nodes` are the operands as `node` reads them; of those that have no labels the indices that
    the others keep are selected.
    """
    aligned = []
    for sizes, factors in operands:
        sizes = [1] * (len(shape) - len(sizes)) + list(sizes)
        aligned.append((sizes, [f.expand(tuple(shape)) for f in factors]))
    firsts: dict[tuple[int, ...], tuple[Tensor, int]] = {}
    for k, (_, factors) in enumerate(aligned):
        for factor in factors:
            first, _ = firsts.setdefault(varying(factor), (factor, k))
            if first is not factor:
                body.labels.union(first, factor)
    reads = [*nodes, *[None] * (len(operands) - len(nodes))]
    for k, (_, factors) in enumerate(aligned):
        for j, (sizes, theirs) in enumerate(aligned):
            if j != k:
                for factor in factors:
                    _aligned(body, node, factor, sizes, theirs, reads[j])
    # What varies along fewer axes than another operand's is united with that, or constrained.
    return [
        factor
        for axes, (factor, k) in firsts.items()
        if not any(set(axes) < set(more) and j != k for more, (_, j) in firsts.items())
    ]


def _aligned(
    body: BodyLabels,
    node: fx.Node,
    factor: Tensor,
    sizes: list[int],
    theirs: Factors,
    operand: fx.Node | None,
) -> None:
    """Unite a factor with those of another operand along the axis where it varies, or keep it."""
    axes = varying(factor)
    if all(sizes[a] == 1 for a in axes) or any(varying(f) == axes for f in theirs):
        return

    def check(classes: Tensor) -> None:
        for axis in varying_by_class(factor, classes):
            if sizes[axis] == 1:
                continue
            along_it = [f for f in theirs if axis in varying_by_class(f, classes)]
            for other in along_it:
                body.labels.union(along(factor, axis), along(other, axis))
            if along_it:
                continue
            if theirs or operand is None:
                body.labels.constrain(factor, f"{target_name(node)} reads it with what stays")
            else:
                missing = len(sizes) - operand.meta["val"].dim()
                body.flow.index_select(node, operand, axis - missing, along(factor, axis))

    body.flow.checks.append(check)


def note_source(body: BodyLabels, node: fx.Node, weight: Any, axis: int) -> None:
    """Remember the axis of a weight that a layer's results come from."""
    tensor = stored_tensor(body.gm, weight)
    if tensor is not None and id(tensor) in body.flow.stored:
        body.flow.sources.append(Source(body.name, node, tensor, axis))


def note_layer(body: BodyLabels, node: fx.Node, weight: Any, axis: int) -> None:
    """Remember the axis that a layer's results come from, or that its weight is computed."""
    note_source(body, node, weight, axis)
    if stored_tensor(body.gm, weight) is None:
        body.flow.computed.append((body.name, node))


def combine(body: BodyLabels, node: fx.Node) -> Factors:
    """Combine what a node reads element by element."""
    reads = [n for n in node.all_input_nodes if isinstance(n.meta["val"], Tensor)]
    computed = [n for n in reads if body.values[n] and stored_tensor(body.gm, n) is None]
    operands = [body.operand(n) for n in reads]
    factors = pointwise(body, node, node.meta["val"].shape, operands, reads)
    if packet(node) in (aten.add, aten.sub) and len(computed) > 1:
        body.flow.sums += factors
    return factors


def by_axes(body: BodyLabels, node: fx.Node) -> Any:
    """Do what the table of axes says of an operator on one value.

    Labels along kept axes are kept in place, or are reshaped; moved ones are moved by the
    operator itself. Labels along summed axes are united, and those along mixed ones constrained.
    """
    relation = relate(node)
    if relation is None or len(relation.operands) != 1:
        return None
    ((source, axes),) = relation.operands
    factors: Factors = body.values[source]
    result = node.meta["val"]
    if is_reshape(node):
        return [reshaped(factor, result.shape) for factor in factors]
    moved, mixed, summed = (relation.of_kind(0, kind) for kind in ("moved", "mixed", "summed"))
    if not (mixed or summed):
        if moved or axes != relation.result[-len(axes) :]:
            return run_on_labels(body, node)
        return [factor.expand(result.shape) for factor in factors]
    for factor in factors:
        body.constrain_along(factor, mixed, f"{target_name(node)} mixes the axis")
    factors = [f for f in factors if not summed or set(varying(f)) - {*summed}]
    factors = [narrow(body.labels.collapse(f, summed), [*mixed, *summed]) for f in factors]
    if result.dim() < len(axes):
        factors = [f.squeeze(tuple(summed)) for f in factors]
    return [f.expand(result.shape) for f in factors if varying(f)]


def run_on_labels(body: BodyLabels, node: fx.Node) -> Any:
    """Run an operator on the labels themselves."""
    source, *others = args(node)
    if g.nodes_in((others, node.kwargs)):
        return None
    runs = [node.target(factor, *others, **node.kwargs) for factor in body.values[source]]  # type: ignore[operator]
    results = node.meta["val"]
    if isinstance(results, (list, tuple)):
        return [[run[i] for run in runs] for i in range(len(results))]
    if results.numel() > source.meta["val"].numel():
        return [compressed(run) for run in runs]  # repeated
    return runs
