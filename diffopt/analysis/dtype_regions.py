"""Which values of a body are computed in 16 bits, and which of them stay in float32.

Terms:

- A *layer* is a matrix product, a convolution, an attention or an embedding. Layers compute in the
  low type, and so does what reads a value that is in it. What comes in front of the first layers
  and what is computed from constants, positions or the timestep alone (tables of angles, masks)
  stays in float32 up to where it meets such a value: there is little of it, and the angle of a
  large position has no digits to spare.
- The *tail* is what no layer reads: arithmetic on results. It stays in float32, as guidance and the
  scheduler's step do where `fuse` has put them into the body.
- An *island* is a part that is kept in float32 on purpose, of one of the `KINDS`:
  - norms: norms, and what only works on single numbers behind them, up to the next layer;
  - softmax: softmax and attention, and the scores' arithmetic in front of it;
  - time: what depends on the timestep alone;
  - output: the last layer, and all behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, fx

from diffopt.analysis.reachability import FUSED, LAYERS, PRODUCTS, packet
from diffopt.ir import graph as g
from diffopt.ir import qdq
from diffopt.ir.nodes import args, stored
from diffopt.ir.program import Program
from diffopt.ir.step_tables import is_view

aten = torch.ops.aten

Kind = Literal["norms", "softmax", "time", "output"]
KINDS: tuple[Kind, ...] = ("norms", "softmax", "time", "output")

HALVES = (torch.bfloat16, torch.float16)

# Half of a step, relative to the largest value of the tensor.
_ROUNDING: dict[qdq.Number, float] = {"int8": 1 / 255, "fp8": 1 / 16}

SOFTMAX = {aten.softmax, aten._softmax, aten._safe_softmax}
_NORMS = {
    *(aten.layer_norm, aten.group_norm, aten.rms_norm, aten.native_layer_norm),
    *(aten.native_group_norm, aten.instance_norm, aten.batch_norm, aten._fused_rms_norm),
}
# What leads from a value to the root of its mean square, in norms that are written out.
_MOMENTS = {*(aten.mean, aten.var, aten.sum, aten.pow, aten.square, aten.add, aten.mul, aten.abs)}


# Nodes


def is_float(node: fx.Node) -> bool:
    """Tell whether a node's value, or part of it, is in float32."""
    value = node.meta.get("val")
    parts = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(part, Tensor) and part.dtype == torch.float32 for part in parts)


def is_pointwise(node: fx.Node) -> bool:
    """Tell whether a node works on single numbers, or only on where they are."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or is_view(node)


def layers(body: fx.GraphModule) -> list[fx.Node]:
    """Return the layers of a body, in order; products of positions and constants are none."""
    products = PRODUCTS | FUSED | {aten.mm, aten.addmm}
    always = (LAYERS - products) | {aten.embedding}
    behind: set[fx.Node] = set()
    found = []
    for node in body.graph.nodes:
        if node.op != "call_function":
            continue
        reads = node.all_input_nodes
        is_product = packet(node) in products
        if packet(node) in always or (is_product and any(_is_weight(body, n) for n in reads)):
            behind.add(node)
            found.append(node)
        elif not behind.isdisjoint(reads):
            behind.add(node)
            if is_product:
                found.append(node)
    return found


def _is_weight(body: fx.GraphModule, node: fx.Node) -> bool:
    while is_view(node):
        node = args(node)[0]
    return isinstance(stored(body, node), torch.nn.Parameter)


def halves(body: fx.GraphModule) -> torch.dtype | None:
    """Return in which type of 16 bits a layer of a body computes, if one does."""
    for node in layers(body):
        for source in node.all_input_nodes:
            value = source.meta["val"]
            if isinstance(value, Tensor) and value.dtype in HALVES:
                return value.dtype
    return None


def coarsest(program: Program) -> tuple[str, float] | None:
    """Return the coarsest type that layers of a program read, and the relative error of rounding.

    None if it is float32.
    """
    found: dict[str, float] = {}
    for body in program.components.values():
        if (half := halves(body)) is not None:
            found[str(half).removeprefix("torch.")] = torch.finfo(half).eps
        for layer in qdq.layers(body):
            if (read := qdq.activation(layer.x)) is not None:
                found[read.number] = _ROUNDING[read.number]
    return max(found.items(), key=lambda item: item[1], default=None)


# One body


@dataclass(eq=False)
class Cut:
    """Where a body's values change their type.

    Attributes:
        body: In float32.
        low: The type that its layers are to compute in.
        takes: The arguments that come in the low type.
        gives: Which results go out in it.
        wide: What stays in float32 whatever it reads, beside the tail.
    """

    body: fx.GraphModule
    low: torch.dtype
    takes: set[fx.Node] = field(default_factory=set)
    gives: set[int] = field(default_factory=set)
    wide: set[fx.Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.layers = dict.fromkeys(layers(self.body))
        self.quantizing = _quantizing(self.body)

    def exits(self) -> list[fx.Node]:
        """Return the results that go out in float32."""
        return [n for i, n in enumerate(g.outputs(self.body)) if i not in self.gives]

    def tail(self) -> set[fx.Node]:
        """Return what results that go out in float32 need, and no layer reads."""
        read = g.ancestors(self.layers)
        inner = {n for i, n in enumerate(g.outputs(self.body)) if i in self.gives}
        kept = read | g.ancestors(inner)
        return {n for n in g.ancestors(self.exits()) if n.op == "call_function"} - kept

    def kept(self) -> set[fx.Node]:
        """Return all that stays in float32 whatever it reads."""
        return self.wide | self.tail() | self.quantizing

    def lows(self, takes: Collection[fx.Node] | None = None) -> set[fx.Node]:
        """Return what is computed in the low type."""
        kept = self.kept()
        found = set(self.takes if takes is None else takes)
        for node in self.body.graph.nodes:
            if node.op != "call_function" or node in kept or not is_float(node):
                continue
            if node in self.layers or not found.isdisjoint(node.all_input_nodes):
                found.add(node)
        return found


def _quantizing(body: fx.GraphModule) -> set[fx.Node]:
    """Return what finds and applies the scales of quantized values: it is float32 arithmetic."""
    found: set[fx.Node] = set()
    for node in body.graph.nodes:
        own = qdq.activation(node) if node.op == "call_function" else None
        if own is not None:
            source, last = own.source, own.node
            before = g.reach([last], lambda n, s=source: () if n is s else n.all_input_nodes)  # type: ignore[misc]
            found |= before - {source, last}
    return {n for n in found if n.op == "call_function"}


# Islands


def islands(cut: Cut, timed: Collection[fx.Node]) -> dict[Kind, set[fx.Node]]:
    """Return the kinds of islands that a body can have, each with its nodes.

    `timed` are the arguments that depend on the timestep alone.
    """
    makers: dict[Kind, Callable[[], set[fx.Node]]] = {
        "norms": lambda: _norms(cut),
        "softmax": lambda: _softmax(cut),
        "time": lambda: _timed(cut.body, timed),
        "output": lambda: _output(cut),
    }
    lows = cut.lows()
    made = {kind: maker() for kind, maker in makers.items()}
    return {kind: nodes for kind, nodes in made.items() if nodes & lows}


def _norms(cut: Cut) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in cut.body.graph.nodes:
        if node.op != "call_function" or node in cut.layers:
            continue
        if packet(node) in _NORMS:
            found.add(node)
        elif packet(node) is aten.rsqrt:
            found |= _written_out(node)
        elif is_pointwise(node) and _follows(node, found):
            found.add(node)
    return found


def _follows(node: fx.Node, region: Collection[fx.Node]) -> bool:
    """Tell whether a node goes on from a region: a sum with a value as large does not."""
    sources = [n for n in node.all_input_nodes if isinstance(n.meta["val"], Tensor)]
    if not any(n in region for n in node.all_input_nodes):
        return False
    size = node.meta["val"].numel() if isinstance(node.meta["val"], Tensor) else 0
    return all(n in region or n.meta["val"].numel() < size for n in sources)


def _written_out(root: fx.Node) -> set[fx.Node]:
    """Return the nodes of a norm up to where it divides, by its `rsqrt`."""
    found, node = {root}, args(root)[0]
    while packet(node) in _MOMENTS and len(node.all_input_nodes) == 1:
        found.add(node)
        node = node.all_input_nodes[0]
    return found | {n for n in root.users if packet(n) is aten.mul and node in n.all_input_nodes}


def _softmax(cut: Cut) -> set[fx.Node]:
    roots = [n for n in cut.body.graph.nodes if packet(n) in SOFTMAX]
    inside = g.reach(
        roots,
        lambda n: (m for m in n.all_input_nodes if is_pointwise(m) and m not in cut.layers),
    )
    return inside | {n for n in cut.layers if packet(n) in FUSED}


def _timed(body: fx.GraphModule, timed: Collection[fx.Node]) -> set[fx.Node]:
    others = g.descendants(set(g.placeholders(body)) - set(timed))
    return {n for n in g.descendants(timed) - others if n.op == "call_function"}


def _output(cut: Cut) -> set[fx.Node]:
    needed = g.ancestors(cut.exits())
    last = [n for n in cut.layers if n in needed][-1:]
    return {n for n in g.descendants(last) if n.op == "call_function"}


def timed_arguments(program: Program, name: str) -> set[fx.Node]:
    """Return the arguments of a component that no input changes, and that its calls differ in."""
    given = g.descendants(g.placeholders(program.root))
    sites = program.calls(name)
    found = set()
    for index, formal in enumerate(g.placeholders(program.components[name])):
        actual = {args(site)[index] for site in sites}
        many = len(actual) > 1 or (len(sites) == 1 and formal.meta["val"].is_floating_point())
        if many and actual.isdisjoint(given):
            found.add(formal)
    return found
