"""Runs a program's outer graph as a flat list of calls, with little Python for each.

Engines run nothing else between their kernels, often thousands of small operators a call. So this
is no `ir.interpreter`: arguments are looked up by number, and constants are bound beforehand.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from diffopt.ir import graph as g

ComponentFunction = Callable[[list[Tensor]], Sequence[Tensor]]
"""Computes the results of one lowered component from its flat arguments."""


class Pause:
    """A run between two steps of sampling.

    Attributes:
        index: How many steps have run.
        wait: Waits until they are done, where that is on another device.
    """

    def __init__(self, executor: SlotExecutor, values: list[Any], index: int) -> None:
        self.wait: Callable[[], object] = lambda: None
        self._executor = executor
        self._values = values
        self._slot = executor.latents[index - 1]
        self.index = index

    @property
    def latents(self) -> Tensor | None:
        """What the next step begins with, which may be replaced; None where it is not known."""
        return None if self._slot is None else self._values[self._slot]

    @latents.setter
    def latents(self, tensor: Tensor) -> None:
        assert self._slot is not None
        self._values[self._slot] = tensor

    def finish(self) -> list[Tensor] | None:
        """Return the outputs that the run would have if this was the last step; None: not known."""
        if self._slot is None:
            return None
        return self._executor.finish(self._values, self._values[self._slot])


Watch = Callable[[Pause], None]
"""Called between the steps of a run; what it raises ends the run."""


class Executor(Protocol):
    """Runs the outer graph."""

    @property
    def is_stepwise(self) -> bool:
        """Tell whether it runs step by step in any case, so that watching it costs nothing."""

    def run(self, tensors: Sequence[Tensor], watch: Watch | None = None) -> list[Tensor]:
        """Return the outputs for flat inputs; `watch` is called after each step."""


# (function, slots of its arguments, slots of its results, slots to free afterwards)
_Step = tuple[Callable[[list[Any]], Any], tuple[int, ...], int | tuple[int, ...], tuple[int, ...]]


class SlotExecutor:
    """Runs the outer graph as one loop over calls, with every value in a numbered slot.

    Its own operators run on `device`, where inputs have to be. Steps end where
    `step_boundaries.mark` says.

    Attributes:
        latents: The slots of the latents that each step leaves; None: not known.
    """

    is_stepwise = True

    def __init__(
        self, root: fx.GraphModule, bodies: Mapping[str, ComponentFunction], device: str = "cpu"
    ) -> None:
        self._device = torch.device(device)
        slots, self._size = _slots(root.graph)
        self._inputs = len(g.placeholders(root))
        self._constants: list[Any] = [None] * self._size
        self._outputs = tuple(slots[n] for n in g.outputs(root))
        never_freed = set(self._outputs)
        steps: list[_Step] = []
        ends: list[int] = []
        self.latents: list[int | None] = []
        for node in root.graph.nodes:
            if node.op == "get_attr":
                self._constants[slots[node]] = g.attribute(root, str(node.target)).to(self._device)
                never_freed.add(slots[node])
            elif node.op in ("call_function", "call_module") and not _is_item(node):
                steps.append(self._step(node, slots, bodies))
            if "step_end" in node.meta:
                ends.append(len(steps))
                self.latents.append(slots.get(node.meta["step_end"]))
        steps = _with_frees(steps, never_freed)
        self._sections = [steps[a:b] for a, b in itertools.pairwise([0, *ends, len(steps)])]

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
            unused = self._size - 1
            items = {u.args[1]: slots[u] for u in node.users if _is_item(u)}
            results = tuple(items.get(i, unused) for i in range(len(node.meta["val"])))
        return call, tuple(slots[n] for n in arguments), results, ()

    def run(self, tensors: Sequence[Tensor], watch: Watch | None = None) -> list[Tensor]:
        """Return the outputs for flat inputs; `watch` is called after each step."""
        values = self._constants.copy()
        values[: self._inputs] = tensors
        for index, section in enumerate(self._sections, 1):
            _execute(section, values)
            if watch is not None and index < len(self._sections):
                watch(Pause(self, values, index))
        return [values[i] for i in self._outputs]

    def finish(self, values: Sequence[Any], latents: Tensor) -> list[Tensor] | None:
        """Return the outputs of a run that is cut short.

        Args:
            values: The values of the run so far.
            latents: What to take for those that the last step leaves.

        Returns:
            None where what follows the last step reads more than these of the steps left out.
        """
        slot, tail = self.latents[-1], self._sections[-1]
        if slot is None:
            return None
        known = {slot} | {i for i, value in enumerate(values) if value is not None}
        for _, arguments, results, _ in tail:
            if not known.issuperset(arguments):
                return None
            known |= {results} if isinstance(results, int) else set(results)
        if not known.issuperset(self._outputs):
            return None
        values = list(values)
        values[slot] = latents
        _execute(tail, values)
        return [values[i] for i in self._outputs]


def _execute(steps: Sequence[_Step], values: list[Any]) -> None:
    with torch.no_grad():
        for call, arguments, results, dead in steps:
            result = call([values[i] for i in arguments])
            if isinstance(results, int):
                values[results] = result
            else:
                for i, value in zip(results, result, strict=True):
                    values[i] = value
            for i in dead:
                values[i] = None


def _is_item(node: fx.Node) -> bool:
    return node.target is operator.getitem


def _slots(graph: fx.Graph) -> tuple[dict[fx.Node, int], int]:
    """Number the values, inputs first; all reads of a component's n-th result share a slot.

    The last slot is for results that nothing reads.
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


def _with_frees(steps: list[_Step], never_freed: set[int]) -> list[_Step]:
    """Add to every step the slots that no later step reads."""
    live = set(never_freed)
    reverse: list[_Step] = []
    for call, arguments, results, _ in reversed(steps):
        written = (results,) if isinstance(results, int) else results
        dead = tuple({i for i in (*arguments, *written) if i not in live})
        live.update(dead)
        reverse.append((call, arguments, results, dead))
    return reverse[::-1]


def _bind(node: fx.Node, device: torch.device) -> tuple[Callable[[list[Any]], Any], list[fx.Node]]:
    """Return an operator as a function of a list of values, and the nodes of these values."""
    operator_ = node.target
    args, kwargs = _arguments_on(node, device)
    assert callable(operator_)
    leading = list(itertools.takewhile(lambda argument: isinstance(argument, fx.Node), args))
    rest = args[len(leading) :]
    nodes: list[Any] = leading
    if not g.nodes_in((rest, kwargs)):  # usual: tensors first, then constants
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


def _arguments_on(node: fx.Node, device: torch.device) -> tuple[Any, Any]:
    """Return a node's arguments, with `device` in place of the one that it was captured on."""

    def replace(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    args, kwargs = fx.node.map_aggregate((node.args, dict(node.kwargs)), replace)
    schema = getattr(node.target, "_schema", None)
    if schema is not None and not node.all_input_nodes:  # no input determines the device
        remaining = [argument.name for argument in schema.arguments[len(args) :]]
        if "device" in remaining and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": device}
    return args, kwargs


def set_device(gm: fx.GraphModule, device: str) -> None:
    """Replace the device in the arguments of a graph's operators."""
    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.args, node.kwargs = _arguments_on(node, torch.device(device))
    gm.recompile()
