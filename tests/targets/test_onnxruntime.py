"""ONNX Runtime: what the program gives, integer kernels, weights stored once, refusals."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, fx

from diffopt.engine.engine import build, load
from diffopt.errors import DiffoptError
from diffopt.ir import qdq
from diffopt.ir.program import Program
from diffopt.lowering import cpu_instructions
from diffopt.lowering.onnx import sessions
from diffopt.lowering.target import parse_target
from diffopt.targets import onnxruntime
from diffopt.targets.onnxruntime import Onnxruntime
from tests.passes.build import body, parameter, randn
from tests.passes.build import program as written
from tests.quantized import pack
from tests.sampler import check_images, program
from tests.targets.test_cpu_int8 import LAYERS, SAMPLES, TIGHT, layers

aten = torch.ops.aten


pytestmark = pytest.mark.usefixtures("session_cache")


def one_body(gm: fx.GraphModule, *samples: Tensor) -> Program:
    """Return a program that calls one component on its inputs."""

    def root(make: Any, *inputs: fx.Node) -> list[fx.Node]:
        results: list[fx.Node] = make.call("part", *inputs)
        return results

    return written(root, *samples, part=gm)


def models(path: Path) -> dict[str, onnx.ModelProto]:
    """Return the models in an engine by the name of their member."""
    archive = load(path)._file.archive
    names = [name for name in archive.names("kernels/") if name.endswith(".onnx")]
    return {n: onnx.load_from_string(bytes(archive.read(n))) for n in names}


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


# What it computes


@pytest.mark.parametrize("text", ["onnxruntime", "onnxruntime(pack=false,threads=2)"])
def test_engine_gives_what_the_program_gives(
    text: str, captured: Program, engines: Callable[[str], Path]
) -> None:
    check_images(load(engines(text)), captured)


def test_engine_says_what_it_needs_and_holds(engines: Callable[[str], Path]) -> None:
    manifest = load(engines("onnxruntime")).manifest
    assert manifest["target"] == "onnxruntime"
    assert manifest["requires"] == {"onnxruntime": ".".join(ort.__version__.split(".")[:2])}
    assert manifest["components"] == {
        "unet": {"kernel": "unet.onnx"},
        "vae": {"kernel": "vae.onnx"},
    }
    assert not manifest["holds_weights"]


def test_models_hold_no_weights(engines: Callable[[str], Path]) -> None:
    opened = load(engines("onnxruntime"))
    for model in models(engines("onnxruntime")).values():
        inside = [t for t in model.graph.initializer if t.data_location != t.EXTERNAL]
        assert all(len(t.dims) <= 1 for t in inside), [t.name for t in inside]
    assert "unet.first_weight" in opened.tensors


def test_the_graphs_of_an_engine_run_without_its_models(
    captured: Program, engines: Callable[[str], Path]
) -> None:
    opened = load(engines("onnxruntime"), target="eager")
    assert torch.equal(opened(seed=0)["images"], captured(seed=0)["images"])


def test_the_same_program_is_the_same_file(
    engines: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = engines("onnxruntime").read_bytes()
    cached = build(program(), "onnxruntime", tmp_path / "cached").path
    monkeypatch.setenv("DIFFOPT_CACHE", str(tmp_path / "empty"))
    fresh = build(program(), "onnxruntime", tmp_path / "fresh").path
    assert cached.read_bytes() == fresh.read_bytes() == first


def test_other_weights_need_no_other_models(
    engines: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_export(*args: Any, **options: Any) -> Any:
        raise AssertionError("exported")

    engines("onnxruntime")
    monkeypatch.setattr("diffopt.lowering.onnx.component_models.export", no_export)
    changed = program()
    for tensor in changed.weights().values():
        tensor.mul_(0.5)
    opened = build(changed, "onnxruntime", tmp_path / "x")
    torch.testing.assert_close(
        opened(seed=0)["images"], changed(seed=0)["images"], atol=1e-6, rtol=1e-5
    )


def test_components_read_one_memory_where_nothing_is_packed(
    captured: Program, engines: Callable[[str], Path]
) -> None:
    opened = load(engines("onnxruntime(pack=false)"))
    before = opened(seed=0)["images"]
    opened.tensors["unet.first_bias"].add_(1.0)
    changed = program()
    changed.components["unet"].first_bias.add_(1.0)
    expected = changed(seed=0)["images"]
    assert not torch.equal(expected, before)
    torch.testing.assert_close(opened(seed=0)["images"], expected, atol=1e-6, rtol=1e-5)


def test_every_type_goes_in_and_out(tmp_path: Path) -> None:
    def make(make: Any, x: fx.Node, flag: fx.Node, count: fx.Node) -> list[fx.Node]:
        half = make(aten._to_copy.default, x, dtype=torch.bfloat16)
        return [
            make(aten.logical_not.default, flag),
            make(aten.add.Tensor, count, 1),
            make(aten.mul.Tensor, half, 2.0),
            make(aten.permute.default, make(aten.relu.default, x), [1, 0]),
        ]

    samples = randn(2, 3), torch.tensor([True, False]), torch.tensor(7)
    gm = body(make, *samples)
    outputs = build(one_body(gm, *samples), "onnxruntime", tmp_path / "x").run(samples)
    for result, expected in zip(outputs, gm(*samples), strict=True):
        assert result.dtype == expected.dtype
        assert result.stride() == expected.stride()
        assert torch.equal(result, expected)


# 16 bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_computed_in_32(
    dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weight = parameter(8, 8).to(dtype)

    def make(make: Any, x: fx.Node, weight: Tensor = weight) -> list[fx.Node]:
        x = make(aten.linear.default, x, weight)
        x = make(aten.layer_norm.default, x, [8])
        return [x, make(aten.linear.default, x, weight)]

    x = randn(2, 8).to(dtype)
    gm = body(make, x)
    opened = build(one_body(gm, x), "onnxruntime", tmp_path / "x")
    assert opened.manifest["components"]["part"]["computes"] == "float32"
    assert [record.getMessage() for record in caplog.records if record.name == "diffopt"] == [
        "part: ONNX Runtime's CPU provider has no kernels for 16 bits; computed in float32"
    ]
    assert [t.dtype for n, t in opened.tensors.items() if "weight" in n or "constant" in n] == [
        dtype
    ]
    wide = body(lambda m, x: make(m, x, weight.float()), x.float())
    for output, expected in zip(opened.run([x]), wide(x.float()), strict=True):
        assert output.dtype == dtype
        eps = torch.finfo(dtype).eps  # the last bit of a result
        torch.testing.assert_close(output.float(), expected, atol=eps, rtol=eps)


# Quantized layers


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine with a layer of every kind."""
    path = tmp_path_factory.mktemp("quantized") / "x.engine"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFOPT_CACHE", str(path.with_name("cache")))
        build(one_body(layers(*KINDS), *SAMPLES), "onnxruntime", path)
    return path


# Kernels for convolutions on integers are taken where they are exact.
EXACT = not cpu_instructions.saturates()
CONVOLUTIONS = ("convolution", "strided in groups", "convolution, silu", "one axis")


def kind(name: str) -> str:
    """Return what a layer runs on here."""
    return "float" if name in CONVOLUTIONS and not EXACT else LAYERS[name][0]


# Without those that are equal to another: a model has equal nodes once.
KINDS = [name for name in LAYERS if name not in ("rows, gelu", "static, gelu")]


def test_quantized_layers_give_what_the_graph_gives(quantized: Path) -> None:
    results = zip(KINDS, load(quantized).run(SAMPLES), layers(*KINDS)(*SAMPLES), strict=True)
    for name, output, expected in results:
        torch.testing.assert_close(
            output, expected, **TIGHT, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_the_manifest_says_which_layers_run_on_integers(quantized: Path) -> None:
    counts = Counter(map(kind, KINDS))
    assert load(quantized).manifest["components"]["part"]["layers"] == dict(counts)


def test_integer_kernels_are_in_the_profile(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Assert what docs/targets.md says how to see."""
    before = sessions.options

    def profiling(*args: Any, **options: Any) -> ort.SessionOptions:
        session_options = before(*args, **options)
        session_options.enable_profiling = True
        session_options.profile_file_prefix = str(tmp_path / "profile")
        return session_options

    monkeypatch.setattr(sessions, "options", profiling)
    opened = load(quantized)
    opened.run(SAMPLES)
    del opened  # the profile is written when the session ends
    ran: Counter[str] = Counter()
    for path in tmp_path.glob("profile*"):
        events = json.loads(path.read_text())
        ran.update(e["args"]["op_name"] for e in events if e["name"].endswith("_kernel_time"))
    expected = operators(models(quantized)["kernels/part.onnx"])
    assert ran["MatMulIntegerToFloat"] == expected["MatMulIntegerToFloat"] == 7
    assert ran["ConvInteger"] == expected["ConvInteger"] == 4 * EXACT
    assert ran["DynamicQuantizeLinear"] == 1


@pytest.mark.skipif(not EXACT, reason="no convolution runs on integers on this CPU")
def test_a_file_with_integer_convolutions_is_refused_where_they_saturate(
    quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "saturates", lambda: True)
    with pytest.raises(DiffoptError, match="convolutions on integers need a CPU with AVX-VNNI"):
        load(quantized).run(SAMPLES)


def test_convolutions_run_on_floats_where_integers_saturate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "saturates", lambda: True)
    engine = build(one_body(layers("convolution"), *SAMPLES), "onnxruntime", tmp_path / "x")
    assert engine.manifest["components"]["part"]["layers"] == {"float": 1}
    torch.testing.assert_close(engine.run(SAMPLES)[0], layers("convolution")(*SAMPLES)[0], **TIGHT)


def test_integers_are_of_the_types_with_fast_kernels(quantized: Path) -> None:
    model = onnx.shape_inference.infer_shapes(models(quantized)["kernels/part.onnx"])
    values = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    values |= {t.name: t.data_type for t in model.graph.initializer}
    unsigned, signed = onnx.TensorProto.UINT8, onnx.TensorProto.INT8
    for node in model.graph.node:
        types = tuple(values.get(name) for name in node.input[:2])
        if node.op_type == "MatMulIntegerToFloat":
            assert types == (unsigned, signed)
        elif node.op_type == "ConvInteger":
            assert types == (signed, unsigned)


def test_weights_of_4_bits_alone_stay_so(tmp_path: Path) -> None:
    weight = pack(parameter(16, 64) * 0.1, "int4", 32)

    def make(make: Any, x: fx.Node) -> fx.Node:
        w = qdq.place_weight(make.gm, "weight", weight, torch.float32)
        linear: fx.Node = make(aten.linear.default, x, w, parameter(16))
        return linear

    x = randn(3, 5, 64)
    gm = body(make, x)
    opened = build(one_body(gm, x), "onnxruntime", tmp_path / "x")
    assert opened.manifest["components"]["part"]["layers"] == {"int4": 1}
    model = models(opened.path)["kernels/part.onnx"]
    assert operators(model) == {"MatMulNBits": 1, "Add": 1}
    torch.testing.assert_close(opened.run([x])[0], gm(x)[0], **TIGHT)


def test_what_follows_from_weights_is_computed_once_for_all(tmp_path: Path) -> None:
    weight = parameter(8, 8)

    def make(make: Any, x: fx.Node) -> fx.Node:
        linear: fx.Node = make(aten.linear.default, x, make.weight(weight, "shared"))
        return linear

    def root(make: Any, x: fx.Node) -> fx.Node:
        (y,) = make.call("one", x)
        (z,) = make.call("other", y)
        return z

    x = randn(2, 3, 8)
    parts = {"one": body(make, x), "other": body(make, x, name="other")}
    opened = build(written(root, x, **parts), "onnxruntime", tmp_path / "x")
    onnx_models = models(opened.path)
    assert operators(onnx_models["kernels/(setup).onnx"]) == {"Transpose": 1}
    assert operators(onnx_models["kernels/one.onnx"]) == {"MatMul": 1}
    torch.testing.assert_close(opened.run([x])[0], parts["other"](*parts["one"](x))[0])


# What it refuses


def test_wrong_options() -> None:
    with pytest.raises(DiffoptError) as caught:
        parse_target("onnxruntime(threads=-1)")
    assert str(caught.value).splitlines()[0] == "threads=-1: wants 0 or more"


def test_options_print_and_parse() -> None:
    for target in (Onnxruntime(), Onnxruntime(threads=2, pack=False)):
        assert parse_target(str(target)) == target
    assert str(Onnxruntime(threads=2, pack=False)) == "onnxruntime(threads=2,pack=false)"


def test_fp8_inputs_are_refused(tmp_path: Path) -> None:
    def make(make: Any, x: fx.Node) -> fx.Node:
        x = qdq.quantize(make.gm, x, "dynamic", number="fp8")
        weight = qdq.place_weight(make.gm, "weight", pack(parameter(4, 8), "fp8"), torch.float32)
        linear: fx.Node = make(aten.linear.default, x, weight)
        return linear

    x = randn(2, 8)
    with pytest.raises(DiffoptError) as caught:
        build(one_body(body(make, x), x), "onnxruntime", tmp_path / "x")
    assert str(caught.value) == (
        "target onnxruntime cannot take this program: in part the input of linear_default is in"
        " fp8, and cpu has no fp8 products: they need a GPU of compute capability 8.9; quantize"
        " activations to int8, or weights alone"
    )
