"""The target `cuda`: what is done without a GPU, and, with the CPU in its place, the rest."""

import gc
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch.multiprocessing.reductions import StorageWeakRef

import diffopt
from diffopt.core import Pipeline, Progress
from diffopt.engine import engine
from diffopt.engine.engine_file import KIND
from diffopt.errors import DiffoptError
from diffopt.ir import graph as g
from diffopt.ir.program import Program
from diffopt.lowering import aoti, cuda_runtime, device_compilation
from diffopt.lowering.hardware import hardware, hardware_names
from diffopt.lowering.target import EngineContents, Finished
from diffopt.storage.container import Archive
from diffopt.targets.cuda import Cuda
from tests.command import Run
from tests.passes.build import Builder, body, parameter, randn
from tests.quantized import steps
from tests.sampler import denoiser
from tests.standin import replace_gpu
from tests.zoo import traced

aten = torch.ops.aten

pytestmark = pytest.mark.usefixtures("session_cache")

PLAIN = "h100(cuda-graph=false)"
"""The CPU has no CUDA graphs."""


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    """Put the CPU in the place of a GPU of this compute capability."""
    replace_gpu(monkeypatch)
    monkeypatch.setattr(cuda_runtime, "capability", lambda: capability)


def archive(path: Path) -> Archive:
    return Archive(path, KIND, "an engine file", "")


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory, captured: Program) -> Path:
    """Return an engine for a GPU that was built without one."""
    path = tmp_path_factory.mktemp("cuda") / "x.engine"
    diffopt.write(captured, PLAIN, path)
    return path


def expected(program: Program) -> list[torch.Tensor]:
    return program.run(program.sample_inputs())


def sums(weight: torch.Tensor) -> fx.GraphModule:
    """Return a component that adds a weight to its argument."""
    return body(lambda b, x: b(aten.add.Tensor, x, weight), weight)


# Without a GPU


def test_an_engine_is_written_as_far_as_it_goes_without_the_gpu(unfinished: Path) -> None:
    manifest = archive(unfinished).manifest
    assert manifest["target"] == PLAIN
    assert manifest["finished"] is False
    assert manifest["requires"]["device"] == "h100"
    assert manifest["requires"]["capability"] == [9, 0]
    names = {name for name in manifest["members"] if name.startswith("kernels/")}
    assert names == {"kernels/unet.json", "kernels/vae.json"}


def test_it_does_not_load_and_says_why(unfinished: Path, diffopt: Run) -> None:
    wanted = (
        f"{unfinished}: its kernels need a GPU of compute capability 9.0 (h100), and torch finds"
        ' none here; build it again for this machine, or load it with target="eager"'
    )
    with pytest.raises(DiffoptError) as error:
        engine.load(unfinished)
    assert str(error.value) == wanted
    before = unfinished.read_bytes()
    outcome = diffopt("finish", unfinished)
    assert outcome.code == 2
    assert outcome.err == f"diffopt: error: {wanted}\n"
    assert unfinished.read_bytes() == before


def test_eager_runs_it_anywhere(unfinished: Path, captured: Program) -> None:
    opened = engine.load(unfinished, target="eager")
    for output, other in zip(opened.run(captured.sample_inputs()), expected(captured), strict=True):
        torch.testing.assert_close(output, other)


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_whole_pipelines_are_lowered_without_a_gpu(name: str, tmp_path: Path) -> None:
    program = traced(name)
    diffopt.write(program, "rtx4090", tmp_path / "x.engine")
    manifest = archive(tmp_path / "x.engine").manifest
    assert set(manifest["components"]) == set(program.components)


def test_a_moved_graph_views_what_is_laid_out_otherwise_and_returns_what_it_did() -> None:
    weight, x = parameter(16, 4, 3, 3), randn(2, 4, 8, 8)

    def make(b: Builder, x: fx.Node) -> list[fx.Node]:
        convolved = b(aten.conv2d.default, x, weight, None, [1, 1], [1, 1])
        return [convolved, b(aten.view.default, convolved, [2, -1])]

    gm = body(make, x)
    expected = gm(x)
    channels_last = weight.contiguous(memory_format=torch.channels_last)
    gm.register_parameter("weight", torch.nn.Parameter(channels_last, requires_grad=False))
    device_compilation.move_to_device(gm, "cpu")
    for output, other in zip(gm(x), expected, strict=True):
        torch.testing.assert_close(output, other, check_stride=True)


# With the CPU in the GPU's place


def test_a_component_is_compiled_for_where_its_tensors_are() -> None:
    gm = sums(randn(64))
    (x,) = g.placeholders(gm)
    with g.FAKE_MODE:
        x.meta["val"] = torch.empty(64, device="meta")  # it was captured elsewhere
    run, _ = aoti.open_package(aoti.compile_package(gm, {}, None, "cpu"), None)
    assert torch.equal(run([torch.ones(64)])[0], randn(64) + 1)


def test_weights_are_freed_with_the_kernel() -> None:
    settings = {"aot_inductor.package_constants_in_so": False, "always_keep_tensor_constants": True}
    package = aoti.compile_package(sums(randn(64)), settings, None, "cpu")
    weight = randn(64)
    memory = StorageWeakRef(weight.untyped_storage())
    kernel = aoti.LibraryFunction(
        aoti.open_package(package, {"constant": weight}.__getitem__), [None]
    )
    weight.mul_(2)  # the library reads it in place
    del weight
    assert torch.equal(kernel([torch.ones(64)])[0], 2 * randn(64) + 1)
    del kernel
    gc.collect()
    assert memory.expired()


def test_what_outlives_a_compilation_writes_nothing_where_that_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def look(*_: Any) -> None:
        raise KeyError(os.environ.get("TMPDIR"))

    monkeypatch.setattr(aoti, "_compile", look)
    before = os.environ.get("TMPDIR")
    with pytest.raises(KeyError) as error:
        aoti.compile_package(sums(randn(2)), {}, None, "cpu")
    assert error.value.args == (before,)


def test_the_first_load_compiles_and_the_next_takes_that_from_the_cache(
    unfinished: Path, captured: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(monkeypatch)
    before = unfinished.read_bytes()
    for _ in range(2):
        opened = engine.load(unfinished)
        results = opened.run(captured.sample_inputs())
        for output, other in zip(results, expected(captured), strict=True):
            torch.testing.assert_close(output, other)
        monkeypatch.setattr(aoti, "compile_package", None)
    assert unfinished.read_bytes() == before


def test_finish_keeps_what_is_compiled(
    unfinished: Path,
    captured: Program,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    diffopt: Run,
) -> None:
    gpu(monkeypatch)
    output = tmp_path / "done.engine"
    assert diffopt("finish", unfinished, "-o", output).code == 0
    kept = archive(output)
    kept.verify()
    assert kept.manifest["finished"] is True
    assert {"kernels/unet.pt2", "kernels/vae.pt2"} <= kept.manifest["members"].keys()
    assert diffopt("finish", output).out == f"{output}: has nothing left to compile\n"
    monkeypatch.setattr(Cuda, "finish", None)
    results = engine.load(output).run(captured.sample_inputs())
    for result, other in zip(results, expected(captured), strict=True):
        torch.testing.assert_close(result, other)


def test_where_there_is_the_gpu_the_engine_is_whole(
    captured: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu(monkeypatch)
    diffopt.write(captured, PLAIN, tmp_path / "x.engine", compress=3)
    assert archive(tmp_path / "x.engine").manifest["finished"] is True
    assert not diffopt.finish(tmp_path / "x.engine")


def test_kernels_of_another_torch_are_compiled_again(
    captured: Program,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gpu(monkeypatch)
    path = tmp_path / "x.engine"
    diffopt.write(captured, PLAIN, path)
    compiled: list[str] = []

    def compile_again(self: Cuda, image: EngineContents, progress: Progress) -> Finished:
        compiled.append(torch.__version__)
        return Finished({name: bytes(content) for name, content in image.members.items()})

    monkeypatch.setattr(Cuda, "finish", compile_again)
    with caplog.at_level(logging.WARNING, "diffopt"):
        engine.load(path)
        assert not compiled
        assert not caplog.messages
        monkeypatch.setattr(torch, "__version__", "2.12.0")
        engine.load(path)
    assert compiled == ["2.12.0"]
    assert caplog.messages == [
        "compiling for this GPU and torch; `diffopt finish FILE` does it for good"
    ]


def test_what_was_finished_elsewhere_is_finished_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu(monkeypatch)
    path = tmp_path / "x.engine"
    diffopt.write(denoiser(), PLAIN, path)
    with monkeypatch.context() as other:
        other.setattr(Cuda, "compiler", lambda self: {"torch": "2.12", "gpu": "another"})
        assert diffopt.finish(path)
        assert not diffopt.finish(path)
    assert diffopt.finish(path)


def test_an_engine_for_another_gpu_does_not_load(
    unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(monkeypatch, (8, 9))
    with pytest.raises(
        DiffoptError, match=r"compute capability 9.0 \(h100\), and the one here has 8.9;"
    ):
        engine.load(unfinished)


def test_a_run_has_its_sizes_left_open(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu(monkeypatch)
    program = Pipeline.parse("batch(max=3)").run(denoiser())
    opened = diffopt.build(program, PLAIN, tmp_path / "x.engine")
    for count in (1, 3):
        inputs = program.sample_inputs(count)
        for output, other in zip(opened.run(inputs), program.run(inputs), strict=True):
            torch.testing.assert_close(output, other)


def test_convolutions_read_weights_channels_last(tmp_path: Path) -> None:
    program = traced("sd")
    strides = {}
    for wanted in ("true", "false"):
        path = tmp_path / f"{wanted}.engine"
        diffopt.write(program, f"h100(channels-last={wanted})", path)
        rows = {
            n: json.loads(bytes(archive(path).read(f"kernels/{n}.json")))
            for n in program.components
        }
        strides[wanted] = {n: row["strides"] for n, row in rows.items()}
    assert not any(strides["false"].values())
    unet = next(name for name in program.components if name.startswith("unet"))
    weights = dict(program.components[unet].named_parameters())
    channels_last = strides["true"][unet]
    assert channels_last
    for name, stride in channels_last.items():
        laid_out = torch.empty_strided(weights[name].shape, stride)
        assert laid_out.is_contiguous(memory_format=torch.channels_last)


def test_quantized_layers_are_products_of_integers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gpu(monkeypatch)
    program, path = steps(32), tmp_path / "x.engine"
    with caplog.at_level(logging.WARNING, "diffopt"):
        opened = diffopt.build(program, PLAIN, path)
    layers = {name: row.get("layers") for name, row in opened.manifest["components"].items()}
    assert layers == {"one": {"int8": 1}, "other": {"int8": 1, "float": 1}}
    (warning,) = caplog.messages
    assert warning.startswith("other: 1 ")
    inputs = program.sample_inputs()
    for output, exact in zip(opened.run(inputs), program.run(inputs), strict=True):
        torch.testing.assert_close(output, exact, atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("options", ["", "(attention=math)", "(max-autotune=true)"])
def test_on_a_gpu(options: str, tmp_path: Path, captured: Program) -> None:
    """Engines run on the GPU at hand, the third time from a CUDA graph."""
    known = {hardware(name).capability: name for name in hardware_names()}
    device = known.get(cuda_runtime.capability())
    if device is None:
        pytest.skip("no description has this GPU's compute capability")
    for program in (captured, steps(32), traced("sd"), traced("dit")):
        opened = diffopt.build(program, f"{device}{options}", tmp_path / "x.engine")
        inputs = program.sample_inputs()
        for _ in range(3):
            for output, exact in zip(opened.run(inputs), program.run(inputs), strict=True):
                torch.testing.assert_close(output.cpu(), exact, atol=2e-2, rtol=2e-2)
