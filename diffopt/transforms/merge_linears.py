"""Merges linear layers that share their input into one, as those of Q, K and V.

x W1ᵀ + b1 | x W2ᵀ + b2 = x [W1; W2]ᵀ + [b1; b2]
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from diffopt.ir import graph as g
from diffopt.ir import qdq, weight_origins
from diffopt.ir.cse import eliminate_common_subexpressions
from diffopt.ir.matcher import Pattern, Var, constant, constant_or_none
from diffopt.ir.nodes import args, replace_node, stored_tensor, weight_uses
from diffopt.ir.program import Program
from diffopt.ir.propagation import propagate_layouts, restore_output_layouts

aten = torch.ops.aten

Skip = Callable[[str, str], None]


@dataclass(frozen=True, eq=False)
class _Linear:
    """A linear layer with stored weights, and its input."""

    graph: str
    node: fx.Node
    source: fx.Node
    weight: Tensor
    bias: Tensor | None

    @property
    def place(self) -> tuple[str, fx.Node]:
        """Return the input and its graph; layers that share them can be merged."""
        return self.graph, self.source

    def __str__(self) -> str:
        return f"{self.graph}.{self.node.name}" if self.graph else self.node.name


def merge_linears(program: Program, max_bytes: int, skip: Skip) -> int:
    """Merge linear layers of one input; return how many fewer layers there are in all graphs.

    A weight that several components share is merged the same way in all of them, or not at all, so
    that none is stored twice.
    """
    for name, gm in program.graphs.items():
        eliminate_common_subexpressions(gm)
        _skip_quantized(name, gm, skip)
    by_weight: dict[int, list[_Linear]] = {}
    for layer in _layers(program):
        by_weight.setdefault(id(layer.weight), []).append(layer)
    uses = weight_uses(program)
    crowded = _crowded(by_weight)
    groups: dict[object, list[list[_Linear]]] = {}
    for key, layers in by_weight.items():
        places = frozenset(layer.place for layer in layers)
        if not places & crowded:
            continue
        if uses[key] != len(layers) or len(places) != len(layers):
            skip(str(layers[0]), "its weight is also used in another way")
            continue
        if any(layer.bias is not layers[0].bias for layer in layers):
            skip(str(layers[0]), "its weight is used with different biases")
            continue
        groups.setdefault((places, layers[0].weight.dtype), []).append(layers)
    count = 0
    for group in groups.values():
        if len(group) == 1:
            skip(str(group[0][0]), "no other layer of its input is used in the same places")
        for chunk in _chunks(group, max_bytes, skip):
            _merge(program, chunk)
            count += (len(chunk) - 1) * len(chunk[0])
    return count


@Pattern
def _linear(x: Var, weight: Var, bias: Var) -> Var:
    return aten.linear.default(x, constant(weight), constant_or_none(bias))


def _layers(program: Program) -> list[_Linear]:
    """Return the linear layers whose weights have two axes and the type of their inputs."""
    layers = []
    for name, gm in program.graphs.items():
        for match in _linear.find(gm):
            x, weight = match["x"], g.attribute(gm, match["weight"].target)
            if weight.dim() == 2 and weight.dtype == x.meta["val"].dtype:
                bias = stored_tensor(gm, match["bias"])
                layers.append(_Linear(name, match.node, x, weight, bias))
    return layers


def _skip_quantized(name: str, gm: fx.GraphModule, skip: Skip) -> None:
    """Report quantized layers whose input other layers read too: they are not merged."""
    readers: dict[fx.Node, list[fx.Node]] = {}
    for layer in qdq.layers(gm):
        if not layer.convolution:
            readers.setdefault(layer.x, []).append(layer.node)
    for nodes in readers.values():
        first = next((n for n in nodes if qdq.weight(args(n)[1]) is not None), None)
        if first is not None and len(nodes) > 1:
            where = f"{name}.{first.name}" if name else first.name
            skip(where, "its weight is quantized: run fuse before quantize")


def _crowded(by_weight: dict[int, list[_Linear]]) -> set[tuple[str, fx.Node]]:
    """Return the inputs that layers with more than one weight read."""
    seen: dict[tuple[str, fx.Node], int] = {}
    for layers in by_weight.values():
        for place in {layer.place for layer in layers}:
            seen[place] = seen.get(place, 0) + 1
    return {place for place, count in seen.items() if count > 1}


def _chunks(group: list[list[_Linear]], max_bytes: int, skip: Skip) -> list[list[list[_Linear]]]:
    """Cut a group so that no merged weight is larger than `max_bytes`."""
    chunks: list[list[list[_Linear]]] = []
    total = 0
    for layers in group:
        size = g.tensor_bytes([layers[0].weight])
        if chunks and total + size > max_bytes:
            skip(str(layers[0]), "the merged weight would be over max-merged-mb")
        if not chunks or total + size > max_bytes:
            chunks.append([])
            total = 0
        chunks[-1].append(layers)
        total += size
    return [chunk for chunk in chunks if len(chunk) > 1]


def _merge(program: Program, chunk: list[list[_Linear]]) -> None:
    """Merge layers of equal places; `chunk` has the uses of each weight."""
    layers = [uses[0] for uses in chunk]
    weight = _parameter([layer.weight for layer in layers])
    bias = None
    if any(layer.bias is not None for layer in layers):
        zeros = [layer.weight.new_zeros(len(layer.weight)) for layer in layers]
        filled = [
            b if b is not None else z for b, z in zip((x.bias for x in layers), zeros, strict=True)
        ]
        bias = _parameter(filled)
    for place in dict.fromkeys(use.place for use in chunk[0]):
        nodes = [next(use.node for use in uses if use.place == place) for uses in chunk]
        _merge_nodes(program, place[0], nodes, weight, bias)


def _parameter(parts: Sequence[Tensor]) -> Tensor:
    whole = torch.cat([part.detach() for part in parts])
    result = torch.nn.Parameter(whole, requires_grad=False)
    weight_origins.record(result, weight_origins.joined([*map(weight_origins.origin_of, parts)]))
    return result


def _merge_nodes(
    program: Program, name: str, nodes: list[fx.Node], weight: Tensor, bias: Tensor | None
) -> None:
    gm = program.graphs[name]
    order = {node: index for index, node in enumerate(gm.graph.nodes)}
    first = min(nodes, key=order.__getitem__)
    stem = str(args(first)[1].target).removesuffix("_weight")
    sizes = [int(node.meta["val"].shape[-1]) for node in nodes]
    before = [node.meta["val"] for node in g.outputs(gm)]
    graph = gm.graph
    with graph.inserting_before(first):
        arguments = [args(first)[0], g.get_attr(gm, f"{stem}_merged_weight", weight)]
        if bias is not None:
            arguments.append(g.get_attr(gm, f"{stem}_merged_bias", bias))
        whole = g.call(graph, aten.linear.default, *arguments, like=first)
        parts = g.call(graph, aten.split_with_sizes.default, whole, sizes, -1, like=first)
        whole.meta["module"] = _common([node.meta.get("module", "") for node in nodes])
        items = [g.call(graph, operator.getitem, parts, i, like=n) for i, n in enumerate(nodes)]
    for node, item in zip(nodes, items, strict=True):
        replace_node(node, item)
    propagate_layouts(gm, set(items))
    restore_output_layouts(program, name, before)


def _common(paths: Sequence[str]) -> str:
    """Return the longest module path that all paths begin with."""
    common = []
    for parts in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
