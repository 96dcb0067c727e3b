"""Takes what follows from stored weights alone out of models, for one model that runs on loading.

Components share weights, and so they share what is made of them: a matrix that is turned around,
the integers of 4-bit numbers, bfloat16 widened to float32. That is computed once, and each model
takes it as one more constant whose values are elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx
import onnx_graphsurgeon as gs

from diffopt.lowering.onnx import gs_tools

# These make much of little, which is better done where it is needed.
_GROWS = {"Expand", "Tile", "ConstantOfShape", "Range", "OneHot", "EyeLike", "Pad"}


@dataclass
class Stored:
    """Models without what follows from stored weights alone.

    Attributes:
        models: By component.
        setup: Computes that; None if there is nothing to compute.
        sources: By constant of the setup: the component and the tensor of it that has the values.
        takes: By component, by constant: the number of the setup's result that is its value.
    """

    models: dict[str, onnx.ModelProto] = field(default_factory=dict)
    setup: onnx.ModelProto | None = None
    sources: dict[str, tuple[str, str]] = field(default_factory=dict)
    takes: dict[str, dict[str, int]] = field(default_factory=dict)


def separate(
    models: Mapping[str, onnx.ModelProto], owners: Mapping[tuple[str, str], Any]
) -> Stored:
    """Take what follows from stored weights alone out of models.

    Args:
        models: By component.
        owners: By component and name of a tensor: what is the same for the same tensor.
    """
    result, setup = Stored(), _Setup(owners)
    for name, model in models.items():
        result.takes[name] = {}
        result.models[name] = gs_tools.edit(
            model,
            lambda graph, n=name: _take(n, graph, setup, result),  # type: ignore[misc]
        )
        del result.models[name].graph.value_info[:]
    if setup.graph.outputs:
        result.setup, result.sources = gs_tools.finish(setup.graph), setup.sources
    return result


class _Setup:
    """The graph that is to run on loading; equal nodes are one."""

    def __init__(self, owners: Mapping[tuple[str, str], Any]) -> None:
        self.graph = gs.Graph(opset=21, name="setup", ir_version=10)
        self.sources: dict[str, tuple[str, str]] = {}
        self._owners = owners
        self._made: dict[Any, gs.Tensor] = {}

    def tensor(self, component: str, tensor: gs.Tensor) -> gs.Tensor:
        """Return what has the values of a component's tensor."""
        if tensor.is_empty():
            return tensor
        if isinstance(tensor, gs.Constant):
            return self._constant(component, tensor)
        node = tensor.inputs[0]
        inputs = [self.tensor(component, t) for t in node.inputs]
        attributes = tuple((key, str(_plain(value))) for key, value in sorted(node.attrs.items()))
        index = next(i for i, t in enumerate(node.outputs) if t is tensor)
        key = node.op, node.domain, attributes, tuple(map(id, inputs)), index
        if key not in self._made:
            name = gs_tools.fresh(self.graph, f"/{node.op}")
            outputs = [
                gs.Variable(f"{name}_{i}", t.dtype, t.shape) for i, t in enumerate(node.outputs)
            ]
            attrs = dict(node.attrs)
            self.graph.nodes.append(gs.Node(node.op, name, attrs, inputs, outputs, node.domain))
            for i, output in enumerate(outputs):
                self._made[(*key[:-1], i)] = output
        return self._made[key]

    def _constant(self, component: str, tensor: gs.Constant) -> gs.Tensor:
        if gs_tools.is_outside(tensor):
            source = component, gs_tools.source(tensor)
            key: Any = self._owners[source], gs_tools.number(tensor), tuple(tensor.shape)
        else:
            key = gs_tools.number(tensor), tuple(tensor.shape), gs_tools.content(tensor)
        if key not in self._made:
            name = f"{'weight' if gs_tools.is_outside(tensor) else 'constant'}_{len(self._made)}"
            if gs_tools.is_outside(tensor):
                number = gs_tools.number(tensor)
                self._made[key] = gs_tools.outside(name, number, tensor.shape, name)
                self.sources[name] = source
            else:
                self._made[key] = gs_tools.renamed(tensor, name)
        return self._made[key]

    def result(self, tensor: gs.Tensor) -> int:
        """Return the number of a tensor among the results."""
        for index, output in enumerate(self.graph.outputs):
            if output is tensor:
                return index
        self.graph.outputs.append(tensor)
        return len(self.graph.outputs) - 1


def _plain(value: Any) -> Any:
    return value.values.tolist() if isinstance(value, gs.Constant) else value


def _take(name: str, graph: gs.Graph, setup: _Setup, result: Stored) -> None:
    graph.toposort()
    known: set[int] = set()
    for node in graph.nodes:
        inputs = [t for t in node.inputs if not t.is_empty()]
        fixed = all(isinstance(t, gs.Constant) or id(t) in known for t in inputs)
        if fixed and inputs and node.op not in _GROWS:
            known.update(id(t) for t in node.outputs)
    ends = {id(t) for t in graph.outputs}
    for tensor in list(graph.tensors().values()):
        if id(tensor) not in known:
            continue
        users = [n for n in tensor.outputs if not any(id(t) in known for t in n.outputs)]
        if not users and id(tensor) not in ends:
            continue
        index = setup.result(setup.tensor(name, tensor))
        new = gs_tools.outside(f"/setup_{index}", gs_tools.number(tensor), tensor.shape, "setup")
        result.takes[name][new.name] = index
        for user in users:
            user.inputs = [new if t is tensor else t for t in user.inputs]
        if id(tensor) in ends:
            gs_tools.replace(graph, tensor, new)
