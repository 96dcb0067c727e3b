"""Moves what is computed from weights alone out of models, into one model that runs on loading.

Components share weights, and so they share what is computed from them: a transposed matrix, 4-bit
numbers as int8, bfloat16 widened to float32. The setup model computes each once. The components'
models read the results as constants with external data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx
import onnx_graphsurgeon as gs

from diffopt.lowering.onnx.gs_tools import (
    constant_bytes,
    copy_constant,
    edit,
    elem_type,
    external_constant,
    external_location,
    is_external,
    replace_uses,
    to_model,
    unique_name,
)

# Their results may be much larger than their inputs: cheaper to compute than to keep in memory.
_GROWING_OPS = {"Expand", "Tile", "ConstantOfShape", "Range", "OneHot", "EyeLike", "Pad"}


@dataclass
class Precomputed:
    """Models without computations on weights alone, and the setup model that does these.

    Attributes:
        models: The components' models by name.
        setup: The setup model; None if there is nothing to compute.
        sources: Component and tensor whose values an initializer of the setup model has.
        results: By component and initializer of its model: the index of the setup's output whose
            value it has.
    """

    models: dict[str, onnx.ModelProto] = field(default_factory=dict)
    setup: onnx.ModelProto | None = None
    sources: dict[str, tuple[str, str]] = field(default_factory=dict)
    results: dict[str, dict[str, int]] = field(default_factory=dict)


def precompute_weights(
    models: Mapping[str, onnx.ModelProto], tensor_ids: Mapping[tuple[str, str], Any]
) -> Precomputed:
    """Move computations on weights alone from the components' models into a setup model.

    Args:
        models: The components' models by name.
        tensor_ids: By component and tensor name, an id that is equal for shared tensors.
    """
    result, setup = Precomputed(), _Setup(tensor_ids)
    for name, model in models.items():
        result.results[name] = {}
        result.models[name] = edit(
            model,
            lambda graph, n=name: _extract(graph, n, setup, result.results[n]),  # type: ignore[misc]
        )
        del result.models[name].graph.value_info[:]
    if setup.graph.outputs:
        result.setup, result.sources = to_model(setup.graph), setup.sources
    return result


class _Setup:
    """The graph of the setup model, without duplicates of constants and nodes."""

    def __init__(self, tensor_ids: Mapping[tuple[str, str], Any]) -> None:
        self.graph = gs.Graph(opset=21, name="setup", ir_version=10)
        self.sources: dict[str, tuple[str, str]] = {}
        self._tensor_ids = tensor_ids
        self._copies: dict[Any, gs.Tensor] = {}

    def copy(self, component: str, tensor: gs.Tensor) -> gs.Tensor:
        """Return the setup's copy of a component's tensor, with all that computes it."""
        if tensor.is_empty():
            return tensor
        if isinstance(tensor, gs.Constant):
            return self._constant(component, tensor)
        node = tensor.inputs[0]
        inputs = [self.copy(component, t) for t in node.inputs]
        attributes = tuple((key, str(_plain(value))) for key, value in sorted(node.attrs.items()))
        index = next(i for i, t in enumerate(node.outputs) if t is tensor)
        key = node.op, node.domain, attributes, tuple(map(id, inputs)), index
        if key not in self._copies:
            name = unique_name(self.graph, f"/{node.op}")
            outputs = [
                gs.Variable(f"{name}_{i}", t.dtype, t.shape) for i, t in enumerate(node.outputs)
            ]
            attrs = dict(node.attrs)
            self.graph.nodes.append(gs.Node(node.op, name, attrs, inputs, outputs, node.domain))
            for i, output in enumerate(outputs):
                self._copies[(*key[:-1], i)] = output
        return self._copies[key]

    def _constant(self, component: str, tensor: gs.Constant) -> gs.Tensor:
        dtype, shape = elem_type(tensor), tuple(tensor.shape)
        if not is_external(tensor):
            key: Any = dtype, shape, constant_bytes(tensor)
            if key not in self._copies:
                self._copies[key] = copy_constant(tensor, f"constant_{len(self._copies)}")
            return self._copies[key]
        source = component, external_location(tensor)
        key = self._tensor_ids[source], dtype, shape
        if key not in self._copies:
            name = f"weight_{len(self._copies)}"
            self._copies[key] = external_constant(name, dtype, shape, name)
            self.sources[name] = source
        return self._copies[key]

    def output_index(self, tensor: gs.Tensor) -> int:
        """Return the index of a tensor among the graph's outputs, to which it is added."""
        for index, output in enumerate(self.graph.outputs):
            if output is tensor:
                return index
        self.graph.outputs.append(tensor)
        return len(self.graph.outputs) - 1


def _plain(value: Any) -> Any:
    return value.values.tolist() if isinstance(value, gs.Constant) else value


def _extract(graph: gs.Graph, component: str, setup: _Setup, results: dict[str, int]) -> None:
    """Replace what is computed from constants alone by outputs of the setup, noted in `results`."""
    graph.toposort()
    constant: set[int] = set()
    for node in graph.nodes:
        inputs = [t for t in node.inputs if not t.is_empty()]
        is_constant = all(isinstance(t, gs.Constant) or id(t) in constant for t in inputs)
        if is_constant and inputs and node.op not in _GROWING_OPS:
            constant.update(id(t) for t in node.outputs)
    graph_outputs = {id(t) for t in graph.outputs}
    for tensor in list(graph.tensors().values()):
        if id(tensor) not in constant:
            continue
        users = [n for n in tensor.outputs if not any(id(t) in constant for t in n.outputs)]
        if not users and id(tensor) not in graph_outputs:
            continue
        index = setup.output_index(setup.copy(component, tensor))
        new = external_constant(f"/setup_{index}", elem_type(tensor), tensor.shape, "setup")
        results[new.name] = index
        for user in users:
            user.inputs = [new if t is tensor else t for t in user.inputs]
        if id(tensor) in graph_outputs:
            replace_uses(graph, tensor, new)
