"""Checks the invariants of a program's graphs; a broken one is a `VerifyError`."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from diffopt.errors import VerifyError, first_line
from diffopt.ir import graph as g
from diffopt.ir.printing import format_type

_INFERRED: dict[tuple[Any, ...], str] = {}
_MOST = 1 << 14  # of them, about 10 MB


def verify_graph(name: str, gm: fx.GraphModule, *, is_root: bool) -> None:
    """Check that a graph is well formed, and that every value has the recorded type.

    `name` is what errors call it; only the root graph may call components.
    """
    try:
        gm.graph.lint()
    except Exception as error:
        raise VerifyError(f"{name}: {error}") from error
    for node in gm.graph.nodes:
        where = _Where(name, node)
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
            if getattr(getattr(node.target, "_schema", None), "is_mutable", False):
                raise VerifyError(f"{where}: {node.target} writes in place")
            _verify_format(where, node.meta["val"], _inferred_format(where, node))
        elif node.op == "call_module" and not is_root:
            raise VerifyError(f"{where}: a component calls a component")


def verify_call(node: fx.Node, body: fx.GraphModule) -> None:
    """Check the types of a call's arguments and value against its component's."""
    where = _Where("program", node)
    formals = g.placeholders(body)
    if len(formals) != len(node.args) or node.kwargs:
        raise VerifyError(f"{where}: passes {len(node.args)} values, takes {len(formals)}")
    for formal, actual in zip(formals, node.args, strict=True):
        assert isinstance(actual, fx.Node)
        verify_type(f"{where}: {formal.name}", formal.meta["val"], actual.meta["val"])
    verify_type(where, node.meta["val"], tuple(n.meta["val"] for n in g.outputs(body)))


def verify_type(where: object, recorded: Any, actual: Any) -> None:
    """Check that a recorded value has the dtype and shape of the actual one."""
    _verify_format(where, recorded, format_type(actual))


def _verify_format(where: object, recorded: Any, actual: str) -> None:
    if format_type(recorded) != actual:
        raise VerifyError(f"{where}: recorded as {format_type(recorded)}, is {actual}")


@dataclass(frozen=True)
class _Where:
    """A node for messages; its text takes as long as a check."""

    graph: str
    node: fx.Node

    def __str__(self) -> str:
        return f"{self.graph}: {self.node.format_node()}"


def _inferred_format(where: object, node: fx.Node) -> str:
    """Return the type that an operator infers, as text.

    Layers are alike, and graphs are verified after every pass, so that most operators are known.
    """
    arguments = fx.map_arg((node.args, node.kwargs), _describe)
    key = node.target, repr(arguments), torch.get_default_dtype()
    if (known := _INFERRED.get(key)) is None:
        if len(_INFERRED) > _MOST:
            _INFERRED.clear()
        _TORCH_LOG.disabled = True  # it has the traceback of what is a line here
        try:
            known = _INFERRED[key] = format_type(g.infer_value(node))
        except Exception as error:
            reason = first_line(error)
            raise VerifyError(f"{where}: {node.target} fails on such values: {reason}") from error
        finally:
            _TORCH_LOG.disabled = False
    return known


_TORCH_LOG = logging.getLogger("torch._subclasses.fake_tensor")


def _describe(value: Any) -> Any:
    """Return all of a recorded value that decides what an operator infers."""
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    if isinstance(value, (list, tuple)):
        return [_describe(item) for item in value]
    return value if (layout := g.memory_layout(value)) is None else layout
