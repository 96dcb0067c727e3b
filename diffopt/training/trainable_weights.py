"""Weights of a program while they are trained, in float32, also those of few bits.

A weight of few bits is w = s * clamp(round(u / s)), of which u and log(s) are trained: the rounding
is straight-through, dw/du = 1 where it is not clipped, and dw/ds = round(u / s) - u / s (LSQ, Esser
et al. 2020, arXiv 1902.08153). Zeros of a 2:4 sparse weight are masked and remain zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.analysis import reachability
from diffopt.core.module_filter import ModuleFilter
from diffopt.execution.differentiable import FLOATS
from diffopt.execution.straight_through import clip
from diffopt.ir import graph as g
from diffopt.ir import qdq
from diffopt.ir.nodes import args, is_call, module_path, stored_tensor
from diffopt.ir.program import Program
from diffopt.quantization import weight_rounding
from diffopt.transforms import sparsity_2_4

aten = torch.ops.aten
qd = torch.ops.quantized_decomposed


class _FloatWeight:
    """A weight that is stored as floats."""

    def __init__(self, tensor: Tensor, device: torch.device) -> None:
        self._tensor = tensor
        self._mask = _mask(tensor, device)
        self.leaves = [tensor.detach().clone().to(device, torch.float32).requires_grad_()]

    def value(self) -> Tensor:
        """Return the weight with its gradient."""
        return _masked(self.leaves[0], self._mask).to(self._tensor.dtype)

    def replacements(self) -> list[tuple[Tensor, Tensor]]:
        """Return (stored tensor, its replacement) pairs."""
        new = torch.empty_like(self._tensor).copy_(_masked(self.leaves[0].detach(), self._mask))
        if isinstance(self._tensor, torch.nn.Parameter):
            new = torch.nn.Parameter(new, requires_grad=False)
        return [(self._tensor, new)]


class _QuantizedWeight:
    """A weight that is stored as numbers of few bits and scales."""

    def __init__(
        self, packed: qdq.Packed, dtype: torch.dtype, wide: Tensor | None, device: torch.device
    ) -> None:
        self._old, self._dtype, self._wide = packed, dtype, wide
        self._number = packed.number
        self._mask = _mask(weight_rounding.stored_numbers(packed).float(), device)
        self._begin = packed.scales.to(device)
        exact = weight_rounding.dequantized(packed).to(device)
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
            within = clip(exact, -qdq.FP8_MAX, qdq.FP8_MAX)
            numbers = within + (weight_rounding.round_to(exact, "fp8").float() - within).detach()
        else:
            within = clip(exact, *qdq.LIMITS[self._number])
            numbers = within + (within.round() - within).detach()
        weight = numbers * scale
        if self._wide is not None:
            weight = weight + (self._rounded_again(weight.detach()) - weight).detach()
        return weight.to(self._dtype)

    def _rounded_again(self, weight: Tensor) -> Tensor:
        """Return a weight rounded to int8 again, by the operators that the graph has for it."""
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

    def replacements(self) -> list[tuple[Tensor, Tensor]]:
        """Return (stored tensor, its replacement) pairs."""
        new = self._packed()
        pairs = [(self._old.values, new.values), (self._old.scales, new.scales)]
        if self._wide is not None:
            wide = weight_rounding.rounded_to_int8(new).wide
            assert wide is not None
            pairs.append((self._wide, wide))
        return pairs


_Weight = _FloatWeight | _QuantizedWeight


class TrainableWeights:
    """The trainable weights of some components.

    Attributes:
        leaves: The tensors that an optimizer updates.
        nodes: The nodes of each component that are computed from them.
    """

    def __init__(
        self,
        program: Program,
        names: Sequence[str],
        keep: Sequence[str] = (),
        device: torch.device | None = None,
    ) -> None:
        """Create leaves for the weights.

        Args:
            program: The program with the weights.
            names: The components.
            keep: Patterns of modules whose weights are frozen.
            device: Of the leaves.
        """
        self._device = device or torch.device("cpu")
        self._weights: dict[int, _Weight] = {}
        self._by_node: dict[str, dict[fx.Node, _Weight]] = {n: {} for n in names}
        frozen = _frozen(program, names, keep)
        for name in names:
            self._add_quantized(program.components[name], name, frozen)
            self._add_floats(program.components[name], name, frozen)
        self.leaves = [leaf for weight in self._weights.values() for leaf in weight.leaves]
        self.nodes = {name: list(by_node) for name, by_node in self._by_node.items()}

    def _add_floats(self, gm: fx.GraphModule, name: str, frozen: set[int]) -> None:
        read = _read_by_layers(gm)
        for node in gm.graph.find_nodes(op="get_attr"):
            tensor = g.attribute(gm, str(node.target))
            is_weight = isinstance(tensor, torch.nn.Parameter) or node in read
            if not is_weight or tensor.dtype not in FLOATS or id(tensor) in frozen:
                continue
            if id(tensor) not in self._weights:
                self._weights[id(tensor)] = _FloatWeight(tensor, self._device)
            self._by_node[name][node] = self._weights[id(tensor)]

    def _add_quantized(self, gm: fx.GraphModule, name: str, frozen: set[int]) -> None:
        for layer in qdq.layers(gm):
            quantized = weight_rounding.stored_weight(layer.weight)
            if quantized is None:
                continue
            value = layer.weight.meta["val"]
            packed = weight_rounding.packed_weight(gm, quantized, value.shape)
            key = id(packed.values)
            if key in frozen:
                continue
            if key not in self._weights:
                is_wide = quantized.node is not layer.weight
                wide = stored_tensor(gm, args(layer.weight)[1]) if is_wide else None
                self._weights[key] = _QuantizedWeight(packed, value.dtype, wide, self._device)
            self._by_node[name][layer.weight] = self._weights[key]

    def values(self, name: str) -> dict[fx.Node, Tensor]:
        """Return the values of a component's weights, with gradients."""
        values: dict[int, Tensor] = {}
        for weight in self._by_node[name].values():
            if id(weight) not in values:
                values[id(weight)] = weight.value()
        return {node: values[id(weight)] for node, weight in self._by_node[name].items()}

    def count(self) -> int:
        """Return the number of trained parameters."""
        return sum(leaf.numel() for leaf in self.leaves)

    @torch.no_grad()
    def state(self) -> list[Tensor]:
        """Return copies of the leaves."""
        return [leaf.detach().clone() for leaf in self.leaves]

    @torch.no_grad()
    def restore(self, state: Sequence[Tensor]) -> None:
        """Set the leaves to a state that `state` has returned."""
        for leaf, value in zip(self.leaves, state, strict=True):
            leaf.copy_(value)

    def store(self, program: Program) -> None:
        """Replace the weights in all graphs of a program."""
        pairs = [pair for weight in self._weights.values() for pair in weight.replacements()]
        new = {id(old): tensor for old, tensor in pairs}
        for gm in program.graphs.values():
            stores: list[dict[str, Any]] = [gm._parameters, gm._buffers]
            for store in stores:
                store.update({k: new[id(t)] for k, t in store.items() if id(t) in new})


def _mask(weight: Tensor, device: torch.device) -> Tensor | None:
    """Return the mask of a 2:4 sparse weight's nonzeros; None for another weight."""
    return (weight != 0).to(device) if sparsity_2_4.is_2_4(weight) else None


def _masked(weight: Tensor, mask: Tensor | None) -> Tensor:
    return weight if mask is None else weight * mask


def _frozen(program: Program, names: Sequence[str], patterns: Sequence[str]) -> set[int]:
    """Return the ids of the tensors of modules that match a pattern."""
    frozen: set[int] = set()
    if not patterns:
        return frozen
    wanted = ModuleFilter(patterns)
    for name in names:
        gm = program.components[name]
        for node in gm.graph.nodes:
            read = g.reachable(
                [n for n in node.all_input_nodes if n.op in ("get_attr", "call_function")],
                lambda n: n.all_input_nodes if _computes_weight(n) else (),
            )
            tensors = [t for n in read if (t := stored_tensor(gm, n)) is not None]
            if tensors and wanted.matches(name, module_path(node)):
                frozen |= {id(t) for t in tensors}
    wanted.check("module", names)
    return frozen


def _computes_weight(node: fx.Node) -> bool:
    """Tell whether a node computes a weight from stored tensors."""
    return qdq.dequantizes_weight(node) or node.target in (aten._to_copy.default, aten.view.default)


def _read_by_layers(gm: fx.GraphModule) -> set[fx.Node]:
    """Return the stored tensors that layers read as weight or bias, possibly cast."""
    sources: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if reachability.packet(node) not in reachability.LAYERS:
            continue
        for source in args(node)[1:3]:
            while is_call(source, aten._to_copy.default):
                source = args(source)[0]
            if isinstance(source, fx.Node) and source.op == "get_attr":
                sources.add(source)
    return sources
