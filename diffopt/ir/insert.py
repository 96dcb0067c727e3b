"""Insert operators into a graph by writing them as Python, as `matcher` reads them.

    def rounded(x: Var, scale: Var) -> Var:
        return cast(aten.round.default(x / scale), torch.int8)

    with graph.inserting_before(node):
        q = insert(graph, rounded, node, scale)

inserts, at the graph's insertion point,

    %div: float32[4,8] = aten.div.Tensor(%node, %scale)
    %round: float32[4,8] = aten.round(%div)
    %q: int8[4,8] = aten._to_copy(%round, dtype=torch.int8)

Nodes in tuples, lists and dataclasses among the arguments are variables as well.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from diffopt.ir import graph as g
from diffopt.ir.matcher import PYTHON_OPERATORS, Var
from diffopt.ir.nodes import replace_node

aten = torch.ops.aten


def insert(
    graph: fx.Graph, function: Callable[..., Var], *args: Any, like: fx.Node | None = None
) -> Any:
    """Insert what a function of variables computes; return its result, with nodes for variables.

    The new nodes' provenance is copied from `like`.
    """
    return _nodes(function(*_Tracer(graph, like).variables(args)))


def replace_calls(gm: fx.GraphModule, functions: Mapping[Any, Callable[[Var], Var]]) -> None:
    """Replace calls of operators by what a function of the call's node computes; in place."""
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target in functions:
            with gm.graph.inserting_before(node):
                new = insert(gm.graph, functions[node.target], node)
            replace_node(node, new)
    g.prune_unused(gm)
    gm.recompile()


def cast(x: Var, dtype: torch.dtype) -> Var:
    """Return a variable in a type: the variable itself if it is that already."""
    return x if x.dtype == dtype else aten._to_copy.default(x, dtype=dtype)


def _nodes(value: Any) -> Any:
    return fx.node.map_aggregate(value, lambda v: v.node if isinstance(v, fx.Proxy) else v)


class _Variable(fx.Proxy):
    """A node that operators can be called with."""

    meta = property(lambda self: self.node.meta)
    dtype = property(lambda self: self.meta["val"].dtype)
    shape = property(lambda self: self.meta["val"].shape)
    args = property(lambda self: self.tracer.variables(self.node.args))


class _Tracer(fx.proxy.GraphAppendingTracer):
    """Appends to a graph where that says."""

    def __init__(self, graph: fx.Graph, like: fx.Node | None) -> None:
        super().__init__(graph)
        self._like = like

    def variables(self, value: Any) -> Any:
        """Return nested values with variables for nodes."""
        if isinstance(value, fx.Node):
            return _Variable(value, self)
        if isinstance(value, (list, tuple)):
            return type(value)(map(self.variables, value))
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            return type(value)(**{name: self.variables(v) for name, v in fields.items()})
        return value

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *_: Any, **__: Any
    ) -> fx.Proxy:
        """Insert a call of an operator."""
        target = PYTHON_OPERATORS.get(target, target)
        if not isinstance(target, OpOverload) and target is not operator.getitem:
            name = getattr(target, "__name__", target)
            raise TypeError(f"{name} of a tensor is no operator: write aten.{name}")
        node = g.call(self.graph, target, *_nodes(args), like=self._like, **_nodes(kwargs))
        return _Variable(node, self)
