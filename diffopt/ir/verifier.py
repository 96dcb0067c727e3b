"""The invariants of a program's graphs."""

from typing import Any

from torch import fx

from diffopt.errors import VerifyError
from diffopt.ir import graph as g
from diffopt.ir.printing import format_type


def verify_graph(name: str, gm: fx.GraphModule, *, is_root: bool) -> None:
    """Check one graph: well formed, and every value of the recorded type."""
    try:
        gm.graph.lint()
    except Exception as error:
        raise VerifyError(f"{name}: {error}") from error
    for node in gm.graph.nodes:
        where = f"{name}: {node.format_node()}"
        if node.op == "output":
            if not (
                isinstance(node.args[0], tuple)
                and all(isinstance(n, fx.Node) for n in node.args[0])
            ):
                raise VerifyError(f"{where}: the output is not a flat tuple of values")
            continue
        if "val" not in node.meta:
            raise VerifyError(f"{where}: the value has no recorded type")
        if node.op == "get_attr":
            verify_type(where, node.meta["val"], g.attribute(gm, str(node.target)))
        elif node.op == "call_function":
            verify_type(where, node.meta["val"], g.infer_value(node))
        elif node.op == "call_module" and not is_root:
            raise VerifyError(f"{where}: a component calls a component")


def verify_call(node: fx.Node, body: fx.GraphModule) -> None:
    """Check that a call passes what the component takes, and is recorded as what it returns."""
    takes = g.placeholders(body)
    if len(takes) != len(node.args) or node.kwargs:
        raise VerifyError(
            f"program: {node.format_node()}: passes {len(node.args)} values, takes {len(takes)}"
        )
    for formal, actual in zip(takes, node.args, strict=True):
        assert isinstance(actual, fx.Node)
        verify_type(
            f"program: {node.format_node()}: {formal.name}", formal.meta["val"], actual.meta["val"]
        )
    verify_type(
        f"program: {node.format_node()}",
        node.meta["val"],
        tuple(n.meta["val"] for n in g.outputs(body)),
    )


def verify_type(where: str, recorded: Any, actual: Any) -> None:
    """Check a recorded type."""
    if format_type(recorded) != format_type(actual):
        raise VerifyError(f"{where}: recorded as {format_type(recorded)}, is {format_type(actual)}")
