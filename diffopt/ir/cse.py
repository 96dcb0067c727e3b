"""Common subexpression elimination in a graph, and keys by which equal graphs are recognized."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import fx

from diffopt.ir import graph as g
from diffopt.ir.nodes import is_pure, replace_node, stored_tensor


def eliminate_common_subexpressions(gm: fx.GraphModule, keep: Collection[fx.Node] = ()) -> int:
    """Replace nodes by earlier equal ones, except for `keep`; return how many were replaced."""
    first: dict[Any, fx.Node] = {}
    count = 0
    for node in list(gm.graph.nodes):
        if node in keep or not (node.op == "call_module" or is_pure(node)):
            continue
        tensor = stored_tensor(gm, node)
        target = node.target if tensor is None else id(tensor)
        key = node.op, target, argument_key(node.args), argument_key(node.kwargs)
        if first.setdefault(key, node) is not node:
            replace_node(node, first[key])
            count += 1
    return count


def argument_key(value: Any, names: Mapping[fx.Node, Any] | None = None) -> Any:
    """Return a hashable form of an argument, which differs for 1 and 1.0, and for 0.0 and -0.0.

    Nodes count by identity, or by their `names`, so that different graphs can be compared.
    """
    if isinstance(value, fx.Node):
        return ("node", names[value] if names else id(value))
    if isinstance(value, (list, tuple)):
        return tuple(argument_key(item, names) for item in value)
    if isinstance(value, Mapping):
        return tuple((key, argument_key(value[key], names)) for key in sorted(value))
    return type(value), repr(value)


def structural_key(gm: fx.GraphModule) -> tuple[Any, ...]:
    """Return a key that is equal for components of equal nodes and identical weights.

    Nodes count by their position; of placeholders, the memory layout and the mark `reuse` count.
    """
    names: dict[fx.Node, Any] = {}
    rows: list[tuple[Any, ...]] = []
    for node in gm.graph.nodes:
        tensor = stored_tensor(gm, node)
        if node.op == "placeholder":
            key: tuple[Any, ...] = g.memory_layout(node.meta["val"]), bool(node.meta.get("reuse"))
        elif tensor is not None:
            key = (id(tensor),)
        else:
            key = node.target, argument_key(node.args, names), argument_key(node.kwargs, names)
        names[node] = len(names)
        rows.append((node.op, *key))
    return tuple(rows)
