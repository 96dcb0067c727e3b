"""Runs a program's outer graph as a flat list of calls, with little Python for each."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from diffopt.ir import graph as g

ComponentFunction = Callable[[list[Tensor]], Sequence[Tensor]]
"""Runs one lowered component on its flat arguments."""


class Executor(Protocol):
    """Runs the outer graph."""

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs for flat inputs."""


# (what to call, where its arguments are, where its results go, what nobody reads afterwards)
_Step = tuple[Callable[[list[Any]], Any], tuple[int, ...], int | tuple[int, ...], tuple[int, ...]]


class SlotExecutor:
    """The outer graph with every value in a numbered slot, so that a run is one plain loop.

    What it computes itself it computes on `device`, where inputs have to be.
    """

    def __init__(
        self, root: fx.GraphModule, bodies: Mapping[str, ComponentFunction], device: str = "cpu"
    ) -> None:
        self._device = torch.device(device)
        slots, self._size = _slots(root.graph)
        self._inputs = len(g.placeholders(root))
        self._constants: list[Any] = [None] * self._size
        self._outputs = tuple(slots[n] for n in g.outputs(root))
        kept = set(self._outputs)
        steps: list[_Step] = []
        for node in root.graph.nodes:
            if node.op == "get_attr":
                self._constants[slots[node]] = g.attribute(root, str(node.target)).to(self._device)
                kept.add(slots[node])
            elif node.op in ("call_function", "call_module") and not _is_item(node):
                steps.append(self._step(node, slots, bodies))
        self._steps = _with_frees(steps, kept)

    def _step(
        self, node: fx.Node, slots: Mapping[fx.Node, int], bodies: Mapping[str, ComponentFunction]
    ) -> _Step:
        call: Callable[[list[Any]], Any]
        arguments: Any
        if node.op == "call_module":
            call, arguments = bodies[str(node.target)], node.args
        else:
            call, arguments = _bind(node, self._device)
        results: int | tuple[int, ...] = slots[node]
        if isinstance(node.meta["val"], (tuple, list)):
            spare = self._size - 1
            places = {u.args[1]: slots[u] for u in node.users if _is_item(u)}
            results = tuple(places.get(i, spare) for i in range(len(node.meta["val"])))
        return call, tuple(slots[n] for n in arguments), results, ()

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs for flat inputs."""
        values = self._constants.copy()
        values[: self._inputs] = tensors
        with torch.no_grad():
            for call, arguments, results, dead in self._steps:
                result = call([values[i] for i in arguments])
                if isinstance(results, int):
                    values[results] = result
                else:
                    for i, value in zip(results, result, strict=True):
                        values[i] = value
                for i in dead:
                    values[i] = None
        return [values[i] for i in self._outputs]


def _is_item(node: fx.Node) -> bool:
    return node.target is operator.getitem


def _slots(graph: fx.Graph) -> tuple[dict[fx.Node, int], int]:
    """Number the values, inputs first; a component's n-th result is in one slot however often read.

    The last slot takes the results that nobody reads.
    """
    slots: dict[fx.Node, int] = {}
    results: dict[tuple[fx.Node, int], int] = {}
    count = 0
    for node in graph.nodes:
        slots[node] = count
        if _is_item(node):
            slots[node] = results.setdefault((node.args[0], node.args[1]), count)
        count += slots[node] == count
    return slots, count + 1


def _with_frees(steps: list[_Step], kept: set[int]) -> list[_Step]:
    """Add to every step the slots that are read for the last time there."""
    seen = set(kept)
    result: list[_Step] = []
    for call, arguments, results, _ in reversed(steps):
        made = (results,) if isinstance(results, int) else results
        dead = tuple({i for i in (*arguments, *made) if i not in seen})
        seen.update(dead)
        result.append((call, arguments, results, dead))
    return result[::-1]


def _bind(node: fx.Node, device: torch.device) -> tuple[Callable[[list[Any]], Any], list[fx.Node]]:
    """Return a call of an operator on a list of the values it takes, and the nodes of these."""
    operator_ = node.target
    args, kwargs = _placed(node, device)
    assert callable(operator_)
    leading = list(itertools.takewhile(lambda argument: isinstance(argument, fx.Node), args))
    rest = args[len(leading) :]
    nodes: list[Any] = leading
    if not g.nodes_in((rest, kwargs)):  # the usual case: tensors first, then constants
        if kwargs:
            return lambda values: operator_(*values, *rest, **kwargs), nodes
        if rest:
            return lambda values: operator_(*values, *rest), nodes
        return lambda values: operator_(*values), nodes
    nodes = list(node.all_input_nodes)

    def general(values: list[Any]) -> Any:
        env = dict(zip(nodes, values, strict=True))
        return operator_(*fx.map_arg(args, env.__getitem__), **fx.map_arg(kwargs, env.__getitem__))

    return general, nodes


def _placed(node: fx.Node, device: torch.device) -> tuple[Any, Any]:
    """Return a node's arguments with `device` for the one that it was captured on."""

    def place(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    args, kwargs = fx.node.map_aggregate((node.args, dict(node.kwargs)), place)
    schema = getattr(node.target, "_schema", None)
    if schema is not None and not node.all_input_nodes:  # then no tensor says where it computes
        behind = [argument.name for argument in schema.arguments[len(args) :]]
        if "device" in behind and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": device}
    return args, kwargs


def set_device(gm: fx.GraphModule, device: str) -> None:
    """Let a graph compute on `device` what it was captured to compute on another."""
    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.args, node.kwargs = _placed(node, torch.device(device))
    gm.recompile()
