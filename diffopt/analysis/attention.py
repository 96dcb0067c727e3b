"""Attentions in a graph: fused operators, and products of activations with no layer between."""

from dataclasses import dataclass

from torch import fx

from diffopt.analysis.reachability import FUSED, LAYERS, PRODUCTS, Walk, packet


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention: the node of its result, what it takes, and whether keys are fixed."""

    node: fx.Node
    inputs: tuple[fx.Node, ...]
    cross: bool


def find_attentions(walk: Walk) -> list[Attention]:
    """Find fused attentions, and products of activations that no layer is between."""
    found = []
    inside: dict[fx.Node, list[fx.Node]] = {}  # the products of an attention by its last one
    for node in walk.nodes:
        if not walk.lives(node):
            continue
        if packet(node) in FUSED:
            found.append(Attention(node, *_fused_inputs(walk, node)))
        elif packet(node) in PRODUCTS and _is_of_activations(walk, node):
            earlier = [p for n in node.all_input_nodes for p in _products_before(walk, n)]
            inside[node] = [q for p in earlier for q in inside.pop(p, [p])] + [node]
    for node, products in inside.items():
        operands = [n for p in products for n in p.all_input_nodes]
        inputs = tuple(n for n in operands if not _products_before(walk, n))
        cross = all(len(walk.living_inputs(p)) == 1 for p in products)
        found.append(Attention(node, inputs, cross))
    return sorted(found, key=lambda a: walk.index[a.node])


def _fused_inputs(walk: Walk, node: fx.Node) -> tuple[tuple[fx.Node, ...], bool]:
    names = ("query", "key", "value")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    inputs = tuple(given[name] for name in names)
    return inputs, not any(walk.lives(n) for n in inputs[1:])  # type: ignore[return-value,arg-type]


def _is_of_activations(walk: Walk, node: fx.Node) -> bool:
    """Tell whether each of two operands depends on an argument: none is made of weights alone."""
    operands = node.all_input_nodes
    return len(operands) > 1 and all(walk.above[n] & walk.arguments for n in operands)


def _products_before(walk: Walk, node: fx.Node) -> list[fx.Node]:
    """Return the nearest living products that a value is computed from with no layer between."""
    found, stack, seen = [], [node], set[fx.Node]()
    while stack:
        node = stack.pop()
        operator = packet(node)
        if node in seen or not walk.lives(node) or operator in LAYERS | FUSED:
            continue
        seen.add(node)
        if operator in PRODUCTS and _is_of_activations(walk, node):
            found.append(node)
        else:
            stack.extend(node.all_input_nodes)
    return found
