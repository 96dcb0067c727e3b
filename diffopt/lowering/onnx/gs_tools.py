"""Passes over ONNX models, with onnx-graphsurgeon.

What torch's exporter and its optimizer leave, in the form that compilers take: no casts that change
nothing, no arithmetic on constants, quantized weights as a constant with nothing between it and
its DequantizeLinear, sizes that may change called n0, n1, ….
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx_graphsurgeon.exporters.onnx_exporter import dtype_to_onnx
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.logger import G_LOGGER
from torch import Tensor

_SMALL = 1 << 16  # bytes of what may be computed ahead of time
BITS4 = (TensorProto.INT4, TensorProto.UINT4)

# A cast to the second type loses nothing of the first.
_WIDENS = {
    (TensorProto.BFLOAT16, TensorProto.FLOAT),
    (TensorProto.FLOAT16, TensorProto.FLOAT),
    (TensorProto.FLOAT, TensorProto.DOUBLE),
    (TensorProto.INT8, TensorProto.INT32),
    (TensorProto.INT32, TensorProto.INT64),
}


def edit(model: onnx.ModelProto, *passes: Callable[[gs.Graph], None]) -> onnx.ModelProto:
    """Return a model on which passes have run, without what nothing reads."""
    with _quiet():
        graph = gs.import_onnx(model)
        for each in passes:
            each(graph)
            graph.cleanup(remove_unused_graph_inputs=False).toposort()
        return _proto(graph)


def finish(graph: gs.Graph) -> onnx.ModelProto:
    """Return a graph that was made node by node as a model."""
    with _quiet():
        return _proto(graph.toposort())


def _proto(graph: gs.Graph) -> onnx.ModelProto:
    made: onnx.ModelProto = gs.export_onnx(graph)
    return made


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep from the terminal that numpy lacks types."""
    before, G_LOGGER.severity = G_LOGGER.severity, G_LOGGER.ERROR
    try:
        yield
    finally:
        G_LOGGER.severity = before


def tidy(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model in the form that compilers take."""
    return edit(
        model, fold, drop_casts, join_transposes, choose_in_logic, place_weights, name_sizes
    )


# Looking


def number(tensor: gs.Tensor) -> int:
    """Return ONNX's number of a tensor's type."""
    return int(dtype_to_onnx(tensor.dtype))


def producer(tensor: gs.Tensor, *ops: str) -> gs.Node | None:
    """Return the node that makes a tensor, if it is of one of these kinds."""
    if isinstance(tensor, gs.Variable) and len(tensor.inputs) == 1 and tensor.inputs[0].op in ops:
        return tensor.inputs[0]
    return None


def is_outside(tensor: gs.Tensor) -> bool:
    """Tell whether a tensor is a constant whose values the model does not hold."""
    return isinstance(tensor, gs.Constant) and tensor.data_location == TensorProto.EXTERNAL


def outside(name: str, dtype: int, shape: Iterable[int], source: str) -> gs.Constant:
    """Return a constant whose values are elsewhere, by the name `source`."""
    tensor = TensorProto(name=name, data_type=dtype, data_location=TensorProto.EXTERNAL)
    tensor.dims.extend(shape)
    tensor.external_data.add(key="location", value=source)
    return gs.Constant(name, LazyValues(tensor), TensorProto.EXTERNAL)


def source(tensor: gs.Constant) -> str:
    """Return by what name the values of a constant are elsewhere."""
    pairs = {entry.key: entry.value for entry in tensor._values.tensor.external_data}
    return str(pairs["location"])


def outside_names(model: onnx.ModelProto, but: Collection[str]) -> dict[str, tuple[str, list[int]]]:
    """Return the constants whose values are elsewhere: by what name, and their shape."""
    return {
        tensor.name: (source(gs.Constant(tensor.name, LazyValues(tensor))), list(tensor.dims))
        for tensor in model.graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL and tensor.name not in but
    }


def nodes(graph: gs.Graph, *ops: str) -> Iterator[gs.Node]:
    """Yield the nodes of these kinds, as they are now."""
    yield from [node for node in graph.nodes if node.op in ops]


def replace(graph: gs.Graph, old: gs.Tensor, new: gs.Tensor) -> None:
    """Let a tensor stand for another everywhere; the name of an output stays."""
    for user in list(old.outputs):
        user.inputs = [new if tensor is old else tensor for tensor in user.inputs]
    if not any(tensor is old for tensor in graph.outputs):
        return
    if isinstance(new, gs.Variable) and not any(t is new for t in (*graph.inputs, *graph.outputs)):
        new.name, old.name = old.name, fresh(graph, "/before")
        graph.outputs = [new if tensor is old else tensor for tensor in graph.outputs]
        return
    (node,) = old.inputs
    node.op, node.domain, node.inputs, node.outputs = "Identity", None, [new], [old]
    node.attrs.clear()


def add(
    graph: gs.Graph,
    op: str,
    inputs: Iterable[gs.Tensor],
    dtype: Any,
    shape: Any,
    attrs: Mapping[str, Any] | None = None,
    domain: str | None = None,
) -> gs.Variable:
    """Add a node with one result, and return that."""
    name = fresh(graph, f"/{op}")
    result = gs.Variable(f"{name}_0", dtype, shape)
    graph.nodes.append(gs.Node(op, name, dict(attrs or {}), list(inputs), [result], domain))
    return result


def fresh(graph: gs.Graph, base: str) -> str:
    """Return a name that nothing in a graph has yet, and that no weight can have."""
    state = graph.__dict__  # a graph takes attributes that it lacks for operators
    if "taken" not in state:
        state["taken"] = {node.name for node in graph.nodes} | set(graph.tensors())
        state["numbers"] = {}
    taken, numbers = state["taken"], state["numbers"]
    while True:
        index = numbers[base] = numbers.get(base, -1) + 1
        if (name := f"{base}_{index}") not in taken:
            taken.add(name)
            return name


def constant(graph: gs.Graph, values: np.ndarray[Any, Any]) -> gs.Constant:
    """Return a new constant of a graph."""
    name, array = fresh(graph, "/constant"), np.asarray(values, order="C")
    tensor = numpy_helper.from_array(array, name)
    # As a proto, since numpy takes a byte for each number of 4 bits.
    return gs.Constant(name, LazyValues(tensor) if tensor.data_type in BITS4 else array)


def content(tensor: gs.Constant) -> bytes:
    """Return the values of a constant as bytes."""
    values = tensor._values
    if isinstance(values, np.ndarray):
        return values.tobytes()
    return bytes(numpy_helper.to_array(values.tensor).tobytes())


def renamed(tensor: gs.Constant, name: str) -> gs.Constant:
    """Return a copy of a constant under another name."""
    values = tensor._values
    if isinstance(values, LazyValues):
        proto = TensorProto()
        proto.CopyFrom(values.tensor)
        values = LazyValues(proto)
    return gs.Constant(name, values)


# Passes


def fold(graph: gs.Graph) -> None:
    """Compute what depends on small constants alone; weights stay as they are."""
    graph.toposort()
    for node in list(graph.nodes):
        if node.op in ("DequantizeLinear", "Transpose"):
            continue
        inputs = [t for t in node.inputs if not t.is_empty()]
        is_known = all(isinstance(t, gs.Constant) and not is_outside(t) for t in inputs)
        if not is_known or len(node.outputs) != 1 or node.domain or not _is_small(node):
            continue
        given = {t.name: t.values for t in inputs}
        (value, *_) = ReferenceEvaluator(_alone(node, graph)).run(None, given)
        folded = gs.Constant(fresh(graph, "/folded"), np.asarray(value))
        replace(graph, node.outputs[0], folded)


def _is_small(node: gs.Node) -> bool:
    sizes = [t.values.nbytes for t in node.inputs if not t.is_empty()]
    shape = node.outputs[0].shape
    known = shape is not None and all(isinstance(size, int) for size in shape)
    return known and sum(sizes) <= _SMALL and int(np.prod(shape)) * 8 <= _SMALL


def _alone(node: gs.Node, graph: gs.Graph) -> onnx.ModelProto:
    inputs = [gs.Variable(t.name, t.dtype, t.shape) for t in node.inputs if not t.is_empty()]
    names = {t.name: t for t in inputs}
    given = [names.get(t.name, gs.Variable.empty()) for t in node.inputs]
    out = gs.Variable("out", node.outputs[0].dtype)
    single = gs.Node(node.op, "node", dict(node.attrs), given, [out], node.domain)
    alone = gs.Graph([single], inputs, [out], opset=graph.opset)
    made: onnx.ModelProto = gs.export_onnx(alone, do_type_check=False)
    return made


def drop_casts(graph: gs.Graph) -> None:
    """Drop casts that change nothing, and the first of two if it loses nothing."""
    for node in nodes(graph, "Cast"):
        (x,), (y,) = node.inputs, node.outputs
        before = producer(x, "Cast")
        if before is not None and x.dtype is not None:
            (source,) = before.inputs
            if source.dtype is not None and (number(source), number(x)) in _WIDENS:
                x = source
                node.inputs = [x]
        if x.dtype is not None and number(x) == node.attrs["to"]:
            replace(graph, y, x)


def join_transposes(graph: gs.Graph) -> None:
    """Turn a value around once where it is turned around twice."""
    for node in nodes(graph, "Transpose"):
        before = producer(node.inputs[0], "Transpose")
        if before is not None:
            first = before.attrs["perm"]
            node.attrs["perm"] = [first[axis] for axis in node.attrs["perm"]]
            node.inputs = list(before.inputs)
        if node.attrs["perm"] == sorted(node.attrs["perm"]):
            replace(graph, node.outputs[0], node.inputs[0])


def choose_in_logic(graph: gs.Graph) -> None:
    """Choose between booleans with And and Or: few compilers have Where for them."""
    flag = np.dtype(bool)
    for node in nodes(graph, "Where"):
        condition, x, y = node.inputs
        result = node.outputs[0]
        if any(t.dtype is None or number(t) != TensorProto.BOOL for t in (x, y)):
            continue
        other = add(graph, "Not", [condition], flag, condition.shape)
        pairs = ((condition, x), (other, y))
        both = [add(graph, "And", pair, flag, result.shape) for pair in pairs]
        replace(graph, result, add(graph, "Or", both, flag, result.shape))


def place_weights(graph: gs.Graph) -> None:
    """Turn quantized weights around before they are dequantized, not after it."""
    for node in nodes(graph, "Transpose"):
        source = producer(node.inputs[0], "DequantizeLinear")
        if source is None or not isinstance(source.inputs[0], gs.Constant):
            continue
        if any(is_outside(t) or not isinstance(t, gs.Constant) for t in source.inputs):
            continue
        perm = list(node.attrs["perm"])
        turned = [_turned(graph, tensor, perm) for tensor in source.inputs]
        axis = perm.index(source.attrs.get("axis", 1) % len(perm))
        attrs = {**source.attrs, "axis": axis}
        y = node.outputs[0]
        replace(graph, y, add(graph, "DequantizeLinear", turned, y.dtype, y.shape, attrs))


def _turned(graph: gs.Graph, tensor: gs.Constant, perm: list[int]) -> gs.Constant:
    if len(tensor.shape) != len(perm):
        return tensor
    values = tensor._values
    array = values if isinstance(values, np.ndarray) else numpy_helper.to_array(values.tensor)
    return constant(graph, array.transpose(perm))


def name_sizes(graph: gs.Graph) -> None:
    """Call the sizes that may change n0, n1, … in the order in which they come up."""
    names: dict[str, str] = {}
    tensors = (*graph.inputs, *graph.outputs, *graph.tensors().values())
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        if isinstance(tensor, gs.Variable) and tensor.shape is not None:
            tensor.shape = [
                size if isinstance(size, int) else names.setdefault(str(size), f"n{len(names)}")
                for size in tensor.shape
            ]


def pack_int4(
    model: onnx.ModelProto, packed: Mapping[str, Tensor], *, signed: bool
) -> onnx.ModelProto:
    """Give int8 initializers that stand for 4-bit numbers their bytes.

    Args:
        model: Changed in place.
        packed: The bytes by name, as `qdq.pack_int4` made them: from 0 to 15, for -8 to 7.
        signed: Store INT4. Otherwise UINT4 whose values are elsewhere, and 8 as the zero point of
            what reads them.
    """
    small = {t.name: t for t in model.graph.initializer if t.name in packed}
    for name, tensor in small.items():
        data = packed[name].numpy()
        dims = list(tensor.dims)
        tensor.Clear()
        tensor.name, tensor.data_type = name, TensorProto.INT4 if signed else TensorProto.UINT4
        tensor.dims.extend(dims)
        if signed:
            tensor.raw_data = (data ^ 0x88).tobytes()  # two's complement of n - 8 is n with 8 added
            continue
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=name)
    if small and not signed:
        return edit(model, _with_zeros)
    return model


def _with_zeros(graph: gs.Graph) -> None:
    """Give what dequantizes unsigned 4-bit numbers its zero point."""
    import ml_dtypes

    for node in nodes(graph, "DequantizeLinear"):
        if number(node.inputs[0]) == TensorProto.UINT4:
            zeros = np.full(node.inputs[1].shape, 8, dtype=ml_dtypes.uint4)
            node.inputs = [*node.inputs[:2], constant(graph, zeros)]
