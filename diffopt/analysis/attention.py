"""Find attentions: fused operators, and products of activations with no layer between them."""

from dataclasses import dataclass

from torch import fx

from diffopt.analysis.reachability import FUSED, LAYERS, PRODUCTS, Reach, packet


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention: its result, its inputs, and whether keys and values are loop-invariant."""

    node: fx.Node
    inputs: tuple[fx.Node, ...]
    cross: bool


def find_attentions(reach: Reach) -> list[Attention]:
    """Return fused attentions and products of activations with no layer between them, in order."""
    attentions = []
    inside: dict[fx.Node, list[fx.Node]] = {}  # by an attention's last product: all of them
    for node in reach.nodes:
        if not reach.is_loop_variant(node):
            continue
        if packet(node) in FUSED:
            attentions.append(Attention(node, *_fused_inputs(reach, node)))
        elif packet(node) in PRODUCTS and _is_of_activations(reach, node):
            earlier = [p for n in node.all_input_nodes for p in _products_before(reach, n)]
            inside[node] = [q for p in earlier for q in inside.pop(p, [p])] + [node]
    for node, products in inside.items():
        operands = [n for p in products for n in p.all_input_nodes]
        inputs = tuple(n for n in operands if not _products_before(reach, n))
        cross = all(len(reach.loop_variant_inputs(p)) == 1 for p in products)
        attentions.append(Attention(node, inputs, cross))
    return sorted(attentions, key=lambda a: reach.index[a.node])


def _fused_inputs(reach: Reach, node: fx.Node) -> tuple[tuple[fx.Node, ...], bool]:
    names = ("query", "key", "value")
    arguments = dict(zip(names, node.args, strict=False)) | node.kwargs
    inputs = tuple(arguments[name] for name in names)
    return inputs, not any(reach.is_loop_variant(n) for n in inputs[1:])  # type: ignore[return-value,arg-type]


def _is_of_activations(reach: Reach, node: fx.Node) -> bool:
    """Tell whether both operands depend on arguments, neither on weights alone."""
    operands = node.all_input_nodes
    return len(operands) > 1 and all(reach.ancestors[n] & reach.arguments for n in operands)


def _products_before(reach: Reach, node: fx.Node) -> list[fx.Node]:
    """Return the nearest loop-variant products above a value with no layer in between."""
    products, stack, seen = [], [node], set[fx.Node]()
    while stack:
        node = stack.pop()
        operator = packet(node)
        if node in seen or not reach.is_loop_variant(node) or operator in LAYERS | FUSED:
            continue
        seen.add(node)
        if operator in PRODUCTS and _is_of_activations(reach, node):
            products.append(node)
        else:
            stack.extend(node.all_input_nodes)
    return products
