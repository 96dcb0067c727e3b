"""CUDA's matrix products agree with the graph of quantized values that they stand for."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from diffopt.core import Pipeline
from diffopt.ir import graph as g
from diffopt.ir import qdq, serialize
from diffopt.ir.allowed_operators import find_any
from diffopt.ir.dynamic_sizes import Bounds
from diffopt.ir.printing import target_name
from diffopt.ir.program import Program
from diffopt.lowering import cuda_gemm
from diffopt.lowering import load_time_graph as loading
from diffopt.lowering.aoti import compile_body
from diffopt.lowering.hardware import hardware
from diffopt.targets.cpu import Cpu
from tests.passes.build import body, parameter, randn
from tests.quantized import pack
from tests.zoo import traced

aten = torch.ops.aten
H100 = hardware("h100")
BF16 = torch.bfloat16

# Sums of integers are exact, and results are of the order of 1: what is left is the rounding of a
# few products of scales, or once to the layer's type.
TIGHT = {"atol": 2e-5, "rtol": 1e-5}
ROUNDED = {"atol": 1e-3, "rtol": 2.0**-8}

INPUTS, OUTPUTS = 64, 32
SAMPLES = randn(2, 20, INPUTS), randn(2, INPUTS, 4, 5, seed=1), randn(2, INPUTS, seed=2)


def bias_of(out: int, x: fx.Node) -> Tensor:
    """Return a bias in a value's type that is the same in all types."""
    return parameter(out).to(BF16).to(x.meta["val"].dtype)


class LayerBuilder:
    """Adds layers to a body: they read rows of tokens, the channels of an image, or a few rows."""

    def __init__(self, make: Any, *inputs: fx.Node) -> None:
        self.gm: fx.GraphModule = make.gm
        self.make = make
        self.tokens, self.image, self.few = inputs

    def quantize(self, x: fx.Node, scaling: qdq.Scaling, number: qdq.Number) -> fx.Node:
        constants = []
        if scaling == "static":
            constants = [
                g.get_attr(self.gm, "scale", torch.tensor([0.027 if number == "int8" else 1e-2]))
            ]
            constants += [g.get_attr(self.gm, "zero", torch.tensor([-9], dtype=torch.int32))]
            constants = constants if number == "int8" else constants[:1]
        return qdq.quantize(self.gm, x, scaling, *constants, number=number)

    def weight(
        self,
        *shape: int,
        number: qdq.Number = "int8",
        group: int | None = None,
        scales: torch.dtype = torch.float32,
        is_wide: bool = False,
    ) -> fx.Node:
        packed = pack(parameter(*shape, seed=len(shape)) * 0.1, number, group)
        packed = replace(packed, scales=packed.scales.to(scales))
        if is_wide:
            packed = replace(packed, wide=torch.full(shape[:1], 0.4 / 127))
        return qdq.place_weight(self.gm, "weight", packed, self.tokens.meta["val"].dtype)

    def linear(
        self,
        scaling: qdq.Scaling | None,
        x: fx.Node | None = None,
        to: qdq.Number = "int8",
        out: int = OUTPUTS,
        inputs: int = INPUTS,
        bias: bool = True,
        **weight: Any,
    ) -> fx.Node:
        x = self.tokens if x is None else x
        activation = self.quantize(x, scaling, to) if scaling else x
        end = (bias_of(out, x),) if bias else ()
        result: fx.Node = self.make(
            aten.linear.default, activation, self.weight(out, inputs, **weight), *end
        )
        return result

    def narrow(self, scaling: qdq.Scaling | None, inputs: int, **weight: Any) -> fx.Node:
        x = self.make(aten.slice.Tensor, self.tokens, 2, 0, inputs)
        return self.linear(scaling, x, inputs=inputs, **weight)

    def transposed(self, scaling: qdq.Scaling = "dynamic", to: qdq.Number = "int8") -> fx.Node:
        x = self.make(aten.select.int, self.image, 0, 0)
        x = self.make(aten.permute.default, x, [1, 2, 0])
        return self.linear(scaling, x, to, number=to)

    def convolution(
        self,
        scaling: qdq.Scaling | None,
        *geometry: Any,
        size: int = 1,
        groups: int = 1,
        to: qdq.Number = "int8",
        **weight: Any,
    ) -> fx.Node:
        x = self.quantize(self.image, scaling, to) if scaling else self.image
        w = self.weight(OUTPUTS, INPUTS // groups, size, size, **weight)
        bias = bias_of(OUTPUTS, self.image)
        result: fx.Node = self.make(aten.conv2d.default, x, w, bias, *geometry)
        return result

    def single(self) -> fx.Node:
        self.image = self.make(aten.select.int, self.image, 0, 0)
        return self.convolution("static")

    def one_axis(self) -> fx.Node:
        line = self.make(aten.view.default, self.image, [2, INPUTS, 20])
        x = self.quantize(line, "dynamic", "int8")
        result: fx.Node = self.make(aten.conv1d.default, x, self.weight(OUTPUTS, INPUTS, 1))
        return result

    def channels_last(self) -> fx.Node:
        form = torch.channels_last
        self.image = self.make(aten.clone.default, self.image, memory_format=form)
        return self.convolution("static")


Build = Callable[[LayerBuilder], fx.Node]
FP8: Any = {"to": "fp8", "number": "fp8"}
INT4: Any = {"number": "int4", "group": 32}

PRODUCTS: dict[str, tuple[str, Build]] = {
    "static": ("int8", lambda m: m.linear("static")),
    "dynamic": ("int8", lambda m: m.linear("dynamic")),
    "rows": ("int8", lambda m: m.linear("rows")),
    "rows without bias": ("int8", lambda m: m.linear("rows", bias=False)),
    "scales in fp16": ("int8", lambda m: m.linear("static", scales=torch.float16)),
    "4-bit weight": ("int8", lambda m: m.linear("static", number="int4")),
    "4-bit groups, rounded to int8": (
        "int8",
        lambda m: m.linear("dynamic", is_wide=True, **INT4),
    ),
    "transposed": ("int8", LayerBuilder.transposed),
    "convolution": ("int8", lambda m: m.convolution("static")),
    "convolution in channels last": ("int8", LayerBuilder.channels_last),
    "convolution over one axis": ("int8", LayerBuilder.one_axis),
    "fp8, static": ("fp8", lambda m: m.linear("static", **FP8)),
    "fp8, dynamic": ("fp8", lambda m: m.linear("dynamic", **FP8)),
    "fp8, rows": ("fp8", lambda m: m.linear("rows", **FP8)),
    "fp8, rows without bias": ("fp8", lambda m: m.linear("rows", bias=False, **FP8)),
    "fp8, few rows": ("fp8", lambda m: m.linear("rows", m.few, **FP8)),
    "fp8, transposed": ("fp8", lambda m: m.transposed("rows", "fp8")),
    "fp8, convolution": ("fp8", lambda m: m.convolution("dynamic", **FP8)),
}

QUANTIZED = "layers with quantized inputs run on floats"
SMALL = "layers widen their 4-bit weights in every call"
FLOATS: dict[str, tuple[str | None, Build]] = {
    "weight alone": (None, lambda m: m.linear(None)),
    "fp8 weight alone": (None, lambda m: m.linear(None, number="fp8")),
    "few rows": (f"{QUANTIZED}: fewer than 17 rows", lambda m: m.linear("rows", m.few)),
    "12 inputs": (
        f"{QUANTIZED}: not all of its inputs and outputs are multiples of 8",
        lambda m: m.narrow("static", 12),
    ),
    "12 outputs": (
        f"{QUANTIZED}: not all of its inputs and outputs are multiples of 8",
        lambda m: m.linear("static", out=12),
    ),
    "fp8, 24 outputs": (
        f"{QUANTIZED}: not all of its inputs and outputs are multiples of 16",
        lambda m: m.linear("static", out=24, **FP8),
    ),
    "groups": (
        f"{QUANTIZED}: weights with a scale for every 32 inputs",
        lambda m: m.linear("static", **INT4),
    ),
    "fp8 weights": (
        f"{QUANTIZED}: weights in fp8, inputs in int8",
        lambda m: m.linear("static", number="fp8"),
    ),
    "fp8 inputs": (
        f"{QUANTIZED}: weights in int8, inputs in fp8",
        lambda m: m.linear("static", to="fp8"),
    ),
    "convolution of rows": (
        f"{QUANTIZED}: a convolution adds over rows, whose scales differ",
        lambda m: m.convolution("rows"),
    ),
    "convolution over 3 by 3": (
        f"{QUANTIZED}: a convolution that is no product of matrices",
        lambda m: m.convolution("static", size=3),
    ),
    "convolution with strides": (
        f"{QUANTIZED}: a convolution that is no product of matrices",
        lambda m: m.convolution("static", [2, 1]),
    ),
    "convolution with padding": (
        f"{QUANTIZED}: a convolution that is no product of matrices",
        lambda m: m.convolution("static", [1], [1, 0]),
    ),
    "convolution in groups": (
        f"{QUANTIZED}: a convolution that is no product of matrices",
        lambda m: m.convolution("static", [1], [0], [1], 2, groups=2),
    ),
    "convolution without a batch": (
        f"{QUANTIZED}: a convolution that is no product of matrices",
        LayerBuilder.single,
    ),
    "4 bits, many rows": (
        f"{SMALL}: more than 64 rows",
        lambda m: m.linear(None, m.make(aten.repeat.default, m.tokens, [2, 1, 1]), **INT4),
    ),
    "4 bits, groups of 16": (
        f"{SMALL}: no scale for every 32, 64, 128, 256 inputs",
        lambda m: m.linear(None, number="int4", group=16),
    ),
    "4 bits, 12 outputs": (
        f"{SMALL}: its outputs are no multiple of 8",
        lambda m: m.linear(None, out=12, **INT4),
    ),
    "4 bits, an odd number of weights": (
        f"{SMALL}: no scale for every 32, 64, 128, 256 inputs",
        lambda m: m.narrow(None, 13, out=11, number="int4"),
    ),
    "4 bits, a convolution": (
        f"{SMALL}: a convolution",
        lambda m: m.convolution(None, size=3, number="int4"),
    ),
}


def layers(*names: str, dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    """Return a body that gives the results of these layers."""
    kinds = {**PRODUCTS, **FLOATS, "4 bits": ("int4", lambda m: m.linear(None, **INT4))}

    def make(make: Any, *inputs: fx.Node) -> list[fx.Node]:
        builder = LayerBuilder(make, *inputs)
        return [kinds[name][1](builder) for name in names]

    return body(make, *(sample.to(dtype) for sample in SAMPLES))


def lower(
    gm: fx.GraphModule, device: str = "h100", free: Bounds | None = None
) -> tuple[loading.Lowered, fx.GraphModule]:
    """Return a lowered body, and the same read from JSON."""
    result = cuda_gemm.lower({"body": gm}, hardware(device), {"body": free} if free else None)
    lowered = result.bodies["body"]
    rows = json.loads(json.dumps(serialize.graph_to_json(lowered)))
    tensors = dict(g.named_tensors(lowered))
    return result, serialize.graph_from_json(rows, "body", tensors, {}, find_any)


def further(result: loading.Lowered, tensors: dict[str, Tensor]) -> list[Tensor]:
    """Run the setup; return what the body takes of it."""
    data = json.loads(json.dumps(result.setup.to_json()))
    return loading.run_setup(data, lambda _, name: tensors[name])["body"]


def operators(gm: fx.GraphModule) -> Counter[str]:
    return Counter(target_name(n) for n in gm.graph.nodes if n.op == "call_function")


UNKNOWN = {  # the compiler has no code for these, or none for how they are called
    "diffopt.unpack_int4",
    "quantized_decomposed.dequantize_per_channel",
    "quantized_decomposed.dequantize_per_channel_group",
    "quantized_decomposed.quantize_per_token",
    "quantized_decomposed.dequantize_per_token",
}


def assert_cuda_takes(result: loading.Lowered) -> None:
    """Check what torch's CUDA kernels check, and that loading leaves no weight wider than a byte.

    See `_int_mm_out_cuda`, `_scaled_mm_out_cuda` and `_weight_int4pack_mm_cuda`.
    """
    for node in g.outputs(result.setup.gm):
        value = node.meta["val"]
        assert value.dtype.itemsize == 1 or value.dim() != 2 or 1 in value.shape
    for gm in result.bodies.values():
        for node in gm.graph.nodes:
            assert node.op != "call_function" or target_name(node) not in UNKNOWN
            check = CHECKS.get(node.target)
            if check is not None:
                check(*fx.map_arg(node.args, lambda n: n.meta["val"]))


def check_int_mm(a: Tensor, b: Tensor) -> None:
    assert a.shape[0] > 16
    assert not {a.shape[1] % 8, *(size % 8 for size in b.shape)} - {0}
    assert a.stride() == (a.shape[1], 1)
    assert b.stride() == (1, b.shape[0])


def check_scaled_mm(a: Tensor, b: Tensor, *arguments: Any) -> None:
    rows, columns, bias, _, dtype, fast = arguments
    assert not {a.shape[1] % 16, *(size % 16 for size in b.shape)} - {0}
    assert a.stride() == (a.shape[1], 1)
    assert b.stride() == (1, b.shape[0])
    assert rows.dtype == columns.dtype == torch.float32
    assert fast
    if rows.numel() == columns.numel() == 1:
        assert bias is None
        assert dtype == torch.float32
        return
    assert rows.is_contiguous()
    assert columns.is_contiguous()
    assert (*rows.shape, *columns.shape) == (a.shape[0], 1, 1, b.shape[1])
    assert dtype == BF16
    assert bias is None or bias.dtype == BF16


def check_int4_mm(x: Tensor, packed: Tensor, group: int, both: Tensor) -> None:
    out, tiles = packed.shape[0] * 8, packed.shape[3] * 2
    assert x.dtype == both.dtype == BF16
    assert x.is_contiguous()
    assert packed.shape[1] * tiles * 16 == x.shape[1]
    assert group in (32, 64, 128, 256)
    assert both.is_contiguous()
    assert both.shape == (x.shape[1] // group, out, 2)


CHECKS: dict[Any, Callable[..., None]] = {
    aten._int_mm.default: check_int_mm,
    aten._scaled_mm.default: check_scaled_mm,
    aten._weight_int4pack_mm.default: check_int4_mm,
}


# What is computed


def has_fp8_rows() -> bool:
    """Tell whether fp8 can have a scale for each row in torch's CPU kernel: in 2.11 it cannot."""
    a, scales = torch.ones(16, 16).to(qdq.FP8), torch.ones(16, 1)
    try:
        aten._scaled_mm.default(a, a.t(), scales, scales.t(), out_dtype=BF16)
    except RuntimeError:
        return False
    return True


FP8_ROWS = has_fp8_rows()


def skip_without_fp8(name: str, dtype: torch.dtype = BF16) -> None:
    if "fp8" in name and dtype is BF16 and not FP8_ROWS:
        pytest.skip("the CPU in a GPU's place has one scale for a whole matrix of fp8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_gives_what_the_graph_gives(name: str, dtype: torch.dtype) -> None:
    skip_without_fp8(name, dtype)
    gm = layers(name, dtype=dtype)
    result, restored = lower(gm)
    kind = PRODUCTS[name][0]
    assert result.layers == {"body": {kind: 1}}
    assert not result.notes
    target = "aten._int_mm" if kind == "int8" else "aten._scaled_mm"
    assert operators(restored)[target] == 1
    assert not [n for n in restored.graph.nodes if qdq.layer(n)]
    assert_cuda_takes(result)
    samples = [sample.to(dtype) for sample in SAMPLES]
    (value,) = restored(*samples, *further(result, dict(g.named_tensors(gm))))
    # In floats of 16 bits the graph rounds inputs and weights once more than the kernel does.
    (expected,) = layers(name)(*(sample.float() for sample in samples))
    assert value.dtype == dtype
    tolerance = TIGHT if dtype == torch.float32 else ROUNDED
    torch.testing.assert_close(value.float(), expected, **tolerance)
    assert value.stride() == gm(*samples)[0].stride()


@pytest.mark.parametrize("name", FLOATS)
def test_where_there_is_no_product_the_graph_stays(name: str) -> None:
    dtype = BF16 if "4 bits" in name else torch.float32
    gm = layers(name, dtype=dtype)
    result, restored = lower(gm)
    assert result.layers == {"body": {"float": 1}}
    reason = FLOATS[name][0]
    assert result.notes == ({} if reason is None else {"body": [f"1 {reason}"]})
    assert not result.setup.takes["body"]
    assert_cuda_takes(result)
    samples = [sample.to(dtype) for sample in SAMPLES]
    (value,), (expected,) = restored(*samples), gm(*samples)
    torch.testing.assert_close(value, expected, atol=0, rtol=0)


def test_a_gpu_without_fp8() -> None:
    result, _ = lower(layers("fp8, static", "static"), "a100")
    assert result.layers == {"body": {"float": 1, "int8": 1}}
    assert result.notes == {
        "body": [
            f"1 {QUANTIZED}: a100 has no fp8 products: they need compute capability 8.9, and it"
            " has 8.0"
        ]
    }


def test_layers_after_each_other_and_a_weight_of_two() -> None:
    def make(make: Any, *inputs: fx.Node) -> list[fx.Node]:
        builder = LayerBuilder(make, *inputs)
        weight = builder.weight(INPUTS, INPUTS, number="int4")
        x = qdq.quantize(make.gm, builder.tokens, "rows")
        for _ in range(2):
            x = make(aten.linear.default, x, weight)
            x = qdq.quantize(make.gm, x, "rows")
        return [x, make(aten.linear.default, builder.few, weight)]

    gm = body(make, *SAMPLES)
    result, restored = lower(gm)
    assert result.layers == {"body": {"int8": 2, "float": 1}}
    assert len(g.outputs(result.setup.gm)) == 1  # packed once, and widened in the body alone
    values = restored(*SAMPLES, *further(result, dict(g.named_tensors(gm))))
    for value, expected in zip(values, gm(*SAMPLES), strict=True):
        torch.testing.assert_close(value, expected, **TIGHT)


def test_bodies_without_quantized_weights_are_as_they_were() -> None:
    gm = body(lambda make, x: make(aten.linear.default, x, parameter(6, 8)), randn(2, 8))
    result = cuda_gemm.lower({"body": gm}, H100)
    assert result.bodies["body"] is gm
    assert not result.layers
    assert not result.setup.takes


# Weights of 4 bits


@pytest.fixture
def int4_on_cpu() -> Iterator[None]:
    """Stand in for the two operators that are on GPUs alone.

    The order of the tiles is the kernels' own affair, so this packing keeps that of the bytes. What
    it has of theirs: the shapes, the half of a byte that comes first, and the formula.
    """

    def pack(pairs: Tensor, tiles: int) -> Tensor:
        out, bytes_ = pairs.shape
        assert tiles in (2, 4, 8)
        return pairs.view(torch.int32).view(out // 8, bytes_ // (8 * tiles), 32, tiles // 2)

    def product(x: Tensor, packed: Tensor, group: int, both: Tensor) -> Tensor:
        assert x.is_contiguous()
        assert x.dtype == both.dtype == BF16
        pairs = packed.view(torch.uint8).view(packed.shape[0] * 8, -1)
        numbers = torch.stack([pairs >> 4, pairs & 15], -1).flatten(1).to(BF16) - 8
        scales, zeros = both.repeat_interleave(group, 0).unbind(-1)
        return x @ (numbers * scales.t() + zeros.t()).t()

    library = torch.library.Library("aten", "IMPL")
    library.impl("_convert_weight_to_int4pack", pack, "CPU")
    library.impl("_weight_int4pack_mm", product, "CPU")
    yield
    library._destroy()


@pytest.mark.usefixtures("int4_on_cpu")
@pytest.mark.parametrize(("group", "inputs"), [(32, 288), (64, 192), (128, 256), (256, 256)])
def test_a_product_with_4_bit_weights_gives_what_the_graph_gives(group: int, inputs: int) -> None:
    def make(make: Any, x: fx.Node) -> fx.Node:
        packed = pack(parameter(24, inputs) * 0.1, "int4", group)
        # Scales that bfloat16 has: others the kernel rounds.
        packed = replace(packed, scales=packed.scales.to(BF16).half())
        weight = qdq.place_weight(make.gm, "weight", packed, BF16)
        result: fx.Node = make(aten.linear.default, x, weight, parameter(24).to(BF16))
        return result

    x = randn(3, 5, inputs).to(BF16)
    gm = body(make, x)
    result, restored = lower(gm)
    assert result.layers == {"body": {"int4": 1}}
    assert operators(restored)["aten._weight_int4pack_mm"] == 1
    assert_cuda_takes(result)
    stored = sum(n.meta["val"].nbytes for n in g.outputs(result.setup.gm))
    assert stored == 24 * inputs // 2 + 24 * (inputs // group) * 4
    (value,) = restored(x, *further(result, dict(g.named_tensors(gm))))
    torch.testing.assert_close(value, gm(x)[0], atol=2e-2, rtol=2.0**-7)


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        ("t4", BF16, "the kernel needs compute capability 8.0"),
        ("h100", torch.float16, "the kernel computes in bfloat16 alone"),
    ],
)
def test_where_there_is_no_product_with_4_bit_weights(
    device: str, dtype: torch.dtype, reason: str
) -> None:
    result, _ = lower(layers("4 bits", dtype=dtype), device)
    assert result.layers == {"body": {"float": 1}}
    assert result.notes == {"body": [f"1 {SMALL}: {reason}"]}


# Sizes that may change


@pytest.mark.parametrize("name", ["static", "fp8, rows", "fp8, dynamic", "convolution"])
def test_one_graph_for_a_range_of_sizes(name: str) -> None:
    skip_without_fp8(name)
    gm = layers(name, dtype=BF16)
    axis = {0: (1, 4)}
    result, restored = lower(gm, free={0: axis, 1: axis, 2: axis})
    assert result.layers == {"body": {PRODUCTS[name][0]: 1}}
    assert_cuda_takes(result)
    tensors = further(result, dict(g.named_tensors(gm)))
    for count in (1, 4):
        samples = [randn(count, *sample.shape[1:]) for sample in SAMPLES]
        (value,) = restored(*(sample.to(BF16) for sample in samples), *tensors)
        (expected,) = layers(name)(*(sample.to(BF16).float() for sample in samples))
        torch.testing.assert_close(value.float(), expected, **ROUNDED)


def test_the_fewest_and_the_most_rows_decide() -> None:
    gm = layers("static", "4 bits", dtype=BF16)
    assert lower(gm)[0].layers == {"body": {"int8": 1, "int4": 1}}
    result, _ = lower(gm, free={0: {1: (8, 33)}})
    assert result.notes == {
        "body": [f"1 {QUANTIZED}: fewer than 17 rows", f"1 {SMALL}: more than 64 rows"]
    }


def test_two_sizes_that_change() -> None:
    result, _ = lower(layers("static"), free={0: {0: (2, 4), 1: (20, 40)}})
    assert result.notes == {"body": [f"1 {QUANTIZED}: several of its sizes may change"]}


# Programs


@cache
def simplified(name: str) -> Program:
    return Pipeline.parse("unroll,hoist,simplify").run(traced(name))


def call_errors(program: Program, result: loading.Lowered) -> list[float]:
    """Return the relative error of what each call makes of what the program's own call reads."""
    setup = result.setup.to_json()
    taken = loading.run_setup(
        setup, lambda component, name: g.attribute(program.components[component], name)
    )
    errors = []

    class Outer(fx.Interpreter):
        def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
            name = str(target)
            expected = program.components[name](*args)
            got = result.bodies[name](*args, *taken.get(name, []))
            for one, other in zip(got, expected, strict=True):
                errors.append(float((one.float() - other.float()).norm() / other.float().norm()))
            return expected

    with torch.no_grad():
        Outer(program.root).run(*program.sample_inputs())
    return errors


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("sd", "quantize(int8,samples=1)", {"int8": 49, "float": 26}),
        ("sd", "quantize(int4,activations=dynamic,group=8)", {"int8": 49, "float": 26}),
        ("dit", "quantize(int8,activations=rows,rank=2)", {"int8": 12, "float": 3}),
        ("dit", "quantize(fp8,samples=1)", {"fp8": 12, "float": 3}),
        ("dit", "cast(bf16),quantize(fp8,activations=rows)", {"fp8": 12, "float": 3}),
        (
            "dit",
            "cast(bf16),quantize(int4,activations=none,group=32,ends=true)",
            {"int4": 2, "float": 15},
        ),
    ],
)
@pytest.mark.usefixtures("int4_on_cpu")
def test_pipelines_give_what_their_graphs_give(
    name: str, text: str, expected: dict[str, int]
) -> None:
    skip_without_fp8(text, BF16 if "bf16" in text else torch.float32)
    program = Pipeline.parse(text).run(simplified(name))
    result = cuda_gemm.lower(program.components, H100)
    counts = sum(map(Counter, result.layers.values()), Counter[str]())
    assert counts == expected
    assert_cuda_takes(result)
    *errors, most = sorted(call_errors(program, result))
    assert max(errors) < (1e-2 if "bf16" in text else 1e-5)
    # In one call a value between two levels may be rounded to the other, and so what follows.
    assert most < 0.03


def test_every_kind_of_layer_compiles() -> None:
    names = [
        "static",
        "rows",
        "convolution",
        "fp8, dynamic",
        "fp8, transposed",
        "few rows",
        "groups",
        "fp8 weight alone",
        "convolution over 3 by 3",
        "4 bits, many rows",
        "4 bits, a convolution",
    ]
    if not FP8_ROWS:
        names = [name for name in names if "fp8" not in name]
    _, restored = lower(layers(*names, dtype=BF16))
    # For the CPU: here it shows that the compiler has code for all but the products on GPUs alone.
    members = compile_body(restored, Cpu(threads=1)._settings())
    assert set(members) == {"so"}  # no operator is called back for


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*PRODUCTS, *FLOATS, "4 bits"])
def test_on_a_gpu(name: str) -> None:
    capability = torch.cuda.get_device_capability()
    kind = PRODUCTS.get(name, ("float",))[0]
    if kind == "fp8" and capability < (8, 9):
        pytest.skip("this GPU has no products in fp8")
    for dtype in (torch.float32, torch.float16, BF16):
        gm = layers(name, dtype=dtype)
        result = cuda_gemm.lower({"body": gm}, replace(H100, capability=capability))
        moved = {key: tensor.cuda() for key, tensor in g.named_tensors(gm)}
        samples = [sample.to(dtype) for sample in SAMPLES]
        arguments = [*(sample.cuda() for sample in samples), *further(result, moved)]
        (value,) = result.bodies["body"].cuda()(*arguments)
        (expected,) = layers(name)(*(sample.float() for sample in samples))
        # Products of floats are in TF32, and sums in fp8 have fewer digits than float32.
        is_tight = kind == "int8" and dtype == torch.float32
        tolerance = TIGHT if is_tight else {"atol": 2e-2, "rtol": 2.0**-7}
        torch.testing.assert_close(value.cpu().float(), expected, **tolerance)
