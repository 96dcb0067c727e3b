"""Removes units from a program: smaller dense weights, and graphs with the shapes that follow.

What is kept of a value is known from its labels (`coupling`), so every size that a graph names can
be updated by itself; shape propagation then has to arrive at the same shapes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.analysis.reachability import packet
from diffopt.errors import DiffoptError
from diffopt.ir import graph as g
from diffopt.ir.nodes import args, argument, schema_argument, stored_tensor
from diffopt.ir.op_sets import SPLITS
from diffopt.ir.program import Program
from diffopt.ir.propagation import infer_or_reshape, restore_output_layouts
from diffopt.pruning.coupling import Coupling, Unit
from diffopt.pruning.index_labels import along, constant, narrow, varying_by_class

aten = torch.ops.aten

Kept = dict[int, Tensor]
"""The indices of a value that are kept, by axis, of the axes of which some are removed."""


def remove(program: Program, coupling: Coupling, units: Iterable[Unit]) -> None:
    """Remove units from a program, in place."""
    labels = torch.tensor([unit.label for unit in units], dtype=torch.long)
    if not len(labels):
        return
    removed = torch.isin(coupling.classes, labels)
    smaller = _weights(coupling, removed)
    for name, gm in program.graphs.items():
        before = [node.meta["val"] for node in g.outputs(gm)]
        _Shrinker(coupling, removed, name, gm, smaller).run()
        restore_output_layouts(program, name, before)


def _weights(coupling: Coupling, removed: Tensor) -> dict[int, Tensor]:
    """Return the smaller tensors, by the identity of those that they replace."""
    smaller = {}
    for key, factors in coupling.flow.stored.items():
        old = tensor = coupling.flow.tensors[key]
        for axis, factor in factors.items():
            kept = ~removed[along(factor, axis)]
            if not bool(kept.all()):
                tensor = tensor.detach().index_select(axis, kept.nonzero()[:, 0])
        if tensor is not old:
            parameter = isinstance(old, torch.nn.Parameter)
            smaller[key] = torch.nn.Parameter(tensor, requires_grad=False) if parameter else tensor
    return smaller


class _Shrinker:
    """Follows the shapes of smaller weights through one graph."""

    def __init__(
        self,
        coupling: Coupling,
        removed: Tensor,
        name: str,
        gm: fx.GraphModule,
        smaller: dict[int, Tensor],
    ) -> None:
        self.flow, self.classes, self.removed = coupling.flow, coupling.classes, removed
        self.gm, self.smaller = gm, smaller
        self.values = coupling.flow.values[name]
        self.old = {node: node.meta["val"] for node in gm.graph.nodes if "val" in node.meta}
        self.selected: dict[Any, fx.Node] = {}
        self.placed: dict[str, Tensor] = {}

    def run(self) -> None:
        """Put the smaller weights in, and update all sizes that follow from them."""
        for node in list(self.gm.graph.nodes):
            if node.op == "get_attr":
                self._weight(node)
            if node.op != "call_function":
                continue
            selected = self._select(node)
            if selected or any(n.meta["val"] is not self.old[n] for n in node.all_input_nodes):
                _update_sizes(self, node)
                node.meta["val"] = infer_or_reshape(node)
                self._check(node)
        g.set_outputs(self.gm, g.outputs(self.gm))

    def kept(self, node: fx.Node, factors: Any = None) -> Kept:
        """Return the indices of a value that are kept."""
        kept: Kept = {}
        for factor in self.values[node] if factors is None else factors:
            if not bool(self.removed[narrow(factor, constant(factor))].any()):
                continue
            (axis,) = varying_by_class(factor, self.classes)
            mask = ~self.removed[along(factor, axis)]
            if axis in kept:
                both = torch.zeros_like(mask)
                both[kept[axis]] = True
                mask &= both
            kept[axis] = mask.nonzero()[:, 0]
        return kept

    def shape(self, node: fx.Node, factors: Any = None, value: Any = None) -> list[int]:
        """Return the shape of what is kept of a value."""
        shape = list((self.old[node] if value is None else value).shape)
        for axis, indices in self.kept(node, factors).items():
            shape[axis] = len(indices)
        return shape

    def _weight(self, node: fx.Node) -> None:
        name = str(node.target)
        tensor = stored_tensor(self.gm, node)
        # Another node may have read the same tensor before, which is the smaller one already.
        new = self.placed.get(name, self.smaller.get(id(tensor)))
        if new is None:
            return
        self.placed[name] = new
        if isinstance(new, torch.nn.Parameter):
            self.gm._parameters[name] = new
        else:
            self.gm._buffers[name] = new
        node.meta["val"] = g.fake(new)

    def _select(self, node: fx.Node) -> bool:
        """Select the kept indices of operands that have all; tell whether there are any such."""
        done: dict[fx.Node, fx.Node] = {}
        for select in self.flow.index_selects.get(node, ()):
            mask = ~self.removed[select.labels]
            if bool(mask.all()):
                continue
            source = done.get(select.operand, select.operand)
            key = source, select.axis, tuple(mask.tolist())
            if key not in self.selected:
                self.selected[key] = self._insert_select(
                    node, source, select.axis, mask.nonzero()[:, 0]
                )
                self.old[self.selected[key]] = self.old[select.operand]
            node.replace_input_with(source, self.selected[key])
            done[select.operand] = self.selected[key]
        return bool(done)

    def _insert_select(
        self, node: fx.Node, operand: fx.Node, axis: int, indices: Tensor
    ) -> fx.Node:
        tensor = stored_tensor(self.gm, operand)
        graph = self.gm.graph
        with graph.inserting_before(node):
            if tensor is not None:
                part = tensor.index_select(axis, indices)
                return g.get_attr(self.gm, f"{operand.target}_kept", part)
            if operand.meta["val"].stride(axis) == 0:  # the same at all indices: a view
                return g.call(graph, aten.slice.Tensor, operand, axis, 0, len(indices), like=node)
            kept = g.get_attr(self.gm, f"{operand.name}_kept", indices)
            return g.call(graph, aten.index_select.default, operand, axis, kept, like=node)

    def _check(self, node: fx.Node) -> None:
        """Check that propagation arrives at the shapes that the labels say."""
        values, factors = node.meta["val"], self.values[node]
        if not isinstance(values, (list, tuple)):
            values, factors, old = [values], [factors], [self.old[node]]
        else:
            old = self.old[node]
            factors = factors or [[] for _ in values]
        for value, labels, before in zip(values, factors, old, strict=True):
            if isinstance(value, Tensor):
                expected = self.shape(node, labels, before)
                if 0 in expected and 0 not in before.shape:
                    raise DiffoptError(
                        f"nothing would be left of {node.name}, which reads some of the channels"
                        " of several layers: ask for less, or skip one of these"
                    )
                if list(value.shape) != expected:
                    raise AssertionError(f"{node.format_node()}: {value.shape}, not {expected}")


def _update_sizes(body: _Shrinker, node: fx.Node) -> None:
    """Update the sizes that a node names."""
    kind = packet(node)
    if kind in (aten.view, aten._unsafe_view, aten.reshape, aten.expand):
        node.update_arg(1, body.shape(node))
    elif kind in (aten.flatten, aten.unflatten) or (
        kind is aten.squeeze and _shrinks_to_one(body, node)
    ):
        node.target = aten.reshape.default
        node.args, node.kwargs = (args(node)[0], body.shape(node)), {}
    elif node.target in SPLITS:
        _update_split(body, node)
    elif kind is aten.slice:
        _update_slice(body, node)
    elif kind is aten.select:
        source, axis, index = args(node)
        axis %= body.old[source].dim()
        if axis in (kept := body.kept(source)):
            index %= body.old[source].shape[axis]
            node.args = source, axis, int((kept[axis] < index).sum())
    elif kind in (aten.layer_norm, aten.rms_norm):
        count = len(args(node)[1])
        node.update_arg(1, list(args(node)[0].meta["val"].shape[-count:]))
    elif kind is aten.group_norm:
        _update_groups(body, node, "num_groups")
    elif kind in (aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution):
        _update_groups(body, node, "groups")
    elif kind is aten.repeat_interleave:
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "output_size"}
    elif kind is aten.scaled_dot_product_attention:
        query = args(node)[0]
        before, now = body.old[query].shape[-1], query.meta["val"].shape[-1]
        if before != now and argument(node, 6, "scale") is None:
            node.kwargs = {**node.kwargs, "scale": before**-0.5}


def _shrinks_to_one(body: _Shrinker, node: fx.Node) -> bool:
    """Tell whether a squeeze would remove an axis that was longer."""
    return any(len(indices) == 1 for indices in body.kept(args(node)[0]).values())


def _update_split(body: _Shrinker, node: fx.Node) -> None:
    source = args(node)[0]
    axis = argument(node, 2, "dim", 0) % body.old[source].dim()
    if axis not in body.kept(source):
        return
    parts = zip(body.values[node], body.old[node], strict=True)
    sizes = [body.shape(node, factors, value)[axis] for factors, value in parts]
    node.target = aten.split_with_sizes.default
    node.args, node.kwargs = (source, sizes, axis), {}


def _update_slice(body: _Shrinker, node: fx.Node) -> None:
    source = args(node)[0]
    axis = argument(node, 1, "dim", 0) % body.old[source].dim()
    kept = body.kept(source).get(axis)
    if kept is None:
        return
    bounds = slice(*(schema_argument(node, name) for name in ("start", "end", "step")))
    start, end, step = bounds.indices(body.old[source].shape[axis])
    assert step == 1, node
    node.args = source, axis, int((kept < start).sum()), int((kept < end).sum())
    node.kwargs = {}


def _update_groups(body: _Shrinker, node: fx.Node, name: str) -> None:
    """Keep the number of channels of a group."""
    source, groups = args(node)[0], schema_argument(node, name)
    before, now = body.old[source].shape[1], source.meta["val"].shape[1]
    if groups == 1 or before == now:
        return
    count = groups * now // before
    if name in node.kwargs:
        node.update_kwarg(name, count)
    else:
        parameters = [p.name for p in node.target._schema.arguments]  # type: ignore[union-attr]
        node.update_arg(parameters.index(name), count)
