"""Rewrites of exported ONNX models into the form that compilers match.

They remove what torch's exporter and its optimizer leave: casts that change nothing, arithmetic on
constants, Transpose nodes between a quantized weight and its DequantizeLinear. Dynamic sizes are
called n0, n1, ….
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from diffopt.lowering.onnx.gs_tools import (
    add_node,
    edit,
    elem_type,
    find_nodes,
    is_external,
    new_constant,
    producer,
    replace_uses,
    unique_name,
)

_MAX_FOLDED_BYTES = 1 << 16

# (from, to): casts that round nothing.
_WIDENING_CASTS = {
    (TensorProto.BFLOAT16, TensorProto.FLOAT),
    (TensorProto.FLOAT16, TensorProto.FLOAT),
    (TensorProto.FLOAT, TensorProto.DOUBLE),
    (TensorProto.INT8, TensorProto.INT32),
    (TensorProto.INT32, TensorProto.INT64),
}


def clean_up(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model after all rewrites of this module."""
    return edit(
        model,
        fold_constants,
        drop_casts,
        merge_transposes,
        lower_boolean_where,
        transpose_quantized_weights,
        name_dynamic_sizes,
    )


def fold_constants(graph: gs.Graph) -> None:
    """Evaluate nodes whose inputs are all small constants; weights are left alone.

    `gs.Graph.fold_constants` needs ONNX Runtime, and would read external data.
    """
    graph.toposort()
    for node in list(graph.nodes):
        if node.op in ("DequantizeLinear", "Transpose"):
            continue
        inputs = [t for t in node.inputs if not t.is_empty()]
        is_known = all(isinstance(t, gs.Constant) and not is_external(t) for t in inputs)
        if not is_known or len(node.outputs) != 1 or node.domain or not _is_small(node):
            continue
        feeds = {t.name: t.values for t in inputs}
        (value, *_) = ReferenceEvaluator(_single_node_model(node, graph)).run(None, feeds)
        folded = gs.Constant(unique_name(graph, "/folded"), np.asarray(value))
        replace_uses(graph, node.outputs[0], folded)


def _is_small(node: gs.Node) -> bool:
    sizes = [t.values.nbytes for t in node.inputs if not t.is_empty()]
    shape = node.outputs[0].shape
    is_static = shape is not None and all(isinstance(size, int) for size in shape)
    limit = _MAX_FOLDED_BYTES
    return is_static and sum(sizes) <= limit and int(np.prod(shape)) * 8 <= limit


def _single_node_model(node: gs.Node, graph: gs.Graph) -> onnx.ModelProto:
    """Return a model of one node, whose inputs are the graph's."""
    variables = {
        t.name: gs.Variable(t.name, t.dtype, t.shape) for t in node.inputs if not t.is_empty()
    }
    inputs = [variables.get(t.name, gs.Variable.empty()) for t in node.inputs]
    output = gs.Variable("out", node.outputs[0].dtype)
    copied = gs.Node(node.op, "node", dict(node.attrs), inputs, [output], node.domain)
    single = gs.Graph([copied], [*variables.values()], [output], opset=graph.opset)
    model: onnx.ModelProto = gs.export_onnx(single, do_type_check=False)
    return model


def drop_casts(graph: gs.Graph) -> None:
    """Remove casts to the type a value has, and the first of two casts if it only widens."""
    for node in find_nodes(graph, "Cast"):
        (x,), (y,) = node.inputs, node.outputs
        first = producer(x, "Cast")
        if first is not None and x.dtype is not None:
            (source,) = first.inputs
            if source.dtype is not None and (elem_type(source), elem_type(x)) in _WIDENING_CASTS:
                x = source
                node.inputs = [x]
        if x.dtype is not None and elem_type(x) == node.attrs["to"]:
            replace_uses(graph, y, x)


def merge_transposes(graph: gs.Graph) -> None:
    """Merge a Transpose of a Transpose into one; remove those that permute nothing."""
    for node in find_nodes(graph, "Transpose"):
        first = producer(node.inputs[0], "Transpose")
        if first is not None:
            perm = first.attrs["perm"]
            node.attrs["perm"] = [perm[axis] for axis in node.attrs["perm"]]
            node.inputs = list(first.inputs)
        if node.attrs["perm"] == sorted(node.attrs["perm"]):
            replace_uses(graph, node.outputs[0], node.inputs[0])


def lower_boolean_where(graph: gs.Graph) -> None:
    """Rewrite Where of booleans as (c and x) or (not c and y): few compilers have it for bool."""
    boolean = np.dtype(bool)
    for node in find_nodes(graph, "Where"):
        condition, x, y = node.inputs
        result = node.outputs[0]
        if any(t.dtype is None or elem_type(t) != TensorProto.BOOL for t in (x, y)):
            continue
        inverse = add_node(graph, "Not", [condition], boolean, condition.shape)
        pairs = ((condition, x), (inverse, y))
        both = [add_node(graph, "And", pair, boolean, result.shape) for pair in pairs]
        replace_uses(graph, result, add_node(graph, "Or", both, boolean, result.shape))


def transpose_quantized_weights(graph: gs.Graph) -> None:
    """Transpose quantized weights themselves instead of their dequantized values."""
    for node in find_nodes(graph, "Transpose"):
        dequantize = producer(node.inputs[0], "DequantizeLinear")
        if dequantize is None or not isinstance(dequantize.inputs[0], gs.Constant):
            continue
        if any(is_external(t) or not isinstance(t, gs.Constant) for t in dequantize.inputs):
            continue
        perm = list(node.attrs["perm"])
        transposed = [_transposed(graph, tensor, perm) for tensor in dequantize.inputs]
        axis = perm.index(dequantize.attrs.get("axis", 1) % len(perm))
        attrs = {**dequantize.attrs, "axis": axis}
        y = node.outputs[0]
        replacement = add_node(graph, "DequantizeLinear", transposed, y.dtype, y.shape, attrs)
        replace_uses(graph, y, replacement)


def _transposed(graph: gs.Graph, tensor: gs.Constant, perm: list[int]) -> gs.Constant:
    """Return a constant with its axes permuted; one of another rank, such as scales, as it is."""
    if len(tensor.shape) != len(perm):
        return tensor
    values = tensor._values
    array = values if isinstance(values, np.ndarray) else numpy_helper.to_array(values.tensor)
    return new_constant(graph, array.transpose(perm))


def name_dynamic_sizes(graph: gs.Graph) -> None:
    """Call dynamic sizes n0, n1, … in the order in which they appear."""
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
    """Replace int8 initializers that hold 4-bit values by 4-bit ones.

    Args:
        model: The model, changed in place.
        packed: Bytes by name, as `qdq.pack_int4` returns them: 0 to 15 for -8 to 7.
        signed: Store INT4. Otherwise UINT4 with external data, and a zero point of 8 for each
            DequantizeLinear that reads them.
    """
    initializers = {t.name: t for t in model.graph.initializer if t.name in packed}
    for name, tensor in initializers.items():
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
    if initializers and not signed:
        return edit(model, _add_zero_points)
    return model


def _add_zero_points(graph: gs.Graph) -> None:
    """Set the zero point 8 in each DequantizeLinear of UINT4 values."""
    import ml_dtypes

    for node in find_nodes(graph, "DequantizeLinear"):
        if elem_type(node.inputs[0]) == TensorProto.UINT4:
            zeros = np.full(node.inputs[1].shape, 8, dtype=ml_dtypes.uint4)
            node.inputs = [*node.inputs[:2], new_constant(graph, zeros)]
