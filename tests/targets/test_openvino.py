"""OpenVINO: what the program gives, in the program's types, weights stored once, refusals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from torch import Tensor, fx

from diffopt.engine.engine import build, load
from diffopt.errors import DiffoptError
from diffopt.ir.program import Program
from diffopt.lowering import openvino_models
from diffopt.lowering.target import parse_target
from diffopt.targets.openvino import Openvino
from tests.passes.build import body, parameter, randn
from tests.passes.build import program as written
from tests.sampler import check_images, program
from tests.targets.test_cpu_int8 import LAYERS, SAMPLES, TIGHT, layers
from tests.targets.test_onnxruntime import one_body

aten = torch.ops.aten

BF16 = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")

pytestmark = pytest.mark.usefixtures("session_cache")


def models(path: Path) -> dict[str, ov.Model]:
    """Return the models in an engine by component."""
    archive = load(path)._file.archive
    names = [n.removesuffix(".xml") for n in archive.names("kernels/") if n.endswith(".xml")]
    return {
        Path(name).name: ov.Core().read_model(
            bytes(archive.read(f"{name}.xml")),
            ov.Tensor(np.frombuffer(archive.read(f"{name}.bin"), np.uint8)),
        )
        for name in names
    }


def kernels(function: Any) -> set[tuple[str, str]]:
    """Return the kinds of kernels that a component runs, each with the type of its products."""
    model = function._request.get_compiled_model().get_runtime_model()
    infos = [node.get_rt_info() for node in model.get_ops()]
    return {(str(i["layerType"].value), str(i["runtimePrecision"].value)) for i in infos}


# What it computes


@pytest.mark.parametrize("text", ["openvino", "cpu:openvino", "openvino(threads=2)"])
def test_engine_gives_what_the_program_gives(
    text: str, captured: Program, engines: Callable[[str], Path]
) -> None:
    check_images(load(engines(text)), captured)


def test_engine_says_what_it_needs_and_holds(engines: Callable[[str], Path]) -> None:
    manifest = load(engines("openvino")).manifest
    assert manifest["target"] == "openvino"
    assert manifest["requires"] == {"openvino": ".".join(ov.__version__.split(".")[:2])}
    assert manifest["components"] == {"unet": {"kernel": "unet.xml"}, "vae": {"kernel": "vae.xml"}}
    assert not manifest["holds_weights"]


def test_models_hold_no_weights(engines: Callable[[str], Path]) -> None:
    for model in models(engines("openvino")).values():
        constants = [n for n in model.get_ops() if n.get_type_name() == "Constant"]
        assert all(n.output(0).get_shape().to_string().count(",") < 2 for n in constants)
    names = {p.get_friendly_name() for p in models(engines("openvino"))["unet"].get_parameters()}
    assert "first_weight" in names
    assert "unet.first_weight" in load(engines("openvino")).tensors


def test_the_same_program_is_the_same_file(
    engines: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = engines("openvino").read_bytes()
    monkeypatch.setenv("DIFFOPT_CACHE", str(tmp_path / "empty"))
    assert build(program(), "openvino", tmp_path / "fresh").path.read_bytes() == first


def test_results_outlive_the_next_run(engines: Callable[[str], Path]) -> None:
    opened = load(engines("openvino"))
    first = opened(seed=0)["images"]
    kept = first.clone()
    assert not torch.equal(opened(seed=1)["images"], kept)
    assert torch.equal(first, kept)


def test_every_type_goes_in_and_out(tmp_path: Path) -> None:
    def make(make: Any, x: fx.Node, flag: fx.Node, count: fx.Node, unread: fx.Node) -> list[Any]:
        half = make(aten._to_copy.default, x, dtype=torch.bfloat16)
        return [
            make(aten.logical_not.default, flag),
            make(aten.add.Tensor, count, 1),
            make(aten.mul.Tensor, half, 2.0),
            make(aten.permute.default, make(aten.relu.default, x), [1, 0]),
        ]

    samples = randn(2, 3), torch.tensor([True, False]), torch.tensor(7), torch.zeros(3)
    gm = body(make, *samples)
    outputs = build(one_body(gm, *samples), "openvino", tmp_path / "x").run(samples)
    for result, expected in zip(outputs, gm(*samples), strict=True):
        assert result.dtype == expected.dtype
        assert result.stride() == expected.stride()
        assert torch.equal(result, expected)


# Types


def narrow(dtype: torch.dtype) -> tuple[fx.GraphModule, Tensor]:
    """Return a component with a product in a type, a softmax in float32, and its input."""
    weight = parameter(64, 64).to(dtype)

    def make(make: Any, x: fx.Node, weight: Tensor = weight) -> fx.Node:
        x = make(aten.linear.default, x, weight)
        x = make(aten._to_copy.default, x, dtype=torch.float32)
        result: fx.Node = make(aten._softmax.default, x, -1, False)
        return result

    x = randn(8, 64).to(dtype)
    return body(make, x), x


@pytest.mark.skipif(not BF16, reason="this CPU has no bfloat16")
def test_bfloat16_is_computed_where_the_program_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = []

    class Session(openvino_models.Session):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            sessions.append(self)

    monkeypatch.setattr(openvino_models, "Session", Session)
    gm, x = narrow(torch.bfloat16)
    built = build(one_body(gm, x), "openvino", tmp_path / "x")
    torch.testing.assert_close(built.run([x])[0], gm(x)[0], atol=1e-3, rtol=1e-2)
    assert {("FullyConnected", "bf16"), ("Softmax", "f32")} <= kernels(sessions[-1])
    assert not [record for record in caplog.records if record.name == "diffopt"]


def test_float32_is_not_rounded_to_bfloat16(tmp_path: Path) -> None:
    gm, x = narrow(torch.float32)
    built = build(one_body(gm, x), "openvino", tmp_path / "x")
    torch.testing.assert_close(built.run([x])[0], gm(x)[0], atol=1e-6, rtol=1e-5)


def test_a_type_without_kernels_is_said_to_be_widened(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gm, x = narrow(torch.float64)
    built = build(one_body(gm, x), "openvino", tmp_path / "x")
    assert built.manifest["components"]["part"]["computes"] == "float32"
    assert [record.getMessage() for record in caplog.records if record.name == "diffopt"] == [
        "OpenVINO has no kernels for double on this device; computed in float32"
    ]
    torch.testing.assert_close(built.run([x])[0], gm(x)[0], atol=1e-6, rtol=1e-5)


def test_whole_numbers_of_more_than_32_bits_are_refused(tmp_path: Path) -> None:
    def make(make: Any, x: fx.Node) -> fx.Node:
        table = make.weight(torch.tensor([1 << 40, 2]), "table")
        total: fx.Node = make(aten.add.Tensor, x, table)
        return total

    x = torch.tensor([1, 2])
    with pytest.raises(DiffoptError) as caught:
        build(one_body(body(make, x), x), "openvino", tmp_path / "x")
    assert str(caught.value) == (
        "part: table has whole numbers of more than 32 bits, in which OpenVINO computes; use"
        " another target"
    )


# Quantized layers


def test_quantized_layers_give_what_the_graph_gives(tmp_path: Path) -> None:
    gm = layers(*LAYERS)
    outputs = build(one_body(gm, *SAMPLES), "openvino", tmp_path / "x").run(SAMPLES)
    for name, output, expected in zip(LAYERS, outputs, gm(*SAMPLES), strict=True):
        torch.testing.assert_close(
            output, expected, **TIGHT, msg=lambda text, n=name: f"{n}: {text}"
        )


# What it refuses


def test_options_print_and_parse() -> None:
    for target in (Openvino(), Openvino(threads=2)):
        assert parse_target(str(target)) == target
    assert str(parse_target("cpu:openvino(threads=2)")) == "cpu:openvino(threads=2)"
    with pytest.raises(DiffoptError) as caught:
        parse_target("openvino(threads=-1)")
    assert str(caught.value).splitlines()[0] == "threads=-1: wants 0 or more"


@pytest.mark.parametrize(("device", "name"), [("arc-a770", "GPU"), ("npu", "NPU")])
def test_a_device_that_is_not_here(
    device: str, name: str, captured: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_models, "devices", lambda: ["CPU"])
    with pytest.raises(DiffoptError) as caught:
        build(captured, f"{device}:openvino", tmp_path / "x")
    assert str(caught.value) == (
        f"target {device}:openvino cannot take this program: OpenVINO finds no {name} on this"
        " machine, but CPU"
    )


def test_an_operator_that_openvino_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model have an operator of ONNX that OpenVINO does not know."""
    from diffopt.lowering.onnx import gs_tools

    before = gs_tools.with_weights_as_inputs

    def with_unknown_operator(model: Any) -> Any:
        result = before(model)
        result.graph.node[0].op_type = "Optional"
        return result

    monkeypatch.setattr(gs_tools, "with_weights_as_inputs", with_unknown_operator)
    gm, x = narrow(torch.float32)
    with pytest.raises(DiffoptError, match=r"^part: OpenVINO [\d.]+ lacks Optional-21; use"):
        build(one_body(gm, x), "openvino", tmp_path / "x")


def test_parts_of_one_program_share_weights(tmp_path: Path) -> None:
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
    opened = build(written(root, x, **parts), "openvino", tmp_path / "x")
    assert [name for name in opened.tensors if name.endswith("shared")] == ["one.shared"]
    torch.testing.assert_close(opened.run([x])[0], parts["other"](*parts["one"](x))[0])


def test_copies_of_arguments_and_weights_live_long_enough(tmp_path: Path) -> None:
    """Run with many values that are not in row-major order, and so are copied."""
    weight = parameter(64, 64).t()

    def make(make: Any, *xs: fx.Node) -> list[fx.Node]:
        w = make.weight(weight, "weight")
        return [make(aten.linear.default, x, w) for x in xs]

    samples = [torch.randn(64, 64).t() for _ in range(16)]
    gm = body(make, *samples)
    opened = build(one_body(gm, *samples), "openvino", tmp_path / "x")
    for result, expected in zip(opened.run(samples), gm(*samples), strict=True):
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-5)
