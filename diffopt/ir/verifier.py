"""Checks the invariants of a program's graphs; a broken one is a `VerifyError`."""

from typing import Any

from torch import fx

from diffopt.errors import VerifyError
from diffopt.ir import graph as g
from diffopt.ir.printing import format_type


def verify_graph(name: str, gm: fx.GraphModule, *, is_root: bool) -> None:
    """Check that a graph is well formed, and that every value has the recorded type.

    `name` is what errors call it; only the root graph may call components.
    """
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
    """Check the types of a call's arguments and value against its component's."""
    where = f"program: {node.format_node()}"
    formals = g.placeholders(body)
    if len(formals) != len(node.args) or node.kwargs:
        raise VerifyError(f"{where}: passes {len(node.args)} values, takes {len(formals)}")
    for formal, actual in zip(formals, node.args, strict=True):
        assert isinstance(actual, fx.Node)
        verify_type(f"{where}: {formal.name}", formal.meta["val"], actual.meta["val"])
    verify_type(where, node.meta["val"], tuple(n.meta["val"] for n in g.outputs(body)))


def verify_type(where: str, recorded: Any, actual: Any) -> None:
    """Check that a recorded value has the dtype and shape of the actual one."""
    if format_type(recorded) != format_type(actual):
        raise VerifyError(f"{where}: recorded as {format_type(recorded)}, is {format_type(actual)}")
