"""Takes units out of a program: smaller dense weights, and graphs with the shapes that follow.

What is left of a value is known from its labels (`coupling`), so every shape that a graph names can
be mended by itself; propagation then has to give the same shape.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.analysis.reachability import packet
from diffopt.errors import DiffoptError
from diffopt.ir import graph as g
from diffopt.ir.nodes import args, argument, stored_tensor
from diffopt.ir.op_sets import SPLITS
from diffopt.ir.program import Program
from diffopt.ir.propagation import infer_or_reshape, restore_output_layouts
from diffopt.pruning.coupling import Coupling, Unit
from diffopt.pruning.index_labels import along, constant, narrow, varying_by_class

aten = torch.ops.aten

Left = dict[int, Tensor]
"""Of a value: what is left of the axes of which something goes, as indices."""


def remove(program: Program, coupling: Coupling, units: Iterable[Unit]) -> None:
    """Remove units from a program, in place."""
    dropped = torch.tensor([unit.label for unit in units], dtype=torch.long)
    if not len(dropped):
        return
    gone = torch.isin(coupling.classes, dropped)
    smaller = _weights(coupling, gone)
    for name, gm in program.graphs.items():
        before = [node.meta["val"] for node in g.outputs(gm)]
        _Body(coupling, gone, name, gm, smaller).mend()
        restore_output_layouts(program, name, before)


def _weights(coupling: Coupling, gone: Tensor) -> dict[int, Tensor]:
    """Return the smaller tensors, by the identity of those that they replace."""
    smaller = {}
    for key, factors in coupling.flow.stored.items():
        old = tensor = coupling.flow.tensors[key]
        for axis, factor in factors.items():
            keep = ~gone[along(factor, axis)]
            if not bool(keep.all()):
                tensor = tensor.detach().index_select(axis, keep.nonzero()[:, 0])
        if tensor is not old:
            parameter = isinstance(old, torch.nn.Parameter)
            smaller[key] = torch.nn.Parameter(tensor, requires_grad=False) if parameter else tensor
    return smaller


class _Body:
    """Mends one graph."""

    def __init__(
        self,
        coupling: Coupling,
        gone: Tensor,
        name: str,
        gm: fx.GraphModule,
        smaller: dict[int, Tensor],
    ) -> None:
        self.flow, self.classes, self.gone = coupling.flow, coupling.classes, gone
        self.gm, self.smaller = gm, smaller
        self.values = coupling.flow.values[name]
        self.old = {node: node.meta["val"] for node in gm.graph.nodes if "val" in node.meta}
        self.picked: dict[Any, fx.Node] = {}

    def mend(self) -> None:
        """Put the smaller weights in, and follow their shapes through the graph."""
        for node in list(self.gm.graph.nodes):
            if node.op == "get_attr":
                self._weight(node)
            if node.op != "call_function":
                continue
            picked = self._pick(node)
            if picked or any(n.meta["val"] is not self.old[n] for n in node.all_input_nodes):
                _mend(self, node)
                node.meta["val"] = infer_or_reshape(node)
                self._check(node)
        g.set_outputs(self.gm, g.outputs(self.gm))

    def left(self, node: fx.Node, factors: Any = None) -> Left:
        """Return what is left of a value's axes."""
        left: Left = {}
        for factor in self.values[node] if factors is None else factors:
            if not bool(self.gone[narrow(factor, constant(factor))].any()):
                continue
            (axis,) = varying_by_class(factor, self.classes)
            keep = ~self.gone[along(factor, axis)]
            if axis in left:
                both = torch.zeros_like(keep)
                both[left[axis]] = True
                keep &= both
            left[axis] = keep.nonzero()[:, 0]
        return left

    def shape(self, node: fx.Node, factors: Any = None, value: Any = None) -> list[int]:
        """Return the shape that is left of a value."""
        shape = list((self.old[node] if value is None else value).shape)
        for axis, indices in self.left(node, factors).items():
            shape[axis] = len(indices)
        return shape

    def _weight(self, node: fx.Node) -> None:
        tensor = stored_tensor(self.gm, node)
        new = self.smaller.get(id(tensor))
        if new is None:
            return
        name = str(node.target)
        if isinstance(new, torch.nn.Parameter):
            self.gm._parameters[name] = new
        else:
            self.gm._buffers[name] = new
        node.meta["val"] = g.fake(new)

    def _pick(self, node: fx.Node) -> bool:
        """Let a node read what is left of operands that have all indices; tell whether it does."""
        done: dict[fx.Node, fx.Node] = {}
        for gather in self.flow.index_selects.get(node, ()):
            keep = ~self.gone[gather.labels]
            if bool(keep.all()):
                continue
            source = done.get(gather.operand, gather.operand)
            key = source, gather.axis, tuple(keep.tolist())
            if key not in self.picked:
                self.picked[key] = self._picked(node, source, gather.axis, keep.nonzero()[:, 0])
                self.old[self.picked[key]] = self.old[gather.operand]
            node.replace_input_with(source, self.picked[key])
            done[gather.operand] = self.picked[key]
        return bool(done)

    def _picked(self, node: fx.Node, operand: fx.Node, axis: int, indices: Tensor) -> fx.Node:
        tensor = stored_tensor(self.gm, operand)
        graph = self.gm.graph
        with graph.inserting_before(node):
            if tensor is not None:
                part = tensor.index_select(axis, indices)
                return g.get_attr(self.gm, f"{operand.target}_kept", part)
            if operand.meta["val"].stride(axis) == 0:  # the same at all indices: stays a view
                return g.call(graph, aten.slice.Tensor, operand, axis, 0, len(indices), like=node)
            kept = g.get_attr(self.gm, f"{operand.name}_kept", indices)
            return g.call(graph, aten.index_select.default, operand, axis, kept, like=node)

    def _check(self, node: fx.Node) -> None:
        """Check that propagation gives the shapes that the labels give."""
        values, factors = node.meta["val"], self.values[node]
        if not isinstance(values, (list, tuple)):
            values, factors, old = [values], [factors], [self.old[node]]
        else:
            old = self.old[node]
            factors = factors or [[] for _ in values]
        for value, own, before in zip(values, factors, old, strict=True):
            if isinstance(value, Tensor):
                expected = self.shape(node, own, before)
                if 0 in expected and 0 not in before.shape:
                    raise DiffoptError(
                        f"nothing would be left of {node.name}, which reads some of the channels"
                        " of several layers: ask for less, or skip one of these"
                    )
                if list(value.shape) != expected:
                    raise AssertionError(f"{node.format_node()}: {value.shape}, not {expected}")


def _mend(body: _Body, node: fx.Node) -> None:
    """Write the sizes that a node names as they are now."""
    kind = packet(node)
    if kind in (aten.view, aten._unsafe_view, aten.reshape, aten.expand):
        node.update_arg(1, body.shape(node))
    elif kind in _FLAT or (kind is aten.squeeze and _shrinks_to_one(body, node)):
        node.target = aten.reshape.default
        node.args, node.kwargs = (args(node)[0], body.shape(node)), {}
    elif node.target in SPLITS:
        _mend_split(body, node)
    elif kind is aten.slice:
        _mend_slice(body, node)
    elif kind is aten.select:
        source, axis, index = args(node)
        axis %= body.old[source].dim()
        if axis in (left := body.left(source)):
            index %= body.old[source].shape[axis]
            node.args = source, axis, int((left[axis] < index).sum())
    elif kind in (aten.layer_norm, aten.rms_norm):
        count = len(args(node)[1])
        node.update_arg(1, list(args(node)[0].meta["val"].shape[-count:]))
    elif kind is aten.group_norm:
        _mend_groups(body, node, 1)
    elif kind in _CONVOLUTIONS:
        _mend_convolution(body, node)
    elif kind is aten.repeat_interleave:
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "output_size"}
    elif kind is aten.scaled_dot_product_attention:
        query = args(node)[0]
        before, now = body.old[query].shape[-1], query.meta["val"].shape[-1]
        if before != now and argument(node, 6, "scale") is None:
            node.kwargs = {**node.kwargs, "scale": before**-0.5}


def _shrinks_to_one(body: _Body, node: fx.Node) -> bool:
    """Tell whether a squeeze would take an axis away that was longer."""
    return any(len(indices) == 1 for indices in body.left(args(node)[0]).values())


_FLAT = (aten.flatten, aten.unflatten)
_CONVOLUTIONS = {
    aten.conv1d: 6,
    aten.conv2d: 6,
    aten.conv3d: 6,
    aten.convolution: 8,
}


def _mend_split(body: _Body, node: fx.Node) -> None:
    source = args(node)[0]
    axis = argument(node, 2, "dim", 0) % body.old[source].dim()
    if axis not in body.left(source):
        return
    parts = zip(body.values[node], body.old[node], strict=True)
    sizes = [body.shape(node, factors, value)[axis] for factors, value in parts]
    node.target = aten.split_with_sizes.default
    node.args, node.kwargs = (source, sizes, axis), {}


def _mend_slice(body: _Body, node: fx.Node) -> None:
    source = args(node)[0]
    size = body.old[source].dim()
    axis = argument(node, 1, "dim", 0) % size
    left = body.left(source).get(axis)
    if left is None:
        return
    length = body.old[source].shape[axis]
    start, end, step = slice(
        argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step", 1)
    ).indices(length)
    assert step == 1, node
    node.args = source, axis, int((left < start).sum()), int((left < end).sum())
    node.kwargs = {}


def _mend_groups(body: _Body, node: fx.Node, position: int) -> None:
    """Keep the number of channels of a group."""
    source, groups = args(node)[0], args(node)[position]
    before, now = body.old[source].shape[1], source.meta["val"].shape[1]
    if groups > 1 and before != now:
        node.update_arg(position, groups * now // before)


def _mend_convolution(body: _Body, node: fx.Node) -> None:
    position = _CONVOLUTIONS[packet(node)]
    if argument(node, position, "groups", 1) == 1:
        return
    if len(node.args) > position:
        _mend_groups(body, node, position)
        return
    source = args(node)[0]
    before, now = body.old[source].shape[1], source.meta["val"].shape[1]
    node.update_kwarg("groups", node.kwargs["groups"] * now // before)
