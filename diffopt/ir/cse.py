"""Common subexpressions: which nodes and which graphs compute the same."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import fx

from diffopt.ir.nodes import is_pure, memory_layout, replace_node, stored_tensor


def eliminate_common_subexpressions(gm: fx.GraphModule, keep: Collection[fx.Node] = ()) -> int:
    """Compute what is computed twice once, but for `keep`; return how many nodes that saved."""
    seen: dict[Any, fx.Node] = {}
    count = 0
    for node in list(gm.graph.nodes):
        if node in keep or not (node.op == "call_module" or is_pure(node)):
            continue
        tensor = stored_tensor(gm, node)
        what = node.target if tensor is None else id(tensor)
        first = seen.setdefault(
            (node.op, what, argument_key(node.args), argument_key(node.kwargs)), node
        )
        if first is not node:
            replace_node(node, first)
            count += 1
    return count


def argument_key(value: Any, names: Mapping[fx.Node, Any] | None = None) -> Any:
    """Return an argument as something hashable that tells 1 from 1.0 and 0.0 from -0.0.

    `names` gives nodes other names than their identity, to compare different graphs.
    """
    if isinstance(value, fx.Node):
        return ("node", names[value] if names else id(value))
    if isinstance(value, (list, tuple)):
        return tuple(argument_key(item, names) for item in value)
    if isinstance(value, Mapping):
        return tuple((key, argument_key(value[key], names)) for key in sorted(value))
    return type(value), repr(value)


def structural_key(gm: fx.GraphModule) -> tuple[Any, ...]:
    """Return what a component does, by its weights' identity and without its nodes' names."""
    names: dict[fx.Node, Any] = {}
    rows = []
    for node in gm.graph.nodes:
        tensor = stored_tensor(gm, node)
        if node.op == "placeholder":
            row: tuple[Any, ...] = (
                node.op,
                memory_layout(node.meta["val"]),
                bool(node.meta.get("reuse")),
            )
        elif tensor is not None:
            row = (node.op, id(tensor))
        else:
            row = (
                node.op,
                node.target,
                argument_key(node.args, names),
                argument_key(node.kwargs, names),
            )
        names[node] = len(names)
        rows.append(row)
    return tuple(rows)
