"""Components as ONNX: names, types, quantized values, and the passes over models."""

import operator
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx

from diffopt.ir import graph as g
from diffopt.lowering.onnx import cleanup, export
from tests.passes.build import body, parameter, randn
from tests.quantized import pack
from tests.targets.test_cpu_int8 import LAYERS, SAMPLES, TIGHT, layers

ROOT = Path(__file__).parents[2]
aten = torch.ops.aten


def run(model: onnx.ModelProto, *tensors: Tensor) -> list[Tensor]:
    """Run a model that holds its weights."""
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [argument.name for argument in session.get_inputs()]
    feeds = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
    return [torch.from_numpy(array) for array in session.run(None, feeds)]


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def initializers(model: onnx.ModelProto) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def mixed() -> fx.GraphModule:
    """Return a body with a weight that is used twice, a norm, and two results."""
    weight, scale = parameter(8, 8), parameter(8, seed=1)

    def make(make: Any, x: fx.Node, y: fx.Node) -> list[fx.Node]:
        w = make.weight(weight, "layer_weight")
        x = make(aten.linear.default, x, w)
        x = make(aten.layer_norm.default, x, [8], make.weight(scale, "norm_weight"), None, 1e-5)
        total = make(aten.add.Tensor, make(aten.linear.default, x, w), y)
        return [total, make(aten.silu.default, x)]

    return body(make, randn(2, 3, 8), randn(2, 1, 8))


# What is exported


def test_names_are_those_of_the_component() -> None:
    gm = mixed()
    model = export(gm, "part")
    assert model.graph.name == "part"
    assert [(d.domain, d.version) for d in model.opset_import] == [("", 21)]
    assert [value.name for value in model.graph.input] == ["x0", "x1"]
    assert [value.name for value in model.graph.output] == ["y0", "y1"]
    assert {"layer_weight", "norm_weight"} <= initializers(model).keys()
    inputs = randn(2, 3, 8), randn(2, 1, 8, seed=1)
    for output, expected in zip(run(model, *inputs), gm(*inputs), strict=True):
        torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)


def test_a_model_without_weights_says_where_they_are() -> None:
    gm = mixed()
    model = export(gm, "part", weights=False)
    for name in ("layer_weight", "norm_weight"):
        tensor = initializers(model)[name]
        assert tensor.data_location == TensorProto.EXTERNAL
        assert {e.key: e.value for e in tensor.external_data}["location"] == name
        assert not tensor.raw_data


def test_the_same_component_is_the_same_bytes() -> None:
    both = [export(mixed(), "part").SerializeToString(deterministic=True) for _ in range(2)]
    assert both[0] == both[1]
    assert str(ROOT).encode() not in both[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_stay(dtype: torch.dtype) -> None:
    def make(make: Any, x: fx.Node) -> fx.Node:
        linear: fx.Node = make(aten.linear.default, x, parameter(4, 8).to(dtype))
        return linear

    model = export(body(make, randn(2, 8).to(dtype)), "part")
    number = {torch.bfloat16: TensorProto.BFLOAT16, torch.float16: TensorProto.FLOAT16}[dtype]
    ends = [*model.graph.input, *model.graph.output]
    assert {value.type.tensor_type.elem_type for value in ends} == {number}
    assert {tensor.data_type for tensor in model.graph.initializer} == {number}
    assert operators(model) == ["Gemm"]


def test_sizes_that_may_change_stay_open() -> None:
    def make(make: Any, x: fx.Node, y: fx.Node) -> fx.Node:
        total: fx.Node = make(aten.add.Tensor, make(aten.linear.default, x, parameter(8, 8)), y)
        return total

    gm = body(make, randn(2, 3, 8), randn(2, 1, 8))
    model = export(gm, "part", sizes={0: {0: (1, 4)}, 1: {0: (1, 4)}})
    shapes = [
        [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in model.graph.input
    ]
    assert shapes == [["n0", 3, 8], ["n0", 1, 8]]
    for count in (1, 4):
        inputs = randn(count, 3, 8), randn(count, 1, 8, seed=1)
        torch.testing.assert_close(run(model, *inputs)[0], gm(*inputs)[0], atol=1e-6, rtol=1e-5)


# Attention


def attention(mask: Tensor | None = None, heads: int = 2, **options: Any) -> fx.GraphModule:
    def make(make: Any, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
        operands = (q, k, v) if mask is None else (q, k, v, mask)
        result: fx.Node = make(aten.scaled_dot_product_attention.default, *operands, **options)
        return result

    return body(make, randn(1, 2, 5, 4), randn(1, heads, 7, 4), randn(1, heads, 7, 4))


HIDING = torch.ones(5, 7, dtype=torch.bool)
HIDING[0] = False
HIDING[1, 3:] = False


ATTENTION = {
    "plain": attention(),
    "scaled": attention(scale=0.3),
    "boolean mask": attention(HIDING),
    "mask": attention(randn(1, 1, 5, 7)),
    "causal": attention(is_causal=True),
    "shared heads": attention(heads=1, enable_gqa=True),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str) -> None:
    gm = ATTENTION[name]
    inputs = [randn(*n.meta["val"].shape, seed=i) for i, n in enumerate(g.placeholders(gm))]
    model = export(gm, "part")
    assert operators(model).count("Softmax") == 1
    assert not {"Sqrt", "Shape", "CastLike"} & set(operators(model))
    torch.testing.assert_close(run(model, *inputs)[0], gm(*inputs)[0], atol=1e-6, rtol=1e-5)


def image_mean(make: Any, x: fx.Node) -> fx.Node:
    mean: fx.Node = make(aten.mean.dim, x, [0], True)
    return mean


def gaps(make: Any, x: fx.Node) -> list[fx.Node]:
    """Use operators of which torch's own exporter makes something else, or nothing."""
    small, large = (make(op, x, 0) for op in (aten.lt.Scalar, aten.gt.Scalar))
    image = make(aten.view.default, x, [1, 2, 3, 4])
    pieces = make(aten.split_with_sizes.default, x, [1, 3], 2)
    return [
        make(aten.amax.default, x),
        make(aten.amin.default, x, [1], True),
        make(aten.where.self, make(aten.gt.Scalar, x, 1), small, large),
        make(aten.conv2d.default, image, parameter(4, 2, 3, 3), None, [1], [1], [1]),
        make(aten.clamp.default, x, 0, 0.5),
        make(aten.clamp.default, x, max=1),
        make(aten.clamp.Tensor, x, make(aten.amin.default, x, [2], True), None),
        make(aten.clamp.Tensor, x, None, make(aten.mul.Tensor, image_mean(make, x), 0.5)),
        make(operator.getitem, pieces, 1),
        make(operator.getitem, make(aten.split.Tensor, x, 2, 1), 1),
    ]


def test_operators_that_the_exporter_lacks() -> None:
    gm, x = body(gaps, randn(2, 3, 4)), randn(2, 3, 4)
    model = export(gm, "part")
    assert not [op for op in operators(model) if "Sequence" in op]
    for output, expected in zip(run(model, x), gm(x), strict=True):
        torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)


# Quantized values


def test_quantized_layers_give_what_the_graph_gives() -> None:
    gm = layers(*LAYERS)
    results = zip(LAYERS, run(export(gm, "part"), *SAMPLES), gm(*SAMPLES), strict=True)
    for name, output, expected in results:
        torch.testing.assert_close(
            output, expected, **TIGHT, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_quantized_values_go_through_the_operators_that_compilers_know() -> None:
    model = export(layers("static", "convolution"), "part")
    op_types = operators(model)
    assert (op_types.count("QuantizeLinear"), op_types.count("DequantizeLinear")) == (2, 4)
    producers = {value: node for node in model.graph.node for value in node.output}
    reads = [n.input[:2] for n in model.graph.node if n.op_type in ("MatMul", "Gemm", "Conv")]
    assert len(reads) == 2
    for values in reads:  # nothing is between a layer and what dequantizes its input and weight
        assert [producers[value].op_type for value in values] == ["DequantizeLinear"] * 2
    types = {tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) > 1}
    assert types == {TensorProto.INT8}


def test_weights_of_4_bits_are_int4_and_keep_their_bytes_outside() -> None:
    gm = layers("4-bit groups")
    small = [t for t in export(gm, "part").graph.initializer if t.data_type == TensorProto.INT4]
    assert len(small) == 1
    model = export(gm, "part", weights=False)
    (outside,) = [
        t for t in model.graph.initializer if t.data_type == TensorProto.UINT4 and t.external_data
    ]
    assert outside.external_data[0].value == "weight_int4"
    zeros = [
        t
        for t in model.graph.initializer
        if t.data_type == TensorProto.UINT4 and not t.external_data
    ]
    assert (numpy_helper.to_array(zeros[0]).astype(int) == 8).all()


def test_e4m3_numbers_are_one_operator_each() -> None:
    from diffopt.ir import qdq

    def make(make: Any, x: fx.Node) -> fx.Node:
        x = qdq.quantize(make.gm, x, "dynamic", number="fp8")
        weight = qdq.place_weight(make.gm, "weight", pack(parameter(4, 8), "fp8"), torch.float32)
        linear: fx.Node = make(aten.linear.default, x, weight)
        return linear

    gm = body(make, randn(2, 8))
    model = export(gm, "part")
    op_types = operators(model)
    assert (op_types.count("QuantizeLinear"), op_types.count("DequantizeLinear")) == (1, 2)
    assert TensorProto.FLOAT8E4M3FN in {tensor.data_type for tensor in model.graph.initializer}
    x = randn(2, 8)
    torch.testing.assert_close(run(model, x)[0], gm(x)[0], atol=1e-6, rtol=1e-5)


# Passes over models


def model_of(nodes: list[Any], output: int, **constants: np.ndarray[Any, Any]) -> onnx.ModelProto:
    """Return a model of x, float32[2,4]."""
    graph = helper.make_graph(
        nodes,
        "part",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])],
        [helper.make_tensor_value_info("y", output, [2, 4])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


@pytest.mark.parametrize(
    ("first", "second", "left"),
    [
        (TensorProto.FLOAT, TensorProto.FLOAT, []),
        (TensorProto.DOUBLE, TensorProto.FLOAT, []),
        (TensorProto.DOUBLE, TensorProto.FLOAT16, ["Cast"]),
        (TensorProto.FLOAT16, TensorProto.FLOAT, ["Cast", "Cast"]),
    ],
)
def test_casts_that_change_nothing_go(first: int, second: int, left: list[str]) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], to=first),
        helper.make_node("Cast", ["a"], ["b"], to=second),
        helper.make_node("Relu", ["b"], ["y"]),
    ]
    assert operators(cleanup.clean_up(model_of(nodes, second))) == [*left, "Relu"]


def test_constants_are_computed_and_two_transposes_are_one() -> None:
    nodes = [
        helper.make_node("Neg", ["c"], ["d"]),
        helper.make_node("Add", ["x", "d"], ["a"]),
        helper.make_node("Transpose", ["a"], ["b"], perm=[1, 0]),
        helper.make_node("Transpose", ["b"], ["y"], perm=[1, 0]),
    ]
    model = model_of(nodes, TensorProto.FLOAT, c=np.ones(4, np.float32))
    cleaned = cleanup.clean_up(model)
    assert operators(cleaned) == ["Add"]
    x = randn(2, 4)
    torch.testing.assert_close(run(cleaned, x)[0], x - 1)


def test_a_result_that_is_a_constant_or_an_argument_keeps_its_name() -> None:
    nodes = [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)]
    cleaned = cleanup.clean_up(model_of(nodes, TensorProto.FLOAT))
    assert operators(cleaned) == ["Identity"]
    assert cleaned.graph.output[0].name == "y"


# Packages


def test_importing_diffopt_imports_no_package_of_onnx() -> None:
    code = (
        "import sys, diffopt, diffopt.cli, diffopt.lowering.onnx, diffopt.targets.onnxruntime\n"
        "print([m for m in ('onnx', 'onnxscript', 'onnxruntime', 'onnx_graphsurgeon')"
        " if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
