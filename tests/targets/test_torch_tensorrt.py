"""The target `torch-tensorrt`: its calls, with a stand-in for the package and the CPU for a GPU.

The stand-in takes what torch_tensorrt 2.11 to 2.14 take alike, and answers as they do: a graph cut
into plans and the rest, a report, a package of AOTInductor. Its plans run on torch.
"""

import importlib.util
import inspect
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.fx.passes.split_module import split_module

import diffopt
from diffopt.core import Pipeline, Progress
from diffopt.engine import engine, engine_file
from diffopt.errors import DiffoptError
from diffopt.ir.program import Program
from diffopt.lowering import cuda_runtime, device_compilation
from diffopt.lowering.hardware import hardware, hardware_names
from diffopt.lowering.target import EngineContents, Finished, Target, parse_target
from diffopt.targets import torch_tensorrt
from diffopt.transforms.sparsity_2_4 import mask_2_4
from tests import sampler
from tests.command import Run
from tests.standin import replace_gpu

pytestmark = pytest.mark.usefixtures("session_cache")

aten = torch.ops.aten

TAKEN = (aten.linear.default, aten.mul.Tensor, aten.sigmoid.default)
"""What the stand-in has operators for: in the denoiser, all but the SiLU between two layers."""


class Argument:
    def __init__(
        self,
        *,
        dtype: torch.dtype,
        shape: tuple[int, ...] | None = None,
        min_shape: tuple[int, ...] | None = None,
        opt_shape: tuple[int, ...] | None = None,
        max_shape: tuple[int, ...] | None = None,
    ) -> None:
        self.dtype = dtype
        self.shape = (min_shape, opt_shape, max_shape) if shape is None else shape


class Plan(nn.Module):
    """Stands for a plan: not a graph that can be looked into."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.inside(*tensors)


SETTINGS = {
    "optimization_level",
    "workspace_size",
    "disable_tf32",
    "truncate_double",
    "attn_bias_is_causal",
    "sparse_weights",
}
"""Options of `compile` that the stand-in notes and does nothing with."""


class Library(ModuleType):
    """Stands for torch_tensorrt; notes the arguments of its calls."""

    __version__ = "2.13.0"
    Input = Argument

    def __init__(self) -> None:
        super().__init__("torch_tensorrt")
        self.dynamo = SimpleNamespace(compile=self.compile)
        self.compiled: list[dict[str, Any]] = []
        self.saved: list[dict[str, Any]] = []

    def compile(
        self,
        exported_program: torch.export.ExportedProgram,
        *,
        arg_inputs: Sequence[Argument],
        min_block_size: int = 5,
        **settings: Any,
    ) -> fx.GraphModule:
        assert settings.keys() <= SETTINGS
        self.compiled.append(
            {"arg_inputs": arg_inputs, "min_block_size": min_block_size, **settings}
        )
        gm = exported_program.module(check_guards=False)
        assert isinstance(gm, fx.GraphModule)
        runs: list[tuple[bool, list[fx.Node]]] = []
        for node in (n for n in gm.graph.nodes if n.op == "call_function"):
            if not runs or runs[-1][0] != (node.target in TAKEN):
                runs.append((node.target in TAKEN, []))
            runs[-1][1].append(node)
        runs = [(taken and len(nodes) >= min_block_size, nodes) for taken, nodes in runs]
        if not any(taken for taken, _ in runs):
            return gm
        parts = {node: index for index, (_, nodes) in enumerate(runs) for node in nodes}
        cut = split_module(gm, gm, parts.__getitem__)
        for index, (is_plan, nodes) in enumerate(runs):
            part = cut.get_submodule(f"submod_{index}")
            name = f"_run_on_{'acc' if is_plan else 'gpu'}_{index}"
            for node in cut.graph.find_nodes(op="call_module", target=f"submod_{index}"):
                node.target = name
            delattr(cut, f"submod_{index}")
            cut.add_module(name, Plan(part) if is_plan else part)
            if is_plan:
                report(f"TRT Engine #1 - {name}\n Number of Operators in Engine: {len(nodes)}\n")
        cut.recompile()
        return cut

    def save(
        self,
        module: fx.GraphModule,
        file_path: str,
        *,
        output_format: str,
        arg_inputs: Sequence[torch.Tensor],
        dynamic_shapes: Any = None,
        retrace: bool = True,
    ) -> None:
        options = {k: v for k, v in locals().items() if k not in ("self", "module", "file_path")}
        self.saved.append(options)
        shapes = dynamic_shapes
        exported = torch.export.export(module, tuple(arg_inputs), dynamic_shapes=shapes)
        torch._inductor.aoti_compile_and_package(exported, package_path=file_path)


def report(text: str) -> None:
    logging.getLogger("torch_tensorrt.dynamo._DryRunTracker").debug(text)


def replace(patch: pytest.MonkeyPatch) -> Library:
    """Put the CPU in the place of an H100, and the stand-in in that of the package."""
    replace_gpu(patch)
    patch.setattr(cuda_runtime, "capability", lambda: (9, 0))
    library = Library()
    patch.setitem(sys.modules, "torch_tensorrt", library)
    patch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.16.1"))
    return library


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    return replace(monkeypatch)


@dataclass
class HybridEngine:
    """An engine as it is written without the GPU, what `finish` makes of it, and how."""

    unfinished: Path
    finished: Path
    library: Library


@pytest.fixture(scope="module")
def hybrid(
    tmp_path_factory: pytest.TempPathFactory, captured: Program, cache: Path
) -> HybridEngine:
    folder = tmp_path_factory.mktemp("hybrid")
    unfinished, finished = folder / "unfinished.engine", folder / "finished.engine"
    engine.write(captured, target(min_block=1, level=2, workspace=3), unfinished)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFOPT_CACHE", str(cache))
        library = replace(patch)
        assert engine.finish(unfinished, finished)
    return HybridEngine(unfinished, finished, library)


def target(**options: object) -> str:
    text = ",".join(f"{key.replace('_', '-')}={value}" for key, value in options.items())
    return f"h100:torch-tensorrt({text})"


def components(path: Path) -> Mapping[str, Any]:
    about: Mapping[str, Any] = engine_file.EngineFile(path).manifest["components"]
    return about


def expect_close(opened: engine.Engine, program: Program, count: int | None = None) -> None:
    inputs = program.sample_inputs(count)
    for output, exact in zip(opened.run(inputs), program.run(inputs), strict=True):
        torch.testing.assert_close(output, exact)


def test_an_engine_is_written_as_far_as_it_goes_without_the_gpu(hybrid: HybridEngine) -> None:
    manifest = engine_file.EngineFile(hybrid.unfinished).manifest
    assert manifest["finished"] is False
    assert manifest["components"] == {"unet": {"kernel": "unet.pt2"}, "vae": {"kernel": "vae.pt2"}}
    with pytest.raises(
        DiffoptError, match=r"compute capability 9.0 \(h100\), and torch finds none"
    ):
        engine.load(hybrid.unfinished)


def test_a_finished_engine_says_which_operators_ran_where(hybrid: HybridEngine) -> None:
    manifest = engine_file.EngineFile(hybrid.finished).manifest
    assert manifest["finished"] is True
    assert manifest["components"] == {
        "unet": {
            "kernel": "unet.pt2",
            "tensorrt": {"plans": 2, "operators": 3},
            "torch": {"aten.silu": 1},
        },
        "vae": {
            "kernel": "vae.pt2",
            "tensorrt": {"plans": 1, "operators": 2},
            "torch": {"aten.reshape": 1},
        },
    }


def test_what_the_package_is_called_with(hybrid: HybridEngine) -> None:
    arguments = dict(hybrid.library.compiled[0])
    assert [(each.shape, each.dtype) for each in arguments.pop("arg_inputs")] == [
        ((2, 8), torch.float32),
        ((), torch.float32),
    ]
    assert arguments == {
        "min_block_size": 1,
        "optimization_level": 2,
        "workspace_size": 3 * 2**20,
        "disable_tf32": True,
        "truncate_double": False,
        "attn_bias_is_causal": False,
        "sparse_weights": False,
    }
    arguments = dict(hybrid.library.saved[0])
    assert [tensor.shape for tensor in arguments.pop("arg_inputs")] == [(2, 8), ()]
    assert arguments == {"output_format": "aot_inductor", "retrace": True, "dynamic_shapes": None}


def test_the_first_load_compiles_or_takes_that_from_the_cache(
    hybrid: HybridEngine, library: Library, captured: Program, caplog: pytest.LogCaptureFixture
) -> None:
    before = hybrid.unfinished.read_bytes()
    with caplog.at_level(logging.WARNING, "diffopt"):
        expect_close(engine.load(hybrid.finished), captured)
        assert not caplog.messages
        expect_close(engine.load(hybrid.unfinished), captured)
    assert caplog.messages == [
        "compiling for this GPU and torch; `diffopt finish FILE` does it for good"
    ]
    assert not library.compiled
    assert hybrid.unfinished.read_bytes() == before


def test_the_engine_keeps_its_weights(hybrid: HybridEngine, captured: Program) -> None:
    expect_close(engine.load(hybrid.finished, target="eager"), captured)


@pytest.mark.parametrize("name", ["torch_tensorrt", "tensorrt"])
def test_plans_of_another_version_are_compiled_again(
    name: str, hybrid: HybridEngine, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def finish(self: Target, image: EngineContents, progress: Progress) -> Finished:
        done.append(name)
        return Finished({member: bytes(content) for member, content in image.members.items()})

    monkeypatch.setattr(torch_tensorrt.TorchTensorrt, "finish", finish)
    engine.load(hybrid.finished)
    assert not done
    monkeypatch.setattr(sys.modules[name], "__version__", "10.16.2")
    engine.load(hybrid.finished)
    assert done == [name]


def test_what_tensorrt_has_nothing_of_runs_in_torch(library: Library, tmp_path: Path) -> None:
    captured = sampler.denoiser()
    opened = engine.build(captured, target(min_block=3), tmp_path / "x.engine")
    assert len(library.compiled) == 1
    assert not library.saved
    assert components(tmp_path / "x.engine")["unet"] == {
        "kernel": "unet.pt2",
        "tensorrt": {"plans": 0, "operators": 0},
        "torch": {"aten.linear": 2, "aten.silu": 1, "aten.mul.Tensor": 1},
    }
    expect_close(opened, captured)


def test_a_run_has_its_sizes_left_open(library: Library, tmp_path: Path) -> None:
    program = Pipeline.parse("batch(max=3)").run(sampler.denoiser())
    opened = engine.build(program, target(min_block=1), tmp_path / "x.engine")
    shapes = [argument.shape for argument in library.compiled[0]["arg_inputs"]]
    assert shapes == [((1, 2, 8), (3, 2, 8), (3, 2, 8)), ()]
    assert library.saved[0]["dynamic_shapes"] is not None
    for count in (1, 3):
        expect_close(opened, program, count)


@pytest.mark.parametrize(("name", "times"), [("h100:torch-tensorrt", 2), ("h100", 1)])
def test_packages_are_taken_from_the_cache_where_the_weights_in_them_are_the_same(
    name: str,
    times: int,
    library: Library,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DIFFOPT_CACHE", str(tmp_path / "cache"))
    compiled: list[str] = []

    def package(self: Target, gm: fx.GraphModule, sizes: Any) -> device_compilation.Package:
        compiled.append(gm.__class__.__name__)
        return device_compilation.Package(b"")

    monkeypatch.setattr(type(parse_target(name)), "package", package)
    program = sampler.program()
    for _ in range(2):
        for _ in range(2):
            engine.write(program, name, tmp_path / "x.engine")
        for gm in program.components.values():
            for tensor in gm.parameters():
                tensor.data.mul_(2)
    assert len(compiled) == times * len(program.components)


@pytest.mark.parametrize("is_sparse", [False, True])
def test_sparse_weights_may_take_sparse_kernels(
    is_sparse: bool, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "save", lambda cut, path, **options: Path(path).write_bytes(b""))
    program = sampler.program()
    for weight in program.weights().values():
        if is_sparse and weight.dim() == 2:
            weight.data.mul_(mask_2_4(weight))
    engine.write(program, target(min_block=1), tmp_path / "x.engine")
    assert [settings["sparse_weights"] for settings in library.compiled] == [is_sparse] * 2


MISSING = (
    "the target torch-tensorrt needs the package torch-tensorrt, which {why};"
    ' pip install "torch-tensorrt=={version}.*"'
)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (None, "is not installed"),
        ("raise Exception('no TensorRT\\nhere')", "cannot be imported: no TensorRT"),
        ("import torch_tensorrt_core", "cannot be imported: No module named 'torch_tensorrt_core'"),
    ],
)
def test_the_package_is_wanted_where_it_is_needed(
    source: str | None,
    why: str,
    captured: Program,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    diffopt: Run,
) -> None:
    path = tmp_path / "x.engine"
    engine.write(captured, target(), path)
    request.getfixturevalue("library")
    if source is None:
        monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    else:
        monkeypatch.delitem(sys.modules, "torch_tensorrt")
        (tmp_path / "torch_tensorrt.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
    version = ".".join(torch.__version__.split(".")[:2])
    wanted = MISSING.format(why=why, version=version)
    with pytest.raises(DiffoptError) as error:
        engine.load(path)
    assert str(error.value) == wanted
    assert diffopt("finish", path).err == f"diffopt: error: {wanted}\n"


def test_float64_is_computed_in_float32_only_where_that_is_asked_for(tmp_path: Path) -> None:
    class Double(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.double().cumsum(0).float()

    module = Double()
    program = diffopt.trace(lambda x: module(x), x=torch.ones(4), components={"model": module})
    with pytest.raises(DiffoptError) as error:
        engine.write(program, target(), tmp_path / "x.engine")
    assert str(error.value) == (
        "target h100:torch-tensorrt cannot take this program:"
        " _to_copy_default of model is in float64, which TensorRT lacks;"
        " truncate-double=true computes it in float32"
    )
    engine.write(program, target(truncate_double="true"), tmp_path / "x.engine")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("level=6", "level=6: wants a number from 0 to 5"),
        ("workspace=-1", "workspace=-1: wants 0 or more"),
        ("min-block=0", "min-block=0: wants 1 or more"),
    ],
)
def test_options_out_of_range(option: str, message: str) -> None:
    with pytest.raises(DiffoptError) as error:
        parse_target(f"h100:torch-tensorrt({option})")
    assert message in str(error.value)


def test_there_is_no_number_of_operators_without_a_report() -> None:
    cut = fx.symbolic_trace(nn.Identity())
    cut.add_module("_run_on_acc_0", nn.Identity())
    assert torch_tensorrt._about(cut, "") == {
        "tensorrt": {"plans": 1, "operators": None},
        "torch": {},
    }


@pytest.mark.gpu
def test_the_real_package_takes_what_the_stand_in_takes() -> None:
    real = pytest.importorskip("torch_tensorrt")
    standin = Library()
    for ours, theirs in ((standin.compile, real.dynamo.compile), (standin.save, real.save)):
        names = {*inspect.signature(ours).parameters}
        if "settings" in names:
            names = names - {"settings"} | SETTINGS
        assert names <= inspect.signature(theirs).parameters.keys()


@pytest.mark.gpu
@pytest.mark.parametrize("options", ["", "(min-block=1)", "(cuda-graph=true)"])
@pytest.mark.parametrize("passes", ["", "batch(max=3)"])
def test_on_a_gpu(options: str, passes: str, captured: Program, tmp_path: Path) -> None:
    if importlib.util.find_spec("torch_tensorrt") is None:
        pytest.skip("torch-tensorrt is not installed")
    known = {hardware(name).capability: name for name in hardware_names()}
    device = known.get(cuda_runtime.capability())
    if device is None:
        pytest.skip("no description has this GPU's compute capability")
    program = Pipeline.parse(passes).run(captured) if passes else captured
    opened = engine.build(program, f"{device}:torch-tensorrt{options}", tmp_path / "x.engine")
    if options == "(min-block=1)":
        assert components(tmp_path / "x.engine")["unet"]["tensorrt"]["plans"] > 0
    for _ in range(3):  # a CUDA graph is captured in the second and replayed in the third
        for count in program.batch or (None,):
            inputs = program.sample_inputs(count)
            for output, exact in zip(opened.run(inputs), program.run(inputs), strict=True):
                torch.testing.assert_close(output.cpu(), exact, atol=2e-3, rtol=2e-3)
    opened.verify()
