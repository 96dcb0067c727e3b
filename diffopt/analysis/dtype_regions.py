"""Divide a body into values that are computed in 16 bits and values that are kept in float32.

Terms:

- A *layer* is a matrix product, a convolution, an attention or an embedding. Layers compute in the
  low type, and so does every operator that reads a value of it. Operators before the first layers
  and those on constants, positions or the timestep alone (tables of angles, masks) are kept in
  float32 up to where they meet such a value: there are few of them, and the angle of a large
  position has no digits to spare.
- The *tail* is what no layer reads: arithmetic on results. It is kept in float32, as guidance and
  the scheduler's step are where `fuse` has put them into the body.
- An *island* is a region that is kept in float32 on purpose, of one of the `KINDS`:
  - norms: norms, and pointwise operators behind them, up to the next layer;
  - softmax: softmax and attention, and the scores' arithmetic in front of it;
  - time: what depends on the timestep alone;
  - output: the last layer, and all behind it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, fx

from diffopt.analysis.reachability import FUSED, LAYERS, PRODUCTS, packet
from diffopt.ir import graph as g
from diffopt.ir import qdq
from diffopt.ir.nodes import args, stored_tensor
from diffopt.ir.op_sets import NORMS
from diffopt.ir.program import Program
from diffopt.ir.step_tables import is_view

aten = torch.ops.aten

IslandKind = Literal["norms", "softmax", "time", "output"]
KINDS: tuple[IslandKind, ...] = ("norms", "softmax", "time", "output")

HALVES = (torch.bfloat16, torch.float16)

# Half of a step, relative to the largest value of the tensor.
_ROUNDING: dict[qdq.Number, float] = {"int8": 1 / 255, "fp8": 1 / 16}

SOFTMAX = {aten.softmax, aten._softmax, aten._safe_softmax}
# From a value to the root of its mean square, in norms that are decomposed.
_MOMENTS = {*(aten.mean, aten.var, aten.sum, aten.pow, aten.square, aten.add, aten.mul, aten.abs)}


# Nodes


def is_float(node: fx.Node) -> bool:
    """Tell whether a node's value, or one of several, is float32."""
    value = node.meta.get("val")
    parts = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(part, Tensor) and part.dtype == torch.float32 for part in parts)


def is_pointwise(node: fx.Node) -> bool:
    """Tell whether a node is an elementwise operator or a view."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or is_view(node)


def layers(body: fx.GraphModule) -> list[fx.Node]:
    """Return the layers of a body, in order, without products of positions and constants."""
    products = PRODUCTS | FUSED | {aten.mm, aten.addmm}
    always = (LAYERS - products) | {aten.embedding}
    behind: set[fx.Node] = set()
    layers = []
    for node in body.graph.nodes:
        if node.op != "call_function":
            continue
        reads = node.all_input_nodes
        is_product = packet(node) in products
        if packet(node) in always or (is_product and any(_is_weight(body, n) for n in reads)):
            behind.add(node)
            layers.append(node)
        elif not behind.isdisjoint(reads):
            behind.add(node)
            if is_product:
                layers.append(node)
    return layers


def _is_weight(body: fx.GraphModule, node: fx.Node) -> bool:
    while is_view(node):
        node = args(node)[0]
    return isinstance(stored_tensor(body, node), torch.nn.Parameter)


def half_dtype(body: fx.GraphModule) -> torch.dtype | None:
    """Return the 16-bit dtype in which the first such layer of a body computes; None without."""
    for node in layers(body):
        for source in node.all_input_nodes:
            value = source.meta["val"]
            if isinstance(value, Tensor) and value.dtype in HALVES:
                return value.dtype
    return None


def coarsest(program: Program) -> tuple[str, float] | None:
    """Return the coarsest type that layers read and its relative rounding error; None: float32."""
    errors: dict[str, float] = {}
    for body in program.components.values():
        if (half := half_dtype(body)) is not None:
            errors[str(half).removeprefix("torch.")] = torch.finfo(half).eps
        for layer in qdq.layers(body):
            if (activation := qdq.activation(layer.x)) is not None:
                errors[activation.number] = _ROUNDING[activation.number]
    return max(errors.items(), key=lambda item: item[1], default=None)


# One body


@dataclass(eq=False)
class DtypePlan:
    """The dtypes of a body's values.

    Attributes:
        body: In float32.
        low: The type that its layers are to compute in.
        low_arguments: The arguments that are passed in the low type.
        low_results: The indices of results that are returned in it.
        float32_nodes: Nodes that are kept in float32 whatever they read, beside the tail.
    """

    body: fx.GraphModule
    low: torch.dtype
    low_arguments: set[fx.Node] = field(default_factory=set)
    low_results: set[int] = field(default_factory=set)
    float32_nodes: set[fx.Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.layers = dict.fromkeys(layers(self.body))
        self.quantizing = _quantizing(self.body)

    def float32_results(self) -> list[fx.Node]:
        """Return the results that are returned in float32."""
        return [n for i, n in enumerate(g.outputs(self.body)) if i not in self.low_results]

    def tail(self) -> set[fx.Node]:
        """Return the operators that float32 results need and no layer reads."""
        read = g.ancestors(self.layers)
        inner = {n for i, n in enumerate(g.outputs(self.body)) if i in self.low_results}
        kept = read | g.ancestors(inner)
        return {n for n in g.ancestors(self.float32_results()) if n.op == "call_function"} - kept

    def all_float32(self) -> set[fx.Node]:
        """Return all nodes that are kept in float32 whatever they read."""
        return self.float32_nodes | self.tail() | self.quantizing

    def low_nodes(self, low_arguments: Collection[fx.Node] | None = None) -> set[fx.Node]:
        """Return the nodes that are computed in the low type, and the arguments passed in it."""
        kept = self.all_float32()
        low = set(self.low_arguments if low_arguments is None else low_arguments)
        for node in self.body.graph.nodes:
            if node.op != "call_function" or node in kept or not is_float(node):
                continue
            if node in self.layers or not low.isdisjoint(node.all_input_nodes):
                low.add(node)
        return low


def _quantizing(body: fx.GraphModule) -> set[fx.Node]:
    """Return the operators that compute and apply scales of quantized values, in float32."""
    arithmetic: set[fx.Node] = set()
    for node in body.graph.nodes:
        activation = qdq.activation(node) if node.op == "call_function" else None
        if activation is not None:
            source, last = activation.source, activation.node
            before = g.reachable([last], lambda n, s=source: () if n is s else n.all_input_nodes)  # type: ignore[misc]
            arithmetic |= before - {source, last}
    return {n for n in arithmetic if n.op == "call_function"}


# Islands


def islands(plan: DtypePlan, timestep: Collection[fx.Node]) -> dict[IslandKind, set[fx.Node]]:
    """Return the nodes of each kind of island; `timestep` are arguments that depend on it alone."""
    by_kind: dict[IslandKind, set[fx.Node]] = {
        "norms": _norms(plan),
        "softmax": _softmax(plan),
        "time": _timestep_only(plan.body, timestep),
        "output": _output(plan),
    }
    lows = plan.low_nodes()
    return {kind: nodes for kind, nodes in by_kind.items() if nodes & lows}


def _norms(plan: DtypePlan) -> set[fx.Node]:
    norms: set[fx.Node] = set()
    for node in plan.body.graph.nodes:
        if node.op != "call_function" or node in plan.layers:
            continue
        if packet(node) in {*NORMS, aten.batch_norm}:
            norms.add(node)
        elif packet(node) is aten.rsqrt:
            norms |= _decomposed_norm(node)
        elif is_pointwise(node) and _continues(node, norms):
            norms.add(node)
    return norms


def _continues(node: fx.Node, region: Collection[fx.Node]) -> bool:
    """Tell whether a node continues a region: a sum with a value as large from outside does not."""
    sources = [n for n in node.all_input_nodes if isinstance(n.meta["val"], Tensor)]
    if not any(n in region for n in node.all_input_nodes):
        return False
    size = node.meta["val"].numel() if isinstance(node.meta["val"], Tensor) else 0
    return all(n in region or n.meta["val"].numel() < size for n in sources)


def _decomposed_norm(root: fx.Node) -> set[fx.Node]:
    """Return the nodes of a decomposed norm up to its division, by its `rsqrt`."""
    norm, node = {root}, args(root)[0]
    while packet(node) in _MOMENTS and len(node.all_input_nodes) == 1:
        norm.add(node)
        node = node.all_input_nodes[0]
    return norm | {n for n in root.users if packet(n) is aten.mul and node in n.all_input_nodes}


def _softmax(plan: DtypePlan) -> set[fx.Node]:
    roots = [n for n in plan.body.graph.nodes if packet(n) in SOFTMAX]
    inside = g.reachable(
        roots, lambda n: (m for m in n.all_input_nodes if is_pointwise(m) and m not in plan.layers)
    )
    return inside | {n for n in plan.layers if packet(n) in FUSED}


def _timestep_only(body: fx.GraphModule, timestep: Collection[fx.Node]) -> set[fx.Node]:
    others = g.descendants(set(g.placeholders(body)) - set(timestep))
    return {n for n in g.descendants(timestep) - others if n.op == "call_function"}


def _output(plan: DtypePlan) -> set[fx.Node]:
    needed = g.ancestors(plan.float32_results())
    last = [n for n in plan.layers if n in needed][-1:]
    return {n for n in g.descendants(last) if n.op == "call_function"}


def timestep_arguments(program: Program, name: str) -> set[fx.Node]:
    """Return the arguments that differ between a component's calls and depend on no input."""
    variant = g.descendants(g.placeholders(program.root))
    sites = program.calls(name)
    arguments = set()
    for index, formal in enumerate(g.placeholders(program.components[name])):
        actual = {args(site)[index] for site in sites}
        many = len(actual) > 1 or (len(sites) == 1 and formal.meta["val"].is_floating_point())
        if many and actual.isdisjoint(variant):
            arguments.add(formal)
    return arguments
