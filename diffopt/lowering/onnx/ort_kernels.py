"""Rewrites models to operators for which ONNX Runtime's CPU provider has fast kernels.

- bfloat16 and float16 become float32, since there are no kernels for them. Weights keep their type
  and are widened on loading.
- Layers whose weight and input are quantized become integer products, with unsigned inputs and
  signed weights (convolutions the other way round): other pairs of types have slow kernels only.
- Linear layers of which only the weight is quantized, to 4 bits, become MatMulNBits.
- GroupNormalization is decomposed into InstanceNormalization, which is twice as fast.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from diffopt.lowering.onnx.cleanup import drop_casts, fold_constants
from diffopt.lowering.onnx.gs_tools import (
    add_node,
    edit,
    elem_type,
    external_constant,
    find_nodes,
    is_external,
    new_constant,
    producer,
    replace_uses,
    unique_name,
)

_HALF_TYPES = (TensorProto.BFLOAT16, TensorProto.FLOAT16)
_INTEGER_TYPES = (TensorProto.INT8, TensorProto.UINT4)
_MS = "com.microsoft"
_UNSIGNED_OFFSET = 128  # int8 plus this is uint8

_FLOAT32, _INT8, _UINT8, _INT32, _INT64 = map(np.dtype, ("f4", "i1", "u1", "i4", "i8"))


@dataclass
class Adapted:
    """A model for ONNX Runtime.

    Attributes:
        model: The model.
        layers: The number of quantized layers by the type of their product: "int8", "int4", or
            "float" where there is no kernel.
        widened: Whether float16 or bfloat16 values are computed in float32.
    """

    model: onnx.ModelProto
    layers: dict[str, int]
    widened: bool


def adapt(model: onnx.ModelProto, *, integer_convolutions: bool = True) -> Adapted:
    """Return a model from `export` without weights, rewritten to the fastest kernels.

    Args:
        model: The model.
        integer_convolutions: Whether the CPU's kernels for convolutions on integers are exact.
    """
    layers: Counter[str] = Counter()
    halves: list[gs.Tensor] = []
    adapted = edit(
        onnx.shape_inference.infer_shapes(model),
        lambda graph: halves.extend(widen(graph)),
        drop_casts,
        lambda graph: layers.update(_lower_quantized_layers(graph, integer_convolutions)),
        decompose_group_norms,
        fold_constants,
    )
    return Adapted(adapted, dict(sorted(layers.items())), bool(halves))


# 16-bit floats


def _is_half(tensor: gs.Tensor) -> bool:
    return tensor.dtype is not None and elem_type(tensor) in _HALF_TYPES


def widen(graph: gs.Graph) -> list[gs.Tensor]:
    """Change 16-bit values to float32, and return these values.

    Inputs, outputs and external weights keep their type.
    """
    interface = {id(t) for t in (*graph.inputs, *graph.outputs)}
    tensors = [tensor for tensor in graph.tensors().values() if _is_half(tensor)]
    values = [tensor for tensor in tensors if isinstance(tensor, gs.Variable)]
    for tensor in tensors if values else ():
        if isinstance(tensor, gs.Constant) and not is_external(tensor):
            tensor.values = tensor.values.astype(np.float32)
        elif isinstance(tensor, gs.Constant) or id(tensor) in interface:
            _cast_at_interface(graph, tensor)
        else:
            tensor.dtype = _FLOAT32
    for node in graph.nodes:
        for key, value in node.attrs.items():
            if isinstance(value, gs.Constant) and _is_half(value):
                value.values = value.values.astype(np.float32)
            elif key in ("to", "dtype", "output_dtype") and value in _HALF_TYPES:
                is_output = any(id(t) in interface for t in node.outputs)
                node.attrs[key] = value if is_output else int(TensorProto.FLOAT)
    return values


def _cast_at_interface(graph: gs.Graph, tensor: gs.Tensor) -> None:
    """Cast an input or a weight for its users, and the value that becomes an output."""
    users, producers = list(tensor.outputs), list(tensor.inputs)
    if users:
        wide = add_node(graph, "Cast", [tensor], _FLOAT32, tensor.shape, {"to": 1})
        for user in users:
            user.inputs = [wide if t is tensor else t for t in user.inputs]
    for node in producers:
        wide = gs.Variable(unique_name(graph, "/wide"), _FLOAT32, tensor.shape)
        node.outputs = [wide if t is tensor else t for t in node.outputs]
        name, attrs = unique_name(graph, "/Cast"), {"to": elem_type(tensor)}
        graph.nodes.append(gs.Node("Cast", name, attrs, [wide], [tensor]))


# Quantized layers


@dataclass
class _Weight:
    """A quantized weight: one scale for each row, or for `block_size` values of a row."""

    values: gs.Tensor
    scales: gs.Tensor
    zeros: gs.Tensor | None
    block_size: int


@dataclass
class _Input:
    """A quantized input of a layer; `source` is the value before quantization."""

    source: gs.Tensor
    quantized: gs.Tensor
    scale: gs.Tensor
    zero: gs.Tensor | None  # None: a scale for each row


def _weight(tensor: gs.Tensor) -> _Weight | None:
    """Return the quantized weight that a layer reads, None if it is not quantized."""
    node = producer(tensor, "DequantizeLinear")
    if node is None or node.attrs.get("axis", 1) != (1 if node.attrs.get("block_size") else 0):
        return None
    zeros = node.inputs[2] if len(node.inputs) > 2 else None
    return _Weight(node.inputs[0], node.inputs[1], zeros, node.attrs.get("block_size", 0))


def _input(tensor: gs.Tensor) -> _Input | None:
    """Return the quantized input that a layer reads, None if it is not quantized."""
    node = producer(tensor, "DequantizeLinear")
    if node is not None:
        q = producer(node.inputs[0], "QuantizeLinear")
        if q is None or len(node.inputs) < 3 or elem_type(node.inputs[0]) != TensorProto.INT8:
            return None
        if [id(t) for t in q.inputs[1:]] != [id(t) for t in node.inputs[1:]]:
            return None
        return _Input(q.inputs[0], node.inputs[0], q.inputs[1], q.inputs[2])
    product = producer(tensor, "Mul")
    wide = product and producer(product.inputs[0], "Cast")
    if not product or not wide or elem_type(wide.inputs[0]) != TensorProto.INT8:
        return None
    narrow = producer(wide.inputs[0], "Cast")
    clip = narrow and producer(narrow.inputs[0], "Clip")
    if not clip or producer(clip.inputs[0], "Round") is None:
        return None
    return _Input(clip.inputs[0], wide.inputs[0], product.inputs[1], None)


def _lower_quantized_layers(graph: gs.Graph, integer_convolutions: bool) -> Counter[str]:
    """Replace quantized layers by kernels, and count them by the type of their product."""
    counts: Counter[str] = Counter()
    inputs = _UnsignedInputs(graph)
    for node in list(find_nodes(graph, "MatMul", "Gemm", "Conv")):
        source = node.inputs[1]
        if node.op == "MatMul":
            transpose = producer(source, "Transpose")
            if transpose is None:
                continue
            source = transpose.inputs[0]
        view = producer(source, "Reshape")
        is_grouped = view is not None and producer(view.inputs[0], "DequantizeLinear")
        weight = _weight(view.inputs[0] if view is not None and is_grouped else source)
        if weight is None:
            continue
        x = _input(node.inputs[0])
        result, kind = None, "float"
        is_integer = not weight.block_size and elem_type(weight.values) in _INTEGER_TYPES
        if x is not None and is_integer and (node.op != "Conv" or integer_convolutions):
            result, kind = _integer_product(graph, node, weight, x, inputs), "int8"
        elif x is None and elem_type(weight.values) == TensorProto.UINT4:
            result, kind = _int4_product(graph, node, weight), "int4"
        counts[kind if result is not None else "float"] += 1
        if result is not None:
            replace_uses(graph, node.outputs[0], result)
    return counts


class _UnsignedInputs:
    """The quantized inputs of a graph's layers as uint8, each computed once."""

    def __init__(self, graph: gs.Graph) -> None:
        self._graph = graph
        self._known: dict[tuple[int, ...], tuple[gs.Tensor, gs.Tensor, gs.Tensor]] = {}

    def get(self, x: _Input) -> tuple[gs.Tensor, gs.Tensor, gs.Tensor]:
        """Return values, scale and zero point."""
        key = id(x.source), id(x.scale), id(x.zero)
        if key not in self._known:
            self._known[key] = self._per_row(x) if x.zero is None else self._per_tensor(x)
        return self._known[key]

    def _per_tensor(self, x: _Input) -> tuple[gs.Tensor, gs.Tensor, gs.Tensor]:
        graph, shape = self._graph, x.source.shape
        if _is_dynamic(x):
            name = unique_name(graph, "/DynamicQuantizeLinear")
            q = gs.Variable(f"{name}_0", _UINT8, shape)
            scale = gs.Variable(f"{name}_1", _FLOAT32, [])
            zero = gs.Variable(f"{name}_2", _UINT8, [])
            outputs = [q, scale, zero]
            graph.nodes.append(gs.Node("DynamicQuantizeLinear", name, {}, [x.source], outputs))
            return q, scale, zero
        zero = _to_unsigned(graph, x.zero)
        q = add_node(graph, "QuantizeLinear", [x.source, x.scale, zero], _UINT8, shape)
        return q, x.scale, zero

    def _per_row(self, x: _Input) -> tuple[gs.Tensor, gs.Tensor, gs.Tensor]:
        graph, shape = self._graph, x.quantized.shape
        offset = new_constant(graph, np.array(_UNSIGNED_OFFSET, np.float32))
        shifted = add_node(graph, "Add", [x.source, offset], _FLOAT32, shape)
        q = add_node(graph, "Cast", [shifted], _UINT8, shape, {"to": TensorProto.UINT8})
        one = new_constant(graph, np.array(1.0, np.float32))
        return q, one, new_constant(graph, np.array(_UNSIGNED_OFFSET, np.uint8))


def _is_dynamic(x: _Input) -> bool:
    """Tell whether the scale is computed from the minimum and maximum of the value alone."""
    seen, stack, ops = set(), [x.scale], set()
    while stack:
        tensor = stack.pop()
        if tensor is x.source or isinstance(tensor, gs.Constant) or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if not tensor.inputs:
            return False
        ops.add(tensor.inputs[0].op)
        stack += tensor.inputs[0].inputs
    plain = {"Max", "Min", "Sub", "Div", "Cast", "Reshape", "ReduceMax", "ReduceMin"}
    return {"ReduceMax", "ReduceMin"} <= ops <= plain


def _to_unsigned(graph: gs.Graph, values: gs.Tensor | None) -> gs.Variable:
    """Return int8 values plus 128, as uint8."""
    assert values is not None
    wide = add_node(graph, "Cast", [values], _INT32, values.shape, {"to": TensorProto.INT32})
    offset = new_constant(graph, np.array(_UNSIGNED_OFFSET, np.int32))
    shifted = add_node(graph, "Add", [wide, offset], _INT32, values.shape)
    return add_node(graph, "Cast", [shifted], _UINT8, values.shape, {"to": TensorProto.UINT8})


def _integer_product(
    graph: gs.Graph, node: gs.Node, weight: _Weight, x: _Input, inputs: _UnsignedInputs
) -> gs.Tensor | None:
    """Return the layer as an integer product; None where there is no kernel."""
    if node.op == "Conv":
        return None if x.zero is None else _integer_convolution(graph, node, weight, x)
    if node.op == "Gemm" and not _is_linear(node):
        return None
    stored, shape = _int8_values(graph, weight), node.outputs[0].shape
    columns = list(reversed(stored.shape))
    values = add_node(graph, "Transpose", [stored], _INT8, columns, {"perm": [1, 0]})
    q, scale, zero = inputs.get(x)
    bias, no_zeros = list(node.inputs[2:]), gs.Variable.empty()
    operands = [q, values, scale, weight.scales, zero, no_zeros]
    if x.zero is not None:
        return add_node(
            graph, "MatMulIntegerToFloat", [*operands, *bias], _FLOAT32, shape, domain=_MS
        )
    result = add_node(graph, "MatMulIntegerToFloat", operands, _FLOAT32, shape, domain=_MS)
    result = add_node(graph, "Mul", [result, x.scale], _FLOAT32, shape)
    return add_node(graph, "Add", [result, *bias], _FLOAT32, shape) if bias else result


def _int8_values(graph: gs.Graph, weight: _Weight) -> gs.Tensor:
    """Return the values of a weight as int8."""
    values = weight.values
    if elem_type(values) == TensorProto.INT8:
        return values
    ones = new_constant(graph, np.ones(weight.scales.shape, np.float32))
    operands = [values, ones, weight.zeros]
    wide = add_node(graph, "DequantizeLinear", operands, _FLOAT32, values.shape, {"axis": 0})
    return add_node(graph, "Cast", [wide], _INT8, values.shape, {"to": TensorProto.INT8})


def _is_linear(node: gs.Node) -> bool:
    factors = node.attrs.get("alpha", 1.0), node.attrs.get("beta", 1.0)
    return factors == (1.0, 1.0) and node.attrs.get("transB") and not node.attrs.get("transA")


def _integer_convolution(graph: gs.Graph, node: gs.Node, weight: _Weight, x: _Input) -> gs.Tensor:
    shape = node.outputs[0].shape
    values = _to_unsigned(graph, _int8_values(graph, weight))
    weight_zero = new_constant(graph, np.array(_UNSIGNED_OFFSET, np.uint8))
    operands = [x.quantized, values, x.zero, weight_zero]
    sums = add_node(graph, "ConvInteger", operands, _INT32, shape, node.attrs)
    result = add_node(graph, "Cast", [sums], _FLOAT32, shape, {"to": TensorProto.FLOAT})
    scales = add_node(graph, "Mul", [weight.scales, x.scale], _FLOAT32, weight.scales.shape)
    scales, *bias = _per_channel(graph, [scales, *node.inputs[2:]], shape)
    result = add_node(graph, "Mul", [result, scales], _FLOAT32, shape)
    return add_node(graph, "Add", [result, *bias], _FLOAT32, shape) if bias else result


def _per_channel(graph: gs.Graph, tensors: list[gs.Tensor], shape: list[Any]) -> list[gs.Tensor]:
    """Reshape vectors so that they broadcast along axis 1 of a shape."""
    ones = [1] * (len(shape) - 2)
    target = new_constant(graph, np.array([-1, *ones], np.int64))
    return [add_node(graph, "Reshape", [t, target], _FLOAT32, [shape[1], *ones]) for t in tensors]


def _int4_product(graph: gs.Graph, node: gs.Node, weight: _Weight) -> gs.Tensor | None:
    """Return a linear layer as MatMulNBits; None where there is no kernel."""
    block, stored = weight.block_size, weight.values
    if node.op == "Conv" or block < 16 or block & (block - 1) or len(stored.shape) != 2:
        return None
    if not is_external(stored) or (node.op == "Gemm" and not _is_linear(node)):
        return None
    rows, columns = stored.shape
    packed_shape = [rows, columns // block, block // 2]
    name = unique_name(graph, "/bytes")
    values = external_constant(name, TensorProto.UINT8, packed_shape, stored.name)
    flat = new_constant(graph, np.array([-1], np.int64))
    blocks = [rows * columns // block]
    scales = add_node(graph, "Reshape", [weight.scales, flat], _FLOAT32, blocks)
    attrs = {"K": columns, "N": rows, "bits": 4, "block_size": block}
    operands, shape = [node.inputs[0], values, scales], node.outputs[0].shape
    result = add_node(graph, "MatMulNBits", operands, _FLOAT32, shape, attrs, _MS)
    bias = list(node.inputs[2:])
    return add_node(graph, "Add", [result, *bias], _FLOAT32, shape) if bias else result


# Norms


def decompose_group_norms(graph: gs.Graph) -> None:
    """Decompose GroupNormalization into InstanceNormalization, a product and a sum."""
    for node in find_nodes(graph, "GroupNormalization"):
        x, scale, bias = node.inputs
        shape, groups = node.outputs[0].shape, node.attrs["num_groups"]
        grouped = new_constant(graph, np.array([0, groups, -1], np.int64))
        rows = add_node(graph, "Reshape", [x, grouped], _FLOAT32, [shape[0], groups, None])
        ones, zeros = (new_constant(graph, np.full(groups, v, np.float32)) for v in (1, 0))
        attrs = {"epsilon": node.attrs.get("epsilon", 1e-5)}
        operands = [rows, ones, zeros]
        rows = add_node(graph, "InstanceNormalization", operands, _FLOAT32, rows.shape, attrs)
        normalized = add_node(graph, "Reshape", [rows, _shape(graph, x)], _FLOAT32, shape)
        factor, term = _per_channel(graph, [scale, bias], shape)
        product = add_node(graph, "Mul", [normalized, factor], _FLOAT32, shape)
        result = add_node(graph, "Add", [product, term], _FLOAT32, shape)
        replace_uses(graph, node.outputs[0], result)


def _shape(graph: gs.Graph, x: gs.Tensor) -> gs.Tensor:
    if all(isinstance(size, int) for size in x.shape):
        return new_constant(graph, np.array(x.shape, np.int64))
    return add_node(graph, "Shape", [x], _INT64, [len(x.shape)])
