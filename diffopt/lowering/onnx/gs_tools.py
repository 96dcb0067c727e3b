"""Helpers for onnx-graphsurgeon graphs: external data, new nodes and constants, replacing uses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, numpy_helper
from onnx_graphsurgeon.exporters.onnx_exporter import dtype_to_onnx
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.logger import G_LOGGER

_INT4_TYPES = (TensorProto.INT4, TensorProto.UINT4)


def edit(model: onnx.ModelProto, *rewrites: Callable[[gs.Graph], None]) -> onnx.ModelProto:
    """Return the model after rewrites of its graph, with dead nodes removed after each."""
    with _quiet():
        graph = gs.import_onnx(model)
        for rewrite in rewrites:
            rewrite(graph)
            graph.cleanup(remove_unused_graph_inputs=False).toposort()
        return _export(graph)


def to_model(graph: gs.Graph) -> onnx.ModelProto:
    """Return a graph as a model, its nodes in topological order."""
    with _quiet():
        return _export(graph.toposort())


def _export(graph: gs.Graph) -> onnx.ModelProto:
    model: onnx.ModelProto = gs.export_onnx(graph)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings about types that numpy lacks."""
    severity, G_LOGGER.severity = G_LOGGER.severity, G_LOGGER.ERROR
    try:
        yield
    finally:
        G_LOGGER.severity = severity


def elem_type(tensor: gs.Tensor) -> int:
    """Return the element type of a tensor, as in `onnx.TensorProto`."""
    return int(dtype_to_onnx(tensor.dtype))


def producer(tensor: gs.Tensor, *ops: str) -> gs.Node | None:
    """Return the node that computes a tensor if its operator is one of `ops`, else None."""
    if isinstance(tensor, gs.Variable) and len(tensor.inputs) == 1 and tensor.inputs[0].op in ops:
        return tensor.inputs[0]
    return None


def find_nodes(graph: gs.Graph, *ops: str) -> Iterator[gs.Node]:
    """Yield the nodes with these operators; nodes that are added meanwhile are not visited."""
    yield from [node for node in graph.nodes if node.op in ops]


def replace_uses(graph: gs.Graph, old: gs.Tensor, new: gs.Tensor) -> None:
    """Replace a tensor by another in all its uses; graph outputs keep their names."""
    for user in list(old.outputs):
        user.inputs = [new if tensor is old else tensor for tensor in user.inputs]
    if not any(tensor is old for tensor in graph.outputs):
        return
    if isinstance(new, gs.Variable) and not any(t is new for t in (*graph.inputs, *graph.outputs)):
        new.name, old.name = old.name, unique_name(graph, "/before")
        graph.outputs = [new if tensor is old else tensor for tensor in graph.outputs]
        return
    (node,) = old.inputs
    node.op, node.domain, node.inputs, node.outputs = "Identity", None, [new], [old]
    node.attrs.clear()


def add_node(
    graph: gs.Graph,
    op: str,
    inputs: Iterable[gs.Tensor],
    dtype: Any,
    shape: Any,
    attrs: Mapping[str, Any] | None = None,
    domain: str | None = None,
) -> gs.Variable:
    """Add a node with one output of this type and shape, and return the output.

    `gs.Graph.layer` collects the names of the whole graph at every call, and leaves out types.
    """
    name = unique_name(graph, f"/{op}")
    output = gs.Variable(f"{name}_0", dtype, shape)
    graph.nodes.append(gs.Node(op, name, dict(attrs or {}), list(inputs), [output], domain))
    return output


def unique_name(graph: gs.Graph, prefix: str) -> str:
    """Return a name that no node or tensor of a graph has; a "/" in it keeps weights apart."""
    state = graph.__dict__  # `gs.Graph.__getattr__` looks up operators, so no plain attributes
    if "used_names" not in state:
        state["used_names"] = {node.name for node in graph.nodes} | set(graph.tensors())
        state["next_index"] = {}
    used, indices = state["used_names"], state["next_index"]
    while True:
        index = indices[prefix] = indices.get(prefix, -1) + 1
        if (name := f"{prefix}_{index}") not in used:
            used.add(name)
            return name


# Constants


def new_constant(graph: gs.Graph, values: np.ndarray[Any, Any]) -> gs.Constant:
    """Return a constant under a name that is new in a graph."""
    name, array = unique_name(graph, "/constant"), np.asarray(values, order="C")
    tensor = numpy_helper.from_array(array, name)
    # 4-bit values stay a proto: numpy has one byte for each.
    return gs.Constant(name, LazyValues(tensor) if tensor.data_type in _INT4_TYPES else array)


def constant_bytes(tensor: gs.Constant) -> bytes:
    """Return the values of a constant as bytes."""
    values = tensor._values
    if isinstance(values, np.ndarray):
        return values.tobytes()
    return bytes(numpy_helper.to_array(values.tensor).tobytes())


def copy_constant(tensor: gs.Constant, name: str) -> gs.Constant:
    """Return a copy of a constant under another name."""
    # Deep, as exporting writes the name into the proto of `LazyValues`.
    return gs.Constant(name, copy.deepcopy(tensor._values))


def is_external(tensor: gs.Tensor) -> bool:
    """Tell whether a tensor is a constant with external data."""
    return isinstance(tensor, gs.Constant) and tensor.data_location == TensorProto.EXTERNAL


def external_constant(name: str, dtype: int, shape: Iterable[int], location: str) -> gs.Constant:
    """Return a constant with external data at a location."""
    tensor = TensorProto(name=name, data_type=dtype, data_location=TensorProto.EXTERNAL)
    tensor.dims.extend(shape)
    tensor.external_data.add(key="location", value=location)
    return gs.Constant(name, LazyValues(tensor), TensorProto.EXTERNAL)


def external_location(tensor: gs.Constant) -> str:
    """Return the location of a constant's external data."""
    return _location(tensor._values.tensor)


def external_locations(
    model: onnx.ModelProto, exclude: Collection[str]
) -> dict[str, tuple[str, list[int]]]:
    """Return the location and shape of each initializer with external data, by its name."""
    return {
        tensor.name: (_location(tensor), list(tensor.dims))
        for tensor in model.graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL and tensor.name not in exclude
    }


def _location(tensor: TensorProto) -> str:
    return str({entry.key: entry.value for entry in tensor.external_data}["location"])


def with_weights_as_inputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a model whose initializers with external data are inputs instead."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    kept = []
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            kind = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            result.graph.input.append(kind)
        else:
            kept.append(tensor)
    del result.graph.initializer[:]
    result.graph.initializer.extend(kept)
    return result


def types(model: onnx.ModelProto) -> set[str]:
    """Return the names of the element types of a model's inputs, weights and casts."""
    graph = model.graph
    numbers = {value.type.tensor_type.elem_type for value in graph.input}
    numbers |= {tensor.data_type for tensor in graph.initializer if tensor.dims}
    casts = (node for node in graph.node if node.op_type == "Cast")
    numbers |= {attribute.i for node in casts for attribute in node.attribute}
    return {TensorProto.DataType.Name(number) for number in numbers}
