"""Tables of per-step values: a call passes one row, which replaces many small computed values.

A body that needs dozens of per-step values (time projections, modulations) would get dozens of
arguments a call. Values of one dtype are concatenated into one row instead; the body slices the
row by views, which cost nothing once compiled.
"""

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from diffopt.ir import graph as g
from diffopt.ir.op_sets import SPLITS, VIEWS

aten = torch.ops.aten


def is_view(node: fx.Node) -> bool:
    """Tell whether a node is a view of its input, or an entry of a tuple."""
    if node.op != "call_function":
        return False
    return node.target in (*VIEWS, *SPLITS, operator.getitem)


def frontier(early: set[fx.Node], gm: fx.GraphModule) -> list[fx.Node]:
    """Return the values of `early` that the rest of the graph needs, in the order of the graph.

    A view at the frontier is replaced by the value that it views, which is no larger: the view
    itself is kept in the rest, and several views of one value need only that one.
    """
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    wanted: set[fx.Node] = set()
    stack = [n for n in early if n.op != "placeholder" and any(u not in early for u in n.users)]
    while stack:
        node = stack.pop()
        source = _viewed(node)
        if source is None or source.op in ("placeholder", "get_attr"):
            wanted.add(node)
        elif source not in wanted:
            stack.append(source)
    return sorted(wanted, key=order.__getitem__)


def _viewed(node: fx.Node) -> fx.Node | None:
    """Return the tensor that a node is a view of, through the tuple of a split; else None."""
    while is_view(node):
        node = node.all_input_nodes[0]
        if isinstance(node.meta["val"], Tensor):
            return node
    return None


def replace_by_rows(
    gm: fx.GraphModule, values: Sequence[tuple[fx.Node, Sequence[int]]], name: str
) -> list[list[int]]:
    """Replace values of a body by slices of rows: new placeholders, one for each dtype.

    Args:
        gm: The body.
        values: Nodes, each with its shape in the row, which is expanded to the node's own shape.
        name: Name of the placeholders.

    Returns:
        For each placeholder, the indices into `values` of what its row holds, in order.
    """
    groups: dict[torch.dtype, list[int]] = {}
    for index, (node, _) in enumerate(values):
        groups.setdefault(node.meta["val"].dtype, []).append(index)
    for dtype, members in groups.items():
        row = add_placeholder(gm, name)
        total = sum(math.prod(values[i][1]) for i in members)
        row.meta["val"] = g.fake(torch.empty(total, dtype=dtype))
        at = 0
        for node, shape in (values[i] for i in members):
            with gm.graph.inserting_before(first_after_arguments(gm)):
                part = g.call(
                    gm.graph, aten.slice.Tensor, row, 0, at, at + math.prod(shape), like=node
                )
                part = g.call(gm.graph, aten.view.default, part, list(shape), like=node)
                if list(shape) != list(node.meta["val"].shape):
                    part = g.call(
                        gm.graph, aten.expand.default, part, list(node.meta["val"].shape), like=node
                    )
            node.replace_all_uses_with(part)
            at += math.prod(shape)
    return list(groups.values())


def add_placeholder(gm: fx.GraphModule, name: str) -> fx.Node:
    """Add a placeholder after a body's others, under a free name near `name`."""
    last = g.placeholders(gm)[-1:] or [gm.graph._root]
    with gm.graph.inserting_after(last[0]):
        return gm.graph.placeholder(free_name(gm, name))


def free_name(gm: fx.GraphModule, name: str) -> str:
    """Return a placeholder name near `name` that the graph does not use."""
    used = {str(n.target) for n in g.placeholders(gm)}
    candidate, count = name, 1
    while candidate in used:
        count += 1
        candidate = f"{name}_{count}"
    return candidate


def first_after_arguments(gm: fx.GraphModule) -> fx.Node:
    """Return the first node that is no placeholder: rows are sliced before it."""
    first: fx.Node = next(n for n in gm.graph.nodes if n.op != "placeholder")
    return first


def to_row(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors of one dtype flattened and concatenated."""
    return torch.cat([t.reshape(-1) for t in tensors])


def pass_rows(root: fx.GraphModule, calls: list[fx.Node], rows: list[Tensor], name: str) -> None:
    """Store the distinct rows as a table, and pass each call its row as the last argument."""
    index: dict[bytes, int] = {}
    places = [index.setdefault(row.view(torch.uint8).numpy().tobytes(), len(index)) for row in rows]
    table = torch.stack([rows[places.index(k)] for k in range(len(index))])
    for call, place in zip(calls, places, strict=True):
        with root.graph.inserting_before(call):
            source = g.get_attr(root, name, table)
            row = g.call(root.graph, aten.select.int, source, 0, place)
        call.args = (*call.args, row)
