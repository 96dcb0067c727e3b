"""TensorRT plans: real ones, built without a GPU, and what is asked of the GPU that runs them."""

import ctypes
import importlib.util
import math
import os
import re
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import diffopt
from diffopt.caching.apply_plan import Reuse, Term, apply, find_loop
from diffopt.core import Pipeline
from diffopt.engine.engine import load, write
from diffopt.engine.engine_file import KIND
from diffopt.errors import DiffoptError
from diffopt.ir import nodes, qdq
from diffopt.ir.program import Program
from diffopt.lowering import compile_inputs, cuda_runtime, legality
from diffopt.lowering.hardware import hardware, hardware_names
from diffopt.lowering.onnx import export
from diffopt.lowering.target import parse_target
from diffopt.lowering.trt import builder, library, plan_runtime, qdq_legalize
from diffopt.lowering.trt.builder import Plan, Settings
from diffopt.progress import silent
from diffopt.storage.container import Archive
from tests import loops
from tests.command import Run
from tests.passes import build
from tests.quantized import pack, quantized
from tests.sampler import program

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx"
)
aten = torch.ops.aten
QUICK = Settings(level=0)
CAPABILITIES = {"rtx3090": (8, 6), "rtx4090": (8, 9), "rtx5090": (12, 0)}
Form = tuple[qdq.Number, qdq.Scaling | None, int | None]


pytestmark = pytest.mark.usefixtures("session_cache")


class Body(nn.Module):
    """A convolution that pads, attention, and layers of a size that kernels of all formats take."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 64, 3, padding=1, stride=2)
        self.qkv = nn.Linear(64, 192)
        self.out = nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = nn.functional.silu(self.conv(x)).flatten(2).transpose(1, 2)
        heads = self.qkv(tokens).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(heads[0], heads[1], heads[2])
        return self.out(mixed.transpose(1, 2).flatten(2))


@pytest.fixture(scope="module")
def traced() -> Callable[[torch.dtype], Program]:
    programs: dict[torch.dtype, Program] = {}

    def trace(dtype: torch.dtype) -> Program:
        if dtype not in programs:
            torch.manual_seed(0)
            body = Body().eval().requires_grad_(False).to(dtype)
            x = torch.randn(2, 4, 16, 16).to(dtype)
            programs[dtype] = diffopt.trace(lambda x: body(x), components={"body": body}, x=x)
        return programs[dtype]

    return trace


def plan(gm: fx.GraphModule, device: str, **options: Any) -> Plan:
    """Build a component for a device."""
    model = options.pop("model", None) or export(qdq_legalize.rewrite(gm), "body")
    chosen = library.find_library("tensorrt-rtx", device, CAPABILITIES[device])
    return builder.build("body", model, chosen, options.pop("settings", QUICK), {}, **options)


# What is built


@needs_rtx
@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(torch.float32, "fp32"), (torch.float16, "fp16"), (torch.bfloat16, "bf16")],
)
def test_plans_compute_in_the_types_of_the_graph(
    traced: Callable[[torch.dtype], Program], dtype: torch.dtype, kind: str
) -> None:
    model = export(traced(dtype).components["body"], "body")
    contents = set()
    for device in CAPABILITIES:
        built = plan(traced(dtype).components["body"], device, model=model)
        products = {step: n for step, n in built.about["steps"].items() if step != "other"}
        if kind == "fp32":  # attention is fused in 16 bits alone
            assert products == {"conv fp32": 1, "gemm fp32": 4}
        else:
            assert products == {f"conv {kind}": 1, f"gemm {kind}": 2, f"attention {kind}": 1}
        assert built.about["bytes"] == len(built.content)
        assert built.about["weight"] < built.about["bytes"]
        assert not built.warnings
        contents.add(built.content)
    assert len(contents) == len(CAPABILITIES)
    assert plan(traced(dtype).components["body"], device, model=model).content in contents


FORMS: list[tuple[Form, Iterable[str], dict[str, int]]] = [
    (("int8", "static", None), CAPABILITIES, {"conv int8": 1, "gemm int8": 2}),
    (("int8", "rows", None), ["rtx4090"], {"conv int8": 1, "gemm int8": 2}),
    (("fp8", "static", None), ["rtx4090", "rtx5090"], {"conv fp8": 1, "gemm fp8": 2}),
    (("int8", None, None), ["rtx3090"], {"gemm fp16 (int8 widened)": 2}),
    (("int4", None, None), CAPABILITIES, {"gemm fp16 (int4 widened)": 2}),
]


@needs_rtx
@pytest.mark.parametrize(("form", "devices", "steps"), FORMS, ids=[str(row[0]) for row in FORMS])
def test_quantized_layers_run_on_what_they_are_quantized_to(
    traced: Callable[[torch.dtype], Program],
    form: Form,
    devices: Iterable[str],
    steps: dict[str, int],
) -> None:
    number, scaling, group = form
    gm = quantized(traced(torch.float16), number, scaling, group).components["body"]
    model = export(qdq_legalize.rewrite(gm), "body")
    widths = {"int4": 0.5, "int8": 1, "fp8": 1}
    layers = 192 * 64 + 64 * 64
    for device in devices:
        about = plan(gm, device, model=model).about
        counts = about["steps"]
        assert {step: n for step, n in counts.items() if step in steps} == steps
        assert counts["attention fp16"] == 1
        # Once, and in as many bits as it says; the convolution is small.
        assert about["weight"] < (widths[number] + 0.6) * layers


@needs_rtx
def test_one_plan_for_a_range_of_requests() -> None:
    batched = Pipeline.parse("batch(max=4)").run(program())
    compiled = parse_target("rtx4090:tensorrt(level=0)").compile(batched, silent)
    assert set(compiled.members) == {"unet.plan", "vae.plan", "(build).json"}
    assert compiled.bodies["unet"]["steps"]["gemm fp32"] == 2


# What it costs to build, and stopping it


@needs_rtx
def test_engines_hold_plans_that_are_built_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, diffopt: Run
) -> None:
    told: list[tuple[str, float | None]] = []
    target = "rtx4090:tensorrt(level=0,keep-weights=true)"
    write(program(), target, tmp_path / "a", progress=lambda *row: told.append(row))
    fractions = [done for _, done in told if done is not None]
    assert fractions == sorted(fractions)
    assert len({round(done, 2) for done in fractions}) > 10
    assert told[0] == ("unet: exporting to ONNX", 0.0)
    monkeypatch.setattr(builder, "build", None)  # from now on from the cache
    write(program(), target, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    opened = load(tmp_path / "b", target="eager")
    assert torch.equal(opened(seed=3)["images"], program()(seed=3)["images"])
    manifest = opened.manifest
    assert manifest["target"] == target
    assert not manifest["holds_weights"]
    assert manifest["requires"] == {
        "device": "rtx4090",
        "capability": [8, 9],
        "builder": "tensorrt-rtx",
        "version": library.load("tensorrt-rtx").__version__,
        "platform": f"linux-{os.uname().machine}",
    }
    assert {"kernels/unet.plan", "kernels/vae.plan"} <= manifest["members"].keys()
    about = manifest["components"]["unet"]
    assert about["kernel"] == "unet.plan"
    assert about["steps"]["gemm fp32"] == 2
    assert about["bytes"] == manifest["members"]["kernels/unet.plan"]["size"]
    (tmp_path / "b").rename(tmp_path / "b.engine")
    assert diffopt("inspect", tmp_path / "b.engine").code == 0
    ran = diffopt("run", tmp_path / "b.engine", "-t", "eager", "-o", "x.npy")
    assert (ran.code, ran.err.split()[0]) == (0, "wrote")


@needs_rtx
def test_cached_steps_are_plans_of_their_own(tmp_path: Path, diffopt: Run) -> None:
    cached = Pipeline.parse("unroll,hoist").run(loops.program())
    loop = find_loop(cached)
    (scores,) = loop.body.graph.find_nodes(op="call_function", target=aten.softmax.int)
    apply(cached, loop, {1: [Reuse(scores, (Term(0),))], 3: [Reuse(scores, (Term(2),))]})
    file = tmp_path / "x.engine"
    write(cached, "rtx3090:tensorrt(level=0)", file)
    manifest = Archive(file, KIND, "an engine", "").manifest
    products = {n: c["steps"].get("gemm fp32", 0) for n, c in manifest["components"].items()}
    bodies = [n for n in products if not n.endswith(("_once", "_steps"))]
    assert len(bodies) == 2
    assert products[bodies[0]] - products[bodies[1]] == 2  # queries, and their products with keys
    assert manifest["holds_weights"]
    needs = "its plans need a GPU of compute capability 8.6 (rtx3090), and torch finds none here"
    message = f"{file}: {needs}; build it again for this machine"
    with pytest.raises(DiffoptError, match=re.escape(message) + "$"):
        load(file)
    assert message in " ".join(diffopt("run", file, "-o", "x.pt").err.split())


@needs_rtx
def test_an_interruption_ends_the_build(tmp_path: Path) -> None:
    def interrupt(what: str, done: float | None) -> None:
        if what.endswith("building"):
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        write(program(), "rtx5090:tensorrt", tmp_path / "x", progress=interrupt)
    assert signal.getsignal(signal.SIGINT) is handler
    assert not list(tmp_path.iterdir())


# What layers are rewritten to


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scaling", ["static", "dynamic", "rows", None])
@pytest.mark.parametrize("number", ["int8", "int4", "fp8"])
def test_rewritten_layers_give_the_same(
    traced: Callable[[torch.dtype], Program],
    number: qdq.Number,
    scaling: qdq.Scaling | None,
    dtype: torch.dtype,
) -> None:
    base = traced(dtype)
    gm = quantized(base, number, scaling).components["body"]
    legalized = qdq_legalize.rewrite(gm)
    assert len(legalized.graph.nodes) > len(gm.graph.nodes) or number == "int4"
    (exact,), (before,), (after,) = (
        f(*base.sample) for f in (base.components["body"], gm, legalized)
    )
    assert after.dtype == before.dtype
    assert error(after, exact) < 1.1 * error(before, exact)
    if dtype == torch.float32:
        # With scales of the values themselves, a number amid two integers may become the other.
        is_fixed = scaling in (None, "static")
        assert error(after, before) < (2e-6 if is_fixed else 0.05 * error(before, exact))
    for layer in qdq.layers(legalized):
        x = layer.x.args[0] if nodes.is_call(layer.x, aten._to_copy.default) else layer.x
        activation = qdq.activation(layer.x) or qdq.activation(x)
        assert (activation is None) == (scaling is None)
        if activation is not None:
            constant = nodes.stored_tensor(legalized, activation.scale)
            assert constant is not None
            assert constant.item() == (2.0**-9 if number == "fp8" else 2.0**-7)
            assert activation.zero is None or nodes.stored_tensor(legalized, activation.zero) == 0


@pytest.mark.parametrize("scaling", [None, "rows"])
@pytest.mark.parametrize("zero", [False, True])
def test_layers_may_share_a_weight(scaling: qdq.Scaling | None, zero: bool) -> None:
    """One of them reads a quantized value, if there is a scaling."""
    weight = build.parameter(64, 64)
    weight.mul_(0 if zero else 1)

    def make(b: Any, x: fx.Node) -> fx.Node:
        placed = qdq.place_weight(b.gm, "weight", pack(weight, "int8"), torch.float32)
        first = b(aten.linear.default, x, placed)
        read = qdq.quantize(b.gm, first, scaling) if scaling else first
        return b(aten.linear.default, read, placed)

    before = build.body(make, build.randn(3, 64))
    (output,), (expected,) = (
        gm(build.randn(3, 64)) for gm in (qdq_legalize.rewrite(before), before)
    )
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


# What is refused


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "h100:tensorrt(tensorrt-rtx)",
            "tensorrt-rtx builds for SM75, SM80, SM86, SM89, SM120, SM121, and h100 is SM90",
        ),
        (
            "t4:tensorrt",
            "linear of unet: tensorrt-rtx has no matrix products in fp32 for SM75; add the pass"
            " cast(fp16)",
        ),
    ],
)
@needs_rtx
def test_devices_that_the_builder_lacks(target: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DiffoptError) as error:
        write(program(), target, tmp_path / "x")
    assert str(error.value) == f"target {target} cannot take this program: {message}"
    assert not (tmp_path / "x").exists()


@needs_rtx
def test_formats_that_the_device_lacks(
    traced: Callable[[torch.dtype], Program], tmp_path: Path
) -> None:
    quantized_program = quantized(traced(torch.float16), "fp8", "static")
    with pytest.raises(DiffoptError, match="rtx3090 has no fp8 products: they need compute cap"):
        write(quantized_program, "rtx3090:tensorrt", tmp_path / "x")


@needs_rtx
def test_types_that_tensorrt_lacks(tmp_path: Path) -> None:
    part = build.body(lambda b, x: b(aten.mul.Tensor, x, 2.0), torch.zeros(2, dtype=torch.float64))
    whole = build.program(
        lambda b, x: b.call("part", x), torch.zeros(2, dtype=torch.float64), part=part
    )
    with pytest.raises(DiffoptError, match=r"x of part: TensorRT has no type float64$"):
        write(whole, "rtx4090:tensorrt", tmp_path / "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [("level=6", "level=6: wants a number from 0 to 5"), ("workspace=-1", "wants 0 or more")],
)
def test_options_out_of_range(text: str, message: str) -> None:
    with pytest.raises(DiffoptError, match=message):
        parse_target(f"rtx4090:tensorrt({text})")


@needs_rtx
def test_an_operator_that_tensorrt_lacks_is_named_with_its_module() -> None:
    from onnx import TensorProto, helper

    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s)
        for n, s in (("x", [2, 4, 4]), ("y0", [2]))
    ]
    node = helper.make_node("Det", ["x"], ["y0"], name="blocks.3/Det_7")
    opset = helper.make_opsetid("", 21)
    model = helper.make_model(
        helper.make_graph([node], "body", ends[:1], ends[1:]), opset_imports=[opset], ir_version=10
    )
    with pytest.raises(DiffoptError) as error:
        plan(build.body(lambda b, x: x, torch.zeros(1)), "rtx4090", model=model)
    assert str(error.value) == (
        "body: TensorRT cannot take Det (blocks.3/Det_7): there is no such operator in it"
    )


@needs_rtx
def test_nodes_are_called_like_their_modules(traced: Callable[[torch.dtype], Program]) -> None:
    names = {
        n.name.partition("/")[0]
        for n in export(traced(torch.float16).components["body"], "x").graph.node
    }
    assert {"conv", "qkv", "out"} <= names


# Which TensorRT


class Module(SimpleNamespace):
    """Stands for a module that is not installed here."""


def fake_modules(monkeypatch: pytest.MonkeyPatch, installed: set[str], gpu: Any) -> None:
    members = {"NONE": 0, "CURRENT": 1, "SM86": 86, "SM89": 89}
    module = Module(__version__="1.0", ComputeCapability=SimpleNamespace(__members__=members))
    monkeypatch.setattr(library, "is_installed", lambda name: name in installed)
    monkeypatch.setattr(library, "load", lambda name: module)
    monkeypatch.setattr(cuda_runtime, "capability", lambda: gpu)


BOTH = {"tensorrt", "tensorrt-rtx"}


@pytest.mark.parametrize(
    ("installed", "gpu", "builder_", "expected"),
    [
        (BOTH, (8, 9), "auto", ("tensorrt", None)),
        (BOTH, None, "auto", ("tensorrt-rtx", 89)),
        (BOTH, (8, 6), "auto", ("tensorrt-rtx", 89)),
        (BOTH, (8, 9), "tensorrt-rtx", ("tensorrt-rtx", 89)),
    ],
)
def test_the_builder_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
    installed: set[str],
    gpu: Any,
    builder_: str,
    expected: tuple[str, Any],
) -> None:
    fake_modules(monkeypatch, installed, gpu)
    chosen = library.find_library(builder_, "rtx4090", (8, 9))
    assert (chosen.name, chosen.capability) == expected


def test_a_gpu_that_the_builder_has_no_name_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_modules(monkeypatch, {"tensorrt-rtx"}, (9, 0))
    assert library.find_library("auto", "h100", (9, 0)).capability == 1


@pytest.mark.parametrize(
    ("installed", "gpu", "message"),
    [
        (
            set(),
            None,
            "tensorrt is not installed (pip install tensorrt); tensorrt-rtx is not installed (pip"
            " install tensorrt-rtx)",
        ),
        (
            BOTH,
            None,
            "tensorrt builds on the GPU that it builds for, of compute capability 9.0 (h100), and"
            " there is none here; tensorrt-rtx builds for SM86, SM89, and h100 is SM90",
        ),
        (
            {"tensorrt"},
            (8, 9),
            "tensorrt builds on the GPU that it builds for, of compute capability 9.0 (h100), and"
            " the one here has 8.9; tensorrt-rtx is not installed (pip install tensorrt-rtx)",
        ),
    ],
)
def test_no_builder_for_the_device(
    monkeypatch: pytest.MonkeyPatch, installed: set[str], gpu: Any, message: str
) -> None:
    fake_modules(monkeypatch, installed, gpu)
    with pytest.raises(DiffoptError) as error:
        library.find_library("auto", "h100", (9, 0))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("change", "gpu", "message"),
    [
        ({}, (8, 9), None),
        (
            {},
            (8, 6),
            "its plans need a GPU of compute capability 8.9 (rtx4090), and the one here has 8.6",
        ),
        ({"platform": "far"}, (8, 9), "it was built for far, this is HERE"),
        (
            {"builder": "tensorrt"},
            (8, 9),
            "its plans need the package tensorrt, which is not installed",
        ),
        ({"version": "0.9"}, (8, 9), "its plans need tensorrt-rtx 0.9, this is 1.0"),
    ],
)
def test_what_plans_need_is_compared_with_the_machine(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, str], gpu: Any, message: str | None
) -> None:
    fake_modules(monkeypatch, {"tensorrt-rtx"}, gpu)
    here = compile_inputs.platform_tag()
    requires = {
        "device": "rtx4090",
        "capability": [8, 9],
        "builder": "tensorrt-rtx",
        "version": "1.0",
        "platform": here,
    }
    reason = parse_target("rtx4090:tensorrt").unfit({**requires, **change})
    assert reason == (message and message.replace("HERE", here))


# Running plans, on a machine that pretends to have a GPU


class FakeContext:
    """Doubles what is at the address of `x`, and adds what is at that of `n`, into `y0`."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {"n": (1,)}
        self.addresses: dict[str, int] = {}
        self.streams: list[int] = []

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self.shapes[name] = shape

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes["x"]

    def array(self, name: str, count: int) -> Any:
        return (ctypes.c_float * count).from_address(self.addresses[name])

    def execute_async_v3(self, stream: int) -> bool:
        self.streams.append(stream)
        count = math.prod(self.shapes["x"])
        x, n, y = self.array("x", count), self.array("n", 1), self.array("y0", count)
        y[:] = [2 * value + n[0] for value in x]
        return stream != 13


class FakeEngine:
    names = ("y0", "n", "x")
    num_io_tensors = 3
    weight_streaming_budget_v2 = 0

    def __init__(self, content: bytes) -> None:
        self.context = FakeContext()
        self.cache = content

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (1,) if name == "n" else (-1, 2)

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name="FLOAT")

    def get_weight_streaming_automatic_budget(self) -> int:
        return 77

    def create_runtime_config(self) -> Any:
        engine = self

        class Cache:
            def deserialize(self, content: bytes) -> bool:
                engine.cache = b"old " + content
                return True

            def serialize(self) -> bytes:
                return b"kernels"

        return SimpleNamespace(create_runtime_cache=Cache, set_runtime_cache=lambda cache: None)

    def create_execution_context(self, config: Any = None) -> FakeContext:
        self.config = config
        return self.context


class FakeTrt(SimpleNamespace):
    """As much of TensorRT's module as running plans takes."""

    class ILogger:
        def __init__(self) -> None:
            pass

    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")
    __version__ = "1.0"

    def Runtime(self, log: Any) -> Any:
        def deserialize(content: Any) -> FakeEngine | None:
            self.engine = FakeEngine(bytes(content))
            log.log(SimpleNamespace(name="ERROR"), "Serialization\n assertion")
            return None if bytes(content) == b"broken" else self.engine

        return SimpleNamespace(deserialize_cuda_engine=deserialize)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeTrt:
    """Put the CPU in the GPU's place."""
    monkeypatch.setattr(plan_runtime, "DEVICE", "cpu")
    stream = SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    return FakeTrt(stream=stream)


def body(trt: FakeTrt, content: bytes = b"plan", name: str = "tensorrt-rtx", **options: Any) -> Any:
    inputs = ["x", "unused", "n"]
    chosen = library.Library(name, trt)
    return plan_runtime.PlanFunction("unet", chosen, memoryview(content), inputs, ["y0"], **options)


def test_plans_read_and_write_tensors_where_they_are(gpu: FakeTrt) -> None:
    loaded = body(gpu)
    n = torch.tensor([0.5])
    for count in (3, 1):
        x = torch.randn(2, count).t()  # not contiguous
        (y,) = loaded([x, torch.zeros(9), n])
        assert torch.equal(y, 2 * x + 0.5)
        assert gpu.engine.context.addresses["n"] == n.data_ptr()
        assert gpu.engine.context.shapes["x"] == (count, 2)
    (y,) = loaded([x.half(), torch.zeros(9), n])
    assert torch.equal(y, 2 * x.half().float() + 0.5)
    assert gpu.engine.context.streams == [7, 7, 7]


def test_kernels_compiled_in_the_first_run_are_kept(gpu: FakeTrt) -> None:
    first = body(gpu, b"another plan")
    assert gpu.engine.cache == b"another plan"
    first([torch.zeros(1, 2), torch.zeros(1), torch.zeros(1)])
    body(gpu, b"another plan")
    assert gpu.engine.cache == b"old kernels"
    body(gpu, b"another plan still")
    assert gpu.engine.cache == b"another plan still"


def test_what_runs_plans_is_configured(gpu: FakeTrt) -> None:
    body(gpu, eager=True, stream_weights=True)
    config = gpu.engine.config
    assert config.dynamic_shapes_kernel_specialization_strategy == "eager"
    assert gpu.engine.weight_streaming_budget_v2 == 77
    body(gpu, name="tensorrt", eager=True)
    assert gpu.engine.config is None
    assert gpu.engine.weight_streaming_budget_v2 == 0


def test_plans_that_do_not_load_or_run(gpu: FakeTrt) -> None:
    with pytest.raises(DiffoptError) as error:
        body(gpu, b"broken")
    assert str(error.value) == "unet: tensorrt-rtx cannot load its plan: Serialization assertion"
    gpu.stream.cuda_stream = 13
    with pytest.raises(DiffoptError, match="unet: its plan does not run: Serialization assertion"):
        body(gpu)([torch.zeros(1, 2), torch.zeros(1), torch.zeros(1)])


# Running plans on a GPU


@pytest.fixture(scope="session")
def device() -> str:
    """Return the description of the GPU at hand."""
    known = {hardware(name).capability: name for name in hardware_names()}
    description = known.get(cuda_runtime.capability())
    if description is None:
        pytest.skip("no description has this GPU's compute capability")
    return description


def engine(program: Program, target: str, path: Path) -> Any:
    """Build and load an engine; a GPU that no builder here knows skips the test."""
    if (reason := parse_target(target).refuses(program)) is not None:
        pytest.skip(reason)
    write(program, target, path)
    return load(path)


@pytest.mark.gpu
@pytest.mark.parametrize("options", ["", "(cuda-graph=true)", "(stream-weights=true)"])
def test_an_engine_gives_what_the_program_gives(device: str, options: str, tmp_path: Path) -> None:
    captured = program()
    opened = engine(captured, f"{device}:tensorrt{options}", tmp_path / "x")
    for seed in (0, 1, 2, 0):  # a CUDA graph is captured in the second and replayed in the third
        images, expected = opened(seed=seed)["images"], captured(seed=seed)["images"]
        torch.testing.assert_close(images, expected, atol=2e-3, rtol=2e-3)  # products in tf32
    on_gpu = [tensor.cuda() for tensor in captured.sample_inputs()]
    assert all(tensor.is_cuda for tensor in opened.run(on_gpu))
    opened.verify()


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 3, 4])
def test_an_engine_serves_a_range_of_requests(device: str, count: int, tmp_path: Path) -> None:
    captured = program()
    batched = Pipeline.parse("batch(max=4)").run(captured)
    opened = engine(batched, f"{device}:tensorrt", tmp_path / "x")
    results = opened.serve([{"seed": seed} for seed in range(count)])
    for seed, result in enumerate(results):
        expected = captured(seed=seed)["images"]
        torch.testing.assert_close(result["images"], expected, atol=2e-3, rtol=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("form", [row[0] for row in FORMS], ids=str)
def test_quantized_plans_are_as_good_as_the_graphs(
    device: str, traced: Callable[[torch.dtype], Program], form: Form, tmp_path: Path
) -> None:
    base = traced(torch.float16)
    model = quantized(base, *form)
    if (reason := legality.unsupported(model, hardware(device))) is not None:
        pytest.skip(reason)
    opened = engine(model, f"{device}:tensorrt", tmp_path / "x")
    exact = traced(torch.float32).run([x.float() for x in base.sample_inputs()])[0]
    before = model.run(base.sample_inputs())[0]
    assert error(opened.run(base.sample_inputs())[0], exact) < 1.2 * error(before, exact)
