"""Quantized programs on the CPU: integer kernels agree with the graph, weights are kept once."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from diffopt.engine.engine import Engine, build, load
from diffopt.errors import DiffoptError
from diffopt.ir import graph as g
from diffopt.ir import qdq
from diffopt.ir.printing import target_name
from diffopt.lowering import cpu_instructions, onednn
from diffopt.lowering import load_time_graph as loading
from diffopt.lowering.aoti import LibraryFunction, compile_body, open_library
from diffopt.targets import cpu
from diffopt.targets.cpu import Cpu
from tests.passes.build import body, parameter, program, randn
from tests.quantized import pack, steps

ROOT = Path(__file__).parents[2]
aten = torch.ops.aten
Layer = Callable[["LayerBuilder"], fx.Node]

# Sums of integers are exact, so kernels differ from the graph by the rounding of a few products of
# scales, where results are of the order of 1. A number rounded to another integer gives 1e-3.
TIGHT = {"atol": 2e-5, "rtol": 1e-5}

WORTH_PACKING = onednn._WORTH_PACKING

needs_integers = pytest.mark.skipif(
    cpu._lack() is not None, reason=f"integer kernels are not exact here: {cpu._lack()}"
)


@pytest.fixture(autouse=True)
def _small_products_are_packed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_WORTH_PACKING", 0)


class LayerBuilder:
    """Adds layers, all quantized in some way, to a body with one input for each kind of them."""

    def __init__(self, make: Any, *inputs: fx.Node) -> None:
        self.gm: fx.GraphModule = make.gm
        self.make = make
        self.rows, self.image, self.line = inputs

    def weight(
        self,
        *shape: int,
        number: qdq.Number = "int8",
        group: int | None = None,
        scales: torch.dtype = torch.float32,
    ) -> fx.Node:
        packed = pack(parameter(*shape, seed=len(shape)) * 0.1, number, group)
        packed = replace(packed, scales=packed.scales.to(scales))
        return qdq.place_weight(self.gm, "weight", packed, self.rows.meta["val"].dtype)

    def quantize(self, x: fx.Node, scaling: qdq.Scaling, number: qdq.Number = "int8") -> fx.Node:
        constants = [g.get_attr(self.gm, "scale", torch.tensor(0.027))]
        constants.append(g.get_attr(self.gm, "zero", torch.tensor(-9, dtype=torch.int32)))
        constants = constants if scaling == "static" else []
        return qdq.quantize(self.gm, x, scaling, *constants, number=number)

    def linear(self, scaling: qdq.Scaling | None, bias: bool = True, **weight: Any) -> fx.Node:
        x = self.quantize(self.rows, scaling) if scaling else self.rows
        end = (parameter(6).to(self.rows.meta["val"].dtype),) if bias else ()
        result: fx.Node = self.make(aten.linear.default, x, self.weight(6, 8, **weight), *end)
        return result

    def convolution(
        self, scaling: qdq.Scaling | None, *geometry: Any, groups: int = 1, kernel: int = 3
    ) -> fx.Node:
        x = self.quantize(self.image, scaling) if scaling else self.image
        weight = self.weight(8, 4 // groups, kernel, kernel)
        bias = parameter(8).to(self.image.meta["val"].dtype)
        result: fx.Node = self.make(aten.conv2d.default, x, weight, bias, *geometry)
        return result

    def one_axis(self) -> fx.Node:
        x = self.quantize(self.line, "static")
        result: fx.Node = self.make(aten.conv1d.default, x, self.weight(8, 4, 3), None, [2], [1])
        return result


LAYERS: dict[str, tuple[str, Layer]] = {
    "static": ("int8", lambda m: m.linear("static")),
    "dynamic": ("int8", lambda m: m.linear("dynamic")),
    "rows": ("int8", lambda m: m.linear("rows")),
    "rows without bias": ("int8", lambda m: m.linear("rows", bias=False)),
    "scales in fp16": ("int8", lambda m: m.linear("static", scales=torch.float16)),
    "4-bit weight": ("int8", lambda m: m.linear("static", number="int4")),
    "4-bit groups": ("float", lambda m: m.linear("static", number="int4", group=4)),
    "static, gelu": ("int8", lambda m: m.make(aten.gelu.default, m.linear("static"))),
    "dynamic, gelu by tanh": (
        "int8",
        lambda m: m.make(aten.gelu.default, m.linear("dynamic"), approximate="tanh"),
    ),
    "rows, gelu": ("int8", lambda m: m.make(aten.gelu.default, m.linear("rows"))),
    "weight alone": ("float", lambda m: m.linear(None)),
    "weight alone, gelu by tanh": (
        "float",
        lambda m: m.make(aten.gelu.default, m.linear(None), approximate="tanh"),
    ),
    "fp8 weight alone": ("float", lambda m: m.linear(None, number="fp8")),
    "convolution": ("int8", lambda m: m.convolution("static", [1, 1], [1, 1])),
    "strided in groups": (
        "int8",
        lambda m: m.convolution("dynamic", [2, 1], [1], [2, 2], 2, groups=2),
    ),
    "convolution of rows": ("float", lambda m: m.convolution("rows", [1, 1])),
    "convolution, weight alone": ("float", lambda m: m.convolution(None, [1, 1])),
    "convolution, weight alone, silu": (
        "float",
        lambda m: m.make(aten.silu.default, m.convolution(None, [1, 1])),
    ),
    "convolution of pixels, weight alone": ("float", lambda m: m.convolution(None, kernel=1)),
    "convolution, silu": (
        "int8",
        lambda m: m.make(aten.silu.default, m.convolution("static", [1, 1], [1, 1])),
    ),
    "one axis": ("int8", LayerBuilder.one_axis),
}

SAMPLES = randn(2, 5, 8), randn(2, 4, 6, 7, seed=1), randn(2, 4, 9, seed=2)


def layers(*names: str, dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    """Return a body that gives the results of these layers."""

    def make(make: Any, *inputs: fx.Node) -> list[fx.Node]:
        builder = LayerBuilder(make, *inputs)
        return [LAYERS[name][1](builder) for name in names]

    return body(make, *(sample.to(dtype) for sample in SAMPLES))


def lowered(gm: fx.GraphModule, **options: Any) -> tuple[loading.Lowered, list[Tensor]]:
    """Return a body in its lowered form, and the further arguments that it takes."""
    result = onednn.lower({"body": gm}, **{"pack": False, "lack": None, **options})
    assert not result.setup.gm.graph.find_nodes(op="placeholder")
    tensors = dict(g.named_tensors(gm))
    data = json.loads(json.dumps(result.setup.to_json()))
    return result, loading.run_setup(data, lambda _, name: tensors[name]).get("body", [])


def compiled(gm: fx.GraphModule, further: list[Tensor], *sizes: Any) -> LibraryFunction:
    """Return a lowered body's library, which takes the body's inputs as they come."""
    files = compile_body(gm, Cpu()._settings(), *sizes)
    inputs = len(g.placeholders(gm)) - len(further)
    return LibraryFunction(
        open_library(files, dict(g.named_tensors(gm)).__getitem__), [None] * inputs, further
    )


def operators(gm: fx.GraphModule) -> Counter[str]:
    """Return how often operators are called."""
    return Counter(target_name(n) for n in gm.graph.nodes if n.op == "call_function")


# What is computed


def test_the_compiler_takes_a_packed_weight_as_it_is_whatever_its_strides() -> None:
    transposed = parameter(16, 24).to(torch.bfloat16).t()  # its rows are not one after another
    x = randn(2, 5, 16).to(torch.bfloat16)
    gm = body(lambda make, x: [make(aten.linear.default, x, transposed)], x)
    result, further = lowered(gm, pack=True)
    run = compiled(result.bodies["body"], further)
    torch.testing.assert_close(run([x])[0], gm(x)[0])


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[needs_integers] * (how == "int8")) for n, (how, _) in LAYERS.items()],
)
def test_a_layer_runs_on_what_it_should_and_gives_the_same(name: str) -> None:
    gm = layers(name)
    result, further = lowered(gm)
    assert result.layers == {"body": {LAYERS[name][0]: 1}}
    counts = operators(result.bodies["body"])
    products = counts["onednn.qlinear_pointwise.tensor"] + counts["onednn.qconv_pointwise.tensor"]
    assert products == (LAYERS[name][0] == "int8")
    # What follows from stored tensors alone is done on loading.
    inputs = set(g.placeholders(result.bodies["body"])[: len(SAMPLES)])
    for node in result.bodies["body"].graph.nodes:
        assert node.op != "call_function" or not inputs.isdisjoint(g.ancestors([node]))
    assert counts["aten.gelu"] + counts["aten.silu"] == (name == "rows, gelu")
    assert not [node for node in result.bodies["body"].graph.nodes if qdq.dequantizes_weight(node)]
    torch.testing.assert_close(
        result.bodies["body"](*SAMPLES, *further)[0], gm(*SAMPLES)[0], **TIGHT
    )


@needs_integers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_have_the_type_of_the_layer(dtype: torch.dtype) -> None:
    pixels = "convolution of pixels, weight alone"
    names = ["static", "rows", "convolution", "weight alone", pixels]
    gm = layers(*names, dtype=dtype)
    samples = [sample.to(dtype) for sample in SAMPLES]
    result, further = lowered(gm)
    # The graph rounds inputs and weights to the type once more; kernels use the integers.
    for output, expected in zip(
        result.bodies["body"](*samples, *further), gm(*samples), strict=True
    ):
        assert output.dtype == expected.dtype == dtype
        torch.testing.assert_close(output, expected, atol=2e-2, rtol=2e-2)


@needs_integers
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 0, 2, 1]])
def test_outputs_keep_their_memory_layout(order: list[int]) -> None:
    def make(make: Any, *inputs: fx.Node) -> fx.Node:
        result: fx.Node = LAYERS["convolution"][1](LayerBuilder(make, *inputs))
        return make(aten.permute.default, result, order)

    gm = body(make, *SAMPLES)
    result, further = lowered(gm)
    (output,), (expected,) = result.bodies["body"](*SAMPLES, *further), gm(*SAMPLES)
    assert output.stride() == expected.stride()
    torch.testing.assert_close(output, expected, **TIGHT)


def test_what_cannot_run_on_integers_is_said() -> None:
    result, _ = lowered(layers("convolution of rows", "4-bit groups", "static"))
    assert result.layers == {"body": {"float": 2, "int8": 1}}
    assert result.notes == {
        "body": [
            "1 layers with quantized inputs run on floats: a convolution adds over rows, whose"
            " scales differ",
            "1 layers with quantized inputs run on floats: weights with a scale for every 4 inputs",
        ]
    }


def test_a_machine_without_kernels_for_integers() -> None:
    gm = layers("static", "convolution")
    result, further = lowered(gm, lack="nothing here")
    assert result.layers == {"body": {"float": 2}}
    assert result.notes == {"body": ["2 layers with quantized inputs run on floats: nothing here"]}
    for output, expected in zip(
        result.bodies["body"](*SAMPLES, *further), gm(*SAMPLES), strict=True
    ):
        torch.testing.assert_close(output, expected, **TIGHT)


def test_bodies_without_quantized_weights_are_as_they_were() -> None:
    gm = body(lambda make, x: make(aten.linear.default, x, parameter(6, 8)), randn(2, 8))
    result = onednn.lower({"body": gm}, False, None)
    assert result.bodies["body"] is gm
    assert not result.layers
    assert not result.setup.takes


@needs_integers
def test_every_kind_of_layer_compiles() -> None:
    gm = layers(*LAYERS)
    result, further = lowered(gm)
    run = compiled(result.bodies["body"], further)
    results = zip(LAYERS, run(list(SAMPLES)), gm(*SAMPLES), strict=True)
    for name, output, expected in results:
        torch.testing.assert_close(
            output, expected, **TIGHT, msg=lambda text, n=name: f"{n}: {text}"
        )
        assert output.stride() == expected.stride()


@needs_integers
def test_one_library_for_a_range_of_sizes() -> None:
    gm = layers("static", "convolution")
    result, further = lowered(gm)
    open_axis = {0: (1, 4)}
    run = compiled(result.bodies["body"], further, {0: open_axis, 1: open_axis})
    for count in (1, 4):
        samples = [randn(count, *sample.shape[1:]) for sample in SAMPLES[:2]] + [SAMPLES[2]]
        for output, expected in zip(run(list(samples)), gm(*samples), strict=True):
            torch.testing.assert_close(output, expected, **TIGHT)


# What is stored


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that builds the steps for a target, each text once."""
    paths: dict[str, Path] = {}
    folder = tmp_path_factory.mktemp("engines")

    def make(text: str) -> Path:
        if text not in paths:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("DIFFOPT_CACHE", str(folder / "cache"))
                paths[text] = folder / f"{len(paths)}.engine"
                build(steps(), text, paths[text])
        return paths[text]

    return make


def setup(engine: Engine) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(bytes(engine._file.archive.read("kernels/(setup).json")))
    return data


@pytest.mark.parametrize("text", ["cpu", "cpu(freeze=true)", "cpu(pack=true)"])
def test_an_engine_gives_what_the_program_gives(text: str, engines: Callable[[str], Path]) -> None:
    (expected,) = steps().run(steps().sample)
    (output,) = load(engines(text)).run(steps().sample)
    torch.testing.assert_close(output, expected, **TIGHT)


@needs_integers
def test_a_weight_that_two_components_share_is_stored_and_packed_once(
    engines: Callable[[str], Path],
) -> None:
    engine = load(engines("cpu(pack=false)"))
    kinds = Counter(str(tensor.dtype) for tensor in engine.tensors.values())
    assert kinds["torch.int8"] == kinds["torch.uint8"] == 1
    rows = setup(engine)["nodes"]
    packs = Counter(row["target"] for row in rows if "prepack" in row["target"])
    assert packs == {"onednn.qlinear_prepack.default": 1, "onednn.qconv_prepack.default": 1}
    assert engine.manifest["components"]["one"]["layers"] == {"int8": 1}
    assert engine.manifest["components"]["other"]["layers"] == {"int8": 2}


def test_frozen_kernels_hold_the_floats_and_not_the_integers(
    engines: Callable[[str], Path],
) -> None:
    engine = load(engines("cpu(freeze=true)"))
    kept = {str(tensor.dtype): name for name, tensor in engine.tensors.items() if "." in name}
    assert set(kept) == {"torch.int8", "torch.uint8", "torch.float32"}
    assert not [name for name in engine.tensors if "weight" in name]


@needs_integers
def test_packing_counts_layers_on_floats_too(engines: Callable[[str], Path]) -> None:
    engine = load(engines("cpu(pack=true)"))
    assert engine.manifest["components"]["one"]["layers"] == {"int8": 1, "float": 1}
    targets = Counter(row["target"] for row in setup(engine)["nodes"])
    assert targets["mkldnn._reorder_linear_weight.default"] == 1


needs_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 on this CPU"
)


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)]
)
def test_products_are_packed_where_that_saves_time(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "_WORTH_PACKING", WORTH_PACKING)

    def make(make: Any, x: fx.Node) -> list[fx.Node]:
        large = make(aten.linear.default, x, parameter(256, 128).to(dtype))
        return [make(aten.linear.default, large, parameter(8, 256).to(dtype))]

    gm = body(make, randn(2, 64, 128).to(dtype))
    result, _ = lowered(gm, pack=True)
    counts = operators(result.bodies["body"])
    small = dtype == torch.float32
    assert counts["mkldnn._linear_pointwise"] == 2 - small
    assert counts["aten.linear"] == small


def test_packed_convolutions_of_pixels_are_products_in_the_channels_last_layout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def make(make: Any, x: fx.Node) -> list[fx.Node]:
        y = make(aten.conv2d.default, x, parameter(8, 4, 3, 3), None, [1, 1], [1, 1])
        pixels = make(aten.conv2d.default, y, parameter(8, 8, 1, 1), parameter(8))
        strided = make(aten.conv2d.default, y, parameter(8, 8, 1, 1), None, [2, 2])
        grouped = make(aten.conv2d.default, y, parameter(8, 4, 1, 1), None, [1], [0], [1], 2)
        return [make(aten.silu.default, pixels), strided, grouped]

    x = randn(2, 4, 6, 7)
    gm = body(make, x)
    for worth, product in ((0, "mkldnn._linear_pointwise"), (WORTH_PACKING, "aten.linear")):
        monkeypatch.setattr(onednn, "_WORTH_PACKING", worth)
        result, further = lowered(gm, pack=True)
        library = result.bodies["body"]
        counts = operators(library)
        assert (counts["mkldnn._convolution_pointwise"], counts[product]) == (3, 1)
        assert counts["aten.convolution"] == counts["aten.conv2d"] == 0
        for got, expected in zip(library(x, *further), gm(x), strict=True):
            torch.testing.assert_close(got, expected, **TIGHT)
    run = compiled(library, further)
    for got, expected in zip(run([x]), gm(x), strict=True):
        torch.testing.assert_close(got, expected, **TIGHT)
        assert got.stride() == expected.stride()


def test_convolutions_whose_weights_are_packed_in_every_call() -> None:
    def make(make: Any, x: fx.Node) -> list[fx.Node]:
        y = make(aten.conv2d.default, x, parameter(4, 4, 3, 3).to(dtype))
        return [make(aten.linear.default, y, parameter(5, 5).to(dtype))]

    for dtype, count in ((torch.float32, 0), (torch.bfloat16, 1)):
        gm = body(make, randn(1, 4, 6, 7).to(dtype))
        assert cpu._narrow_convolutions({"vae": gm}) == count


def test_kernels_on_integers_are_in_what_onednn_says(engines: Callable[[str], Path]) -> None:
    """Assert what docs/engine.md says how to see."""
    if cpu._lack():
        pytest.skip("no kernels for integers here")
    code = (
        "import sys, diffopt\n"
        "from tests.targets.test_cpu_int8 import steps\n"
        "diffopt.load(sys.argv[1]).run(steps().sample)\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, str(engines("cpu"))],
        cwd=ROOT,
        env={**os.environ, "ONEDNN_VERBOSE": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    lines = [line for line in said.splitlines() if "exec,cpu" in line]
    products = [line for line in lines if "src:u8" in line and "wei:s8" in line]
    assert len([line for line in products if ",matmul," in line]) == 3
    assert len([line for line in products if ",convolution," in line]) == 1
    # Its reference kernels take hundreds of times as long.
    assert not [line for line in products if ",ref" in line]


# What it depends on, and what it refuses


def test_what_kernels_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(gm: fx.GraphModule, **options: Any) -> dict[str, Any]:
        return Cpu()._key(lowered(gm, **options)[0].bodies["body"])

    plain = key(layers("static"))
    assert key(layers("static")) == plain
    assert key(layers("dynamic")) != plain
    assert key(layers("static"), lack="nothing") != plain
    other = layers("static")
    other.get_buffer("weight_int8").mul_(-1)
    assert key(other) == plain  # packed on loading
    monkeypatch.setattr(onednn, "__file__", __file__)
    cpu._source.cache_clear()
    changed = key(layers("static"))
    cpu._source.cache_clear()
    assert changed != plain


def test_fp8_inputs_are_refused(tmp_path: Path) -> None:
    def make(make: Any, *inputs: fx.Node) -> fx.Node:
        builder = LayerBuilder(make, *inputs)
        x = builder.quantize(builder.rows, "dynamic", "fp8")
        result: fx.Node = make(aten.linear.default, x, builder.weight(6, 8, number="fp8"))
        return result

    gm = body(make, *SAMPLES)
    (node,) = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    refused = program(lambda m, *xs: m.call("body", *xs)[0], *SAMPLES, body=gm)
    with pytest.raises(DiffoptError) as caught:
        build(refused, "cpu", tmp_path / "x")
    assert str(caught.value) == (
        f"target cpu cannot take this program: in body the input of {node.name} is in fp8, and"
        " cpu has no fp8 products: they need a GPU of compute capability 8.9; quantize activations"
        " to int8, or weights alone"
    )


def test_pack_or_freeze() -> None:
    with pytest.raises(DiffoptError, match="choose one"):
        Cpu(pack=True, freeze=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["avx2"], "this CPU has no products of 8-bit integers (AVX-VNNI or AMX)"),
        (["avx2", "avx512_vnni"], None),
    ],
)
def test_cpus_without_products_of_integers(
    flags: list[str], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_instructions, "instructions", lambda: frozenset(flags))
    assert cpu._lack() == message
