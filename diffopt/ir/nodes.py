"""Queries about nodes that rewrites share: arguments, stored tensors, purity, memory layouts."""

import operator
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.ir import graph as g
from diffopt.ir.program import Program

aten = torch.ops.aten

_UNINITIALISED = (
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
)


def args(node: fx.Node) -> tuple[Any, ...]:
    """Return a node's arguments as `Any`: fx's own type of them allows no access to their parts."""
    return node.args


def is_call(node: Any, *targets: Any) -> bool:
    """Tell whether a value is a call of one of these functions."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """Return an argument that a call passes by position or by name, else its default."""
    return args(node)[position] if len(node.args) > position else node.kwargs.get(name, default)


def schema_argument(node: fx.Node, name: str) -> Any:
    """Return an argument by its name in the operator's schema, or its default; None: no such."""
    for position, parameter in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if parameter.name == name:
            return argument(node, position, name, parameter.default_value)
    return None


def conv_geometry(node: fx.Node) -> tuple[list[int], list[int], list[int], int]:
    """Return a convolution's strides, paddings and dilations, each by spatial axis, and groups."""
    count = args(node)[1].meta["val"].dim() - 2

    def each(position: int, name: str, default: int) -> list[int]:
        value = argument(node, position, name, default)
        sizes = [value] if isinstance(value, int) else list(value)
        return sizes * count if len(sizes) == 1 else sizes

    sizes = each(3, "stride", 1), each(4, "padding", 0), each(5, "dilation", 1)
    return *sizes, argument(node, 6, "groups", 1)


def module_path(node: fx.Node) -> str:
    """Return the path of a node's module, which users select by; the node's name without one."""
    return str(node.meta.get("module") or node.name)


def stored_tensor(gm: fx.GraphModule, node: Any) -> Tensor | None:
    """Return the tensor that a `get_attr` node reads; None for anything else."""
    if isinstance(node, fx.Node) and node.op == "get_attr":
        tensor: Tensor = g.attribute(gm, str(node.target))
        return tensor
    return None


def is_pure(node: fx.Node) -> bool:
    """Tell whether a node's result depends on its arguments alone, and it mutates none of them."""
    if node.op != "call_function":
        return node.op == "get_attr"
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
        return False
    if node.target is aten.scaled_dot_product_attention.default:
        return bool(argument(node, 4, "dropout_p", 0.0) == 0.0)
    random = torch.Tag.nondeterministic_seeded in node.target.tags
    return not random and node.target not in _UNINITIALISED


def is_pure_graph(gm: fx.GraphModule) -> bool:
    """Tell whether every node of a component is pure."""
    return all(is_pure(n) for n in gm.graph.nodes if n.op not in ("placeholder", "output"))


def replace_node(node: fx.Node, new: fx.Node) -> None:
    """Replace all uses of `node` with `new`, and erase `node`."""
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def same_layout(a: fx.Node, b: fx.Node) -> bool:
    """Tell whether two tensors have the same dtype, device, shape and strides."""
    one, other = g.memory_layout(a.meta["val"]), g.memory_layout(b.meta["val"])
    return one is not None and other is not None and one[:4] == other[:4]


def weight_uses(program: Program) -> dict[int, int]:
    """Return the number of uses of each stored tensor in all graphs, by the tensor's id."""
    counts: dict[int, int] = {}
    for gm in program.graphs.values():
        for node in gm.graph.find_nodes(op="get_attr"):
            key = id(stored_tensor(gm, node))
            counts[key] = counts.get(key, 0) + len(node.users)
    return counts
