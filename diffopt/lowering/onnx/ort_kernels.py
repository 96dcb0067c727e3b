"""Puts models in the form that ONNX Runtime's CPU provider has fast kernels for.

- bfloat16 and float16 become float32, since there are no kernels for them. Weights stay as they are
  and are widened on loading.
- Layers whose weight and input are quantized run on integers, with unsigned inputs and signed
  weights (convolutions the other way round): other pairs of types have slow kernels only.
- Linear layers whose weights alone are quantized, in 4 bits, take the stored bytes.
- GroupNormalization is written out around InstanceNormalization, which is twice as fast.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from diffopt.lowering.onnx import gs_tools
from diffopt.lowering.onnx.gs_tools import add, constant, number, producer, replace

_HALVES = (TensorProto.BFLOAT16, TensorProto.FLOAT16)
_WHOLE = (TensorProto.INT8, TensorProto.UINT4)
_MS = "com.microsoft"
_UNSIGNED = 128  # what is added to signed numbers where a kernel takes unsigned ones


@dataclass
class Adapted:
    """A model for ONNX Runtime.

    Attributes:
        model: The model.
        layers: How many quantized layers run on what: "int8", "int4" or "float".
        widened: Whether values of 16 bits are computed in float32.
    """

    model: onnx.ModelProto
    layers: dict[str, int]
    widened: bool


def adapt(model: onnx.ModelProto) -> Adapted:
    """Return a model, made by `export` without weights, with the fastest kernels."""
    layers: Counter[str] = Counter()
    halves: list[gs.Tensor] = []
    made = gs_tools.edit(
        onnx.shape_inference.infer_shapes(model),
        lambda graph: halves.extend(widen(graph)),
        gs_tools.drop_casts,
        lambda graph: _layers(graph, layers),
        write_out_group_norms,
        gs_tools.fold,
    )
    return Adapted(made, dict(sorted(layers.items())), bool(halves))


# 16 bits


def _is_half(tensor: gs.Tensor) -> bool:
    return tensor.dtype is not None and number(tensor) in _HALVES


def widen(graph: gs.Graph) -> list[gs.Tensor]:
    """Compute in float32 what the model computes in 16 bits, and return the values of that.

    Arguments, results and stored weights keep their type.
    """
    ends = {id(t) for t in (*graph.inputs, *graph.outputs)}
    tensors = [tensor for tensor in graph.tensors().values() if _is_half(tensor)]
    values = [tensor for tensor in tensors if isinstance(tensor, gs.Variable)]
    for tensor in tensors if values else ():
        if isinstance(tensor, gs.Constant) and not gs_tools.is_outside(tensor):
            tensor.values = tensor.values.astype(np.float32)
        elif isinstance(tensor, gs.Constant) or id(tensor) in ends:
            _cross(graph, tensor)
        else:
            tensor.dtype = np.dtype(np.float32)
    for node in graph.nodes:
        for key, value in node.attrs.items():
            if isinstance(value, gs.Constant) and _is_half(value):
                value.values = value.values.astype(np.float32)
            elif key in ("to", "dtype", "output_dtype") and value in _HALVES:
                is_end = any(id(t) in ends for t in node.outputs)
                node.attrs[key] = value if is_end else int(TensorProto.FLOAT)
    return values


def _cross(graph: gs.Graph, tensor: gs.Tensor) -> None:
    """Cast an argument or a weight behind it, a result in front of it."""
    users, makers = list(tensor.outputs), list(tensor.inputs)
    if users:
        wide = add(graph, "Cast", [tensor], np.dtype(np.float32), tensor.shape, {"to": 1})
        for user in users:
            user.inputs = [wide if t is tensor else t for t in user.inputs]
    for maker in makers:
        wide = gs.Variable(gs_tools.fresh(graph, "/wide"), np.dtype(np.float32), tensor.shape)
        maker.outputs = [wide if t is tensor else t for t in maker.outputs]
        cast = gs.Node(
            "Cast", gs_tools.fresh(graph, "/Cast"), {"to": number(tensor)}, [wide], [tensor]
        )
        graph.nodes.append(cast)


# Quantized layers


@dataclass
class _Weight:
    values: gs.Tensor
    scales: gs.Tensor
    zeros: gs.Tensor | None
    group: int


@dataclass
class _Input:
    source: gs.Tensor
    quantized: gs.Tensor
    scale: gs.Tensor
    zero: gs.Tensor | None  # None where each row has a scale of its own


def _weight(tensor: gs.Tensor) -> _Weight | None:
    """Return a quantized weight by what a layer reads."""
    node = producer(tensor, "DequantizeLinear")
    if node is None or node.attrs.get("axis", 1) != (1 if node.attrs.get("block_size") else 0):
        return None
    zeros = node.inputs[2] if len(node.inputs) > 2 else None
    return _Weight(node.inputs[0], node.inputs[1], zeros, node.attrs.get("block_size", 0))


def _input(tensor: gs.Tensor) -> _Input | None:
    """Return a quantized input by what a layer reads."""
    node = producer(tensor, "DequantizeLinear")
    if node is not None:
        q = producer(node.inputs[0], "QuantizeLinear")
        if q is None or len(node.inputs) < 3 or number(node.inputs[0]) != TensorProto.INT8:
            return None
        if [id(t) for t in q.inputs[1:]] != [id(t) for t in node.inputs[1:]]:
            return None
        return _Input(q.inputs[0], node.inputs[0], q.inputs[1], q.inputs[2])
    product = producer(tensor, "Mul")
    wide = product and producer(product.inputs[0], "Cast")
    if not product or not wide or number(wide.inputs[0]) != TensorProto.INT8:
        return None
    narrow = producer(wide.inputs[0], "Cast")
    clip = narrow and producer(narrow.inputs[0], "Clip")
    if not clip or producer(clip.inputs[0], "Round") is None:
        return None
    return _Input(clip.inputs[0], wide.inputs[0], product.inputs[1], None)


def _layers(graph: gs.Graph, counts: Counter[str]) -> None:
    """Put kernels for quantized layers in their place, and count them."""
    inputs = _Inputs(graph)
    for node in list(gs_tools.nodes(graph, "MatMul", "Gemm", "Conv")):
        read = node.inputs[1]
        if node.op == "MatMul":
            turn = producer(read, "Transpose")
            if turn is None:
                continue
            read = turn.inputs[0]
        view = producer(read, "Reshape")
        is_grouped = view is not None and producer(view.inputs[0], "DequantizeLinear")
        weight = _weight(view.inputs[0] if view is not None and is_grouped else read)
        if weight is None:
            continue
        x = _input(node.inputs[0])
        made, kind = None, "float"
        if x is not None and not weight.group and number(weight.values) in _WHOLE:
            made, kind = _on_integers(graph, node, weight, x, inputs), "int8"
        elif x is None and number(weight.values) == TensorProto.UINT4:
            made, kind = _on_bytes(graph, node, weight), "int4"
        counts[kind if made is not None else "float"] += 1
        if made is not None:
            replace(graph, node.outputs[0], made)


class _Inputs:
    """A model's quantized inputs as unsigned numbers and their zero point, each made once."""

    def __init__(self, graph: gs.Graph) -> None:
        self._graph = graph
        self._made: dict[tuple[int, ...], tuple[gs.Tensor, gs.Tensor, gs.Tensor]] = {}

    def unsigned(self, x: _Input) -> tuple[gs.Tensor, gs.Tensor, gs.Tensor]:
        """Return numbers, scale and zero point."""
        key = id(x.source), id(x.scale), id(x.zero)
        if key not in self._made:
            self._made[key] = self._rows(x) if x.zero is None else self._tensor(x)
        return self._made[key]

    def _tensor(self, x: _Input) -> tuple[gs.Tensor, gs.Tensor, gs.Tensor]:
        graph, byte, shape = self._graph, np.dtype(np.uint8), x.source.shape
        if _is_own_range(x):
            name = gs_tools.fresh(graph, "/DynamicQuantizeLinear")
            q = gs.Variable(f"{name}_0", byte, shape)
            scale = gs.Variable(f"{name}_1", np.dtype(np.float32), [])
            zero = gs.Variable(f"{name}_2", byte, [])
            outputs = [q, scale, zero]
            graph.nodes.append(gs.Node("DynamicQuantizeLinear", name, {}, [x.source], outputs))
            return q, scale, zero
        zero = _shifted(graph, x.zero, byte)
        return add(graph, "QuantizeLinear", [x.source, x.scale, zero], byte, shape), x.scale, zero

    def _rows(self, x: _Input) -> tuple[gs.Tensor, gs.Tensor, gs.Tensor]:
        graph, shape = self._graph, x.quantized.shape
        shift = constant(graph, np.array(_UNSIGNED, np.float32))
        moved = add(graph, "Add", [x.source, shift], np.dtype(np.float32), shape)
        q = add(graph, "Cast", [moved], np.dtype(np.uint8), shape, {"to": TensorProto.UINT8})
        one = constant(graph, np.array(1.0, np.float32))
        return q, one, constant(graph, np.array(_UNSIGNED, np.uint8))


def _is_own_range(x: _Input) -> bool:
    """Tell whether the scale of a tensor follows from its own least and largest value alone."""
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


def _shifted(graph: gs.Graph, numbers: gs.Tensor | None, dtype: Any) -> gs.Variable:
    """Return signed numbers as unsigned ones, 128 higher."""
    assert numbers is not None
    wide = add(graph, "Cast", [numbers], np.dtype(np.int32), numbers.shape, {"to": 6})
    shift = constant(graph, np.array(_UNSIGNED, np.int32))
    moved = add(graph, "Add", [wide, shift], np.dtype(np.int32), numbers.shape)
    return add(graph, "Cast", [moved], dtype, numbers.shape, {"to": TensorProto.UINT8})


def _on_integers(
    graph: gs.Graph, node: gs.Node, weight: _Weight, x: _Input, inputs: _Inputs
) -> gs.Tensor | None:
    if node.op == "Conv":
        return None if x.zero is None else _convolution(graph, node, weight, x)
    if node.op == "Gemm" and not _is_linear(node):
        return None
    stored = _int8(graph, weight)
    wide, shape = np.dtype(np.float32), node.outputs[0].shape
    turned = list(reversed(stored.shape))
    values = add(graph, "Transpose", [stored], np.dtype(np.int8), turned, {"perm": [1, 0]})
    q, scale, zero = inputs.unsigned(x)
    bias = list(node.inputs[2:])
    none = gs.Variable.empty()
    given = [q, values, scale, weight.scales, zero, none, *([] if x.zero is None else bias)]
    made = add(graph, "MatMulIntegerToFloat", given, wide, shape, domain=_MS)
    if x.zero is not None:
        return made
    made = add(graph, "Mul", [made, x.scale], wide, shape)
    return add(graph, "Add", [made, *bias], wide, shape) if bias else made


def _int8(graph: gs.Graph, weight: _Weight) -> gs.Tensor:
    """Return the numbers of a weight as int8."""
    values = weight.values
    if number(values) == TensorProto.INT8:
        return values
    ones = constant(graph, np.ones(weight.scales.shape, np.float32))
    given = [values, ones, weight.zeros]
    wide = add(graph, "DequantizeLinear", given, np.dtype(np.float32), values.shape, {"axis": 0})
    return add(graph, "Cast", [wide], np.dtype(np.int8), values.shape, {"to": TensorProto.INT8})


def _is_linear(node: gs.Node) -> bool:
    factors = node.attrs.get("alpha", 1.0), node.attrs.get("beta", 1.0)
    return factors == (1.0, 1.0) and node.attrs.get("transB") and not node.attrs.get("transA")


def _convolution(graph: gs.Graph, node: gs.Node, weight: _Weight, x: _Input) -> gs.Tensor:
    wide, shape = np.dtype(np.float32), node.outputs[0].shape
    values = _shifted(graph, _int8(graph, weight), np.dtype(np.uint8))
    middle = constant(graph, np.array(_UNSIGNED, np.uint8))
    given = [x.quantized, values, x.zero, middle]
    sums = add(graph, "ConvInteger", given, np.dtype(np.int32), shape, node.attrs)
    made = add(graph, "Cast", [sums], wide, shape, {"to": 1})
    rows = constant(graph, np.array([-1] + [1] * (len(shape) - 2), np.int64))
    count = weight.scales.shape
    scales = add(graph, "Mul", [weight.scales, x.scale], wide, count)
    ends = [*count, *[1] * (len(shape) - 2)]
    made = add(graph, "Mul", [made, add(graph, "Reshape", [scales, rows], wide, ends)], wide, shape)
    if len(node.inputs) < 3:
        return made
    bias = add(graph, "Reshape", [node.inputs[2], rows], wide, ends)
    return add(graph, "Add", [made, bias], wide, shape)


def _on_bytes(graph: gs.Graph, node: gs.Node, weight: _Weight) -> gs.Tensor | None:
    """Return a product with weights that stay in 4 bits; None where there is no kernel."""
    group, stored = weight.group, weight.values
    if node.op == "Conv" or group < 16 or group & (group - 1) or len(stored.shape) != 2:
        return None
    if not gs_tools.is_outside(stored) or (node.op == "Gemm" and not _is_linear(node)):
        return None
    rows, columns = stored.shape
    shape = [rows, columns // group, group // 2]
    values = gs_tools.outside(
        gs_tools.fresh(graph, "/bytes"), TensorProto.UINT8, shape, stored.name
    )
    flat = constant(graph, np.array([-1], np.int64))
    wide = np.dtype(np.float32)
    scales = add(graph, "Reshape", [weight.scales, flat], wide, [rows * columns // group])
    attrs = {"K": columns, "N": rows, "bits": 4, "block_size": group}
    given = [node.inputs[0], values, scales]
    shape = node.outputs[0].shape
    made = add(graph, "MatMulNBits", given, wide, shape, attrs, _MS)
    bias = list(node.inputs[2:])
    return add(graph, "Add", [made, *bias], wide, shape) if bias else made


# Norms


def write_out_group_norms(graph: gs.Graph) -> None:
    """Write group norms out around InstanceNormalization."""
    wide = np.dtype(np.float32)
    for node in gs_tools.nodes(graph, "GroupNormalization"):
        x, scale, bias = node.inputs
        shape, groups = node.outputs[0].shape, node.attrs["num_groups"]
        sizes = constant(graph, np.array([0, groups, -1], np.int64))
        rows = add(graph, "Reshape", [x, sizes], wide, [shape[0], groups, None])
        ones, zeros = (constant(graph, np.full(groups, v, np.float32)) for v in (1, 0))
        attrs = {"epsilon": node.attrs.get("epsilon", 1e-5)}
        given = [rows, ones, zeros]
        normed = add(graph, "InstanceNormalization", given, wide, rows.shape, attrs)
        back = add(graph, "Reshape", [normed, _shape(graph, x)], wide, shape)
        columns = constant(graph, np.array([-1] + [1] * (len(shape) - 2), np.int64))
        ends = [shape[1], *[1] * (len(shape) - 2)]
        factor, term = (add(graph, "Reshape", [t, columns], wide, ends) for t in (scale, bias))
        product = add(graph, "Mul", [back, factor], wide, shape)
        replace(graph, node.outputs[0], add(graph, "Add", [product, term], wide, shape))


def _shape(graph: gs.Graph, x: gs.Tensor) -> gs.Tensor:
    if all(isinstance(size, int) for size in x.shape):
        return constant(graph, np.array(x.shape, np.int64))
    return add(graph, "Shape", [x], np.dtype(np.int64), [len(x.shape)])
