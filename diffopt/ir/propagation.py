"""Memory layouts behind a rewrite: inferred anew downstream, and restored at outputs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from diffopt.ir import graph as g
from diffopt.ir.program import Program
from diffopt.ir.strides import restore_outputs

aten = torch.ops.aten


def infer_or_reshape(node: fx.Node) -> Any:
    """Return a node's fake value; a view that its input's strides forbid becomes a `reshape`."""
    try:
        return g.infer_value(node)
    except (RuntimeError, ValueError):
        if node.target not in (aten.view.default, aten._unsafe_view.default):
            raise
        node.target = aten.reshape.default
        return g.infer_value(node)


def propagate_layouts(gm: fx.GraphModule, changed: set[fx.Node]) -> None:
    """Infer and record the values downstream of nodes whose memory layout changed.

    A view that the new strides forbid becomes a `reshape`. `changed` is extended.
    """
    for node in gm.graph.nodes:
        if node.op != "call_function" or changed.isdisjoint(node.all_input_nodes):
            continue
        value = infer_or_reshape(node)
        if _layouts(value) != _layouts(node.meta["val"]):
            node.meta["val"] = value
            changed.add(node)


def restore_output_layouts(program: Program, name: str, before: Sequence[Any]) -> None:
    """Restore the memory layouts of a graph's outputs, and update the callers.

    Args:
        program: The program.
        name: The component that returns them; "" for the root graph.
        before: The fake value of each output before the rewrite.
    """
    gm = program.graphs[name]
    restore_outputs(gm, before)
    values = tuple(node.meta["val"] for node in g.outputs(gm))
    for site in program.calls(name) if name else []:
        site.meta["val"] = values
        propagate_layouts(program.root, {site})


def _layouts(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(g.memory_layout, value))
    return g.memory_layout(value)
