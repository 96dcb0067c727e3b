"""Weights of a program while they are trained: as floats, also behind numbers of few bits.

A weight of few bits is w = s * clamp(round(u / s)), of which u and the logarithm of s are trained:
the rounding lets the gradient straight through, and to s comes what that leaves over (LSQ). What
is zero in a 2:4 sparse weight stays zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.analysis import reachability
from diffopt.core.module_filter import Patterns
from diffopt.execution.differentiable import FLOATS
from diffopt.ir import graph as g
from diffopt.ir import qdq
from diffopt.ir.nodes import args, is_call, stored_tensor
from diffopt.ir.program import Program
from diffopt.quantization import quantize_body, weight_rounding
from diffopt.transforms import sparsity_2_4

aten = torch.ops.aten
qd = torch.ops.quantized_decomposed


class _Plain:
    """A weight that is stored as floats."""

    def __init__(self, tensor: Tensor, where: torch.device) -> None:
        self._tensor = tensor
        self._mask = _mask(tensor, where)
        self.leaves = [tensor.detach().clone().to(where, torch.float32).requires_grad_()]

    def value(self) -> Tensor:
        """Return the weight with its gradient."""
        return _masked(self.leaves[0], self._mask).to(self._tensor.dtype)

    def replaced(self) -> list[tuple[Tensor, Tensor]]:
        """Return what is stored now, and what is to be."""
        new = torch.empty_like(self._tensor).copy_(_masked(self.leaves[0].detach(), self._mask))
        if isinstance(self._tensor, torch.nn.Parameter):
            new = torch.nn.Parameter(new, requires_grad=False)
        return [(self._tensor, new)]


class _Rounded:
    """A weight that is stored as numbers of few bits and scales."""

    def __init__(
        self, packed: qdq.Packed, dtype: torch.dtype, wide: Tensor | None, where: torch.device
    ) -> None:
        self._old, self._dtype, self._wide = packed, dtype, wide
        self._number = packed.number
        self._mask = _mask(weight_rounding.stored_numbers(packed).float(), where)
        self._begin = packed.scales.to(where)
        exact = weight_rounding.dequantized(packed).to(where)
        self.leaves = [exact.requires_grad_(), torch.zeros_like(self._begin.float())]
        self.leaves[1].requires_grad_()

    def _scales(self) -> Tensor:
        scales = self._begin.float() * self.leaves[1].exp()
        return scales.to(self._begin.dtype)

    def value(self) -> Tensor:
        """Return the weight with its gradient."""
        scale = weight_rounding.broadcast_scales(replace(self._old, scales=self._scales()))
        exact = _masked(self.leaves[0], self._mask) / scale
        if self._number == "fp8":
            within = exact.clamp(-qdq.FP8_MAX, qdq.FP8_MAX)
            numbers = within + (weight_rounding.round_to(exact, "fp8").float() - within).detach()
        else:
            within = exact.clamp(*qdq.LIMITS[self._number])
            numbers = within + (within.round() - within).detach()
        weight = numbers * scale
        if self._wide is not None:
            weight = weight + (self._again(weight.detach()) - weight).detach()
        return weight.to(self._dtype)

    def _again(self, weight: Tensor) -> Tensor:
        """Return a weight rounded once more, by the operators that the graph has for it."""
        wide = weight_rounding.rounded_to_int8(self._packed()).wide
        assert wide is not None
        wide = wide.to(weight.device)
        limits = (0, *qdq.LIMITS["int8"], torch.int8)
        zeros = torch.zeros_like(wide)
        numbers = qd.quantize_per_channel.default(weight, wide, zeros, *limits)
        again: Tensor = qd.dequantize_per_channel.default(numbers, wide, None, *limits)
        return again

    def _packed(self) -> qdq.Packed:
        scales = self._scales().detach().cpu()
        spread = weight_rounding.broadcast_scales(replace(self._old, scales=scales))
        exact = _masked(self.leaves[0].detach(), self._mask).cpu()
        values = weight_rounding.round_to(exact / spread, self._number)
        return qdq.Packed.of(self._number, values, scales, self._old.group)

    def replaced(self) -> list[tuple[Tensor, Tensor]]:
        """Return what is stored now, and what is to be."""
        new = self._packed()
        pairs = [(self._old.values, new.values), (self._old.scales, new.scales)]
        if self._wide is not None:
            wide = weight_rounding.rounded_to_int8(new).wide
            assert wide is not None
            pairs.append((self._wide, wide))
        return pairs


class Trained:
    """The weights of some components that are trained.

    Attributes:
        leaves: What an optimizer changes.
        nodes: The nodes of each component whose values these determine.
    """

    def __init__(
        self,
        program: Program,
        names: Sequence[str],
        keep: Sequence[str] = (),
        where: torch.device | None = None,
    ) -> None:
        """Choose the weights.

        Args:
            program: Where they are.
            names: The components.
            keep: Patterns of modules whose weights stay as they are.
            where: The device.
        """
        self._where = where or torch.device("cpu")
        self._weights: dict[int, _Plain | _Rounded] = {}
        self._by_node: dict[str, dict[fx.Node, _Plain | _Rounded]] = {n: {} for n in names}
        kept = _kept(program, names, keep)
        for name in names:
            self._add_rounded(program.components[name], name, kept)
            self._add_plain(program.components[name], name, kept)
        self.leaves = [leaf for weight in self._weights.values() for leaf in weight.leaves]
        self.nodes = {name: list(own) for name, own in self._by_node.items()}

    def _add_plain(self, gm: fx.GraphModule, name: str, kept: set[int]) -> None:
        read = _read_by_layers(gm)
        for node in gm.graph.find_nodes(op="get_attr"):
            tensor = g.attribute(gm, str(node.target))
            is_weight = isinstance(tensor, torch.nn.Parameter) or node in read
            if not is_weight or tensor.dtype not in FLOATS or id(tensor) in kept:
                continue
            if id(tensor) not in self._weights:
                self._weights[id(tensor)] = _Plain(tensor, self._where)
            self._by_node[name][node] = self._weights[id(tensor)]

    def _add_rounded(self, gm: fx.GraphModule, name: str, kept: set[int]) -> None:
        for layer in qdq.layers(gm):
            own = weight_rounding.stored_weight(layer.weight)
            if own is None:
                continue
            values, scales = (
                g.attribute(gm, weight_rounding.stored_name(node))
                for node in (own.values, own.scales)
            )
            if id(values) in kept:
                continue
            if id(values) not in self._weights:
                is_wide = own.node is not layer.weight
                wide = stored_tensor(gm, args(layer.weight)[1]) if is_wide else None
                value = layer.weight.meta["val"]
                packed = qdq.Packed(own.number, values, scales, tuple(value.shape), own.group)
                self._weights[id(values)] = _Rounded(packed, value.dtype, wide, self._where)
            self._by_node[name][layer.weight] = self._weights[id(values)]

    def values(self, name: str) -> dict[fx.Node, Tensor]:
        """Return the values of a component's weights, with gradients."""
        made: dict[int, Tensor] = {}
        for weight in self._by_node[name].values():
            if id(weight) not in made:
                made[id(weight)] = weight.value()
        return {node: made[id(weight)] for node, weight in self._by_node[name].items()}

    def count(self) -> int:
        """Count the numbers that are trained."""
        return sum(leaf.numel() for leaf in self.leaves)

    @torch.no_grad()
    def state(self) -> list[Tensor]:
        """Return copies of the leaves."""
        return [leaf.detach().clone() for leaf in self.leaves]

    @torch.no_grad()
    def restore(self, state: Sequence[Tensor]) -> None:
        """Take over what `state` has returned."""
        for leaf, value in zip(self.leaves, state, strict=True):
            leaf.copy_(value)

    def store(self, program: Program) -> None:
        """Put the weights into a program, wherever it reads the old ones."""
        pairs = [pair for weight in self._weights.values() for pair in weight.replaced()]
        new = {id(old): tensor for old, tensor in pairs}
        for gm in program.graphs.values():
            stores: list[dict[str, Any]] = [gm._parameters, gm._buffers]
            for store in stores:
                store.update({k: new[id(t)] for k, t in store.items() if id(t) in new})


def _mask(weight: Tensor, where: torch.device) -> Tensor | None:
    """Return which of a 2:4 sparse weight's numbers may change; None: all of them."""
    return (weight != 0).to(where) if sparsity_2_4.is_2_4(weight) else None


def _masked(weight: Tensor, mask: Tensor | None) -> Tensor:
    return weight if mask is None else weight * mask


def _kept(program: Program, names: Sequence[str], patterns: Sequence[str]) -> set[int]:
    """Return the identities of the tensors of modules that match a pattern."""
    kept: set[int] = set()
    if not patterns:
        return kept
    wanted = Patterns(patterns)
    for name in names:
        gm = program.components[name]
        for node in gm.graph.nodes:
            read = g.reachable(
                [n for n in node.all_input_nodes if n.op in ("get_attr", "call_function")],
                lambda n: n.all_input_nodes if _is_of_weights(n) else (),
            )
            tensors = [t for n in read if (t := stored_tensor(gm, n)) is not None]
            if tensors and wanted.wants(name, quantize_body.module_path(node)):
                kept |= {id(t) for t in tensors}
    wanted.check("module", names)
    return kept


def _is_of_weights(node: fx.Node) -> bool:
    """Tell whether a node computes a weight from what is stored."""
    return qdq.is_stored_small(node) or node.target in (aten._to_copy.default, aten.view.default)


def _read_by_layers(gm: fx.GraphModule) -> set[fx.Node]:
    """Return the stored tensors that layers read as weight or bias, in whichever type."""
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if reachability.packet(node) not in reachability.LAYERS:
            continue
        for source in args(node)[1:3]:
            while is_call(source, aten._to_copy.default):
                source = args(source)[0]
            if isinstance(source, fx.Node) and source.op == "get_attr":
                found.add(source)
    return found
