"""Kernels of AOTInductor: the same numbers, compiled once, or one line that says why not."""

import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

import diffopt
from diffopt.core import Pipeline
from diffopt.engine.engine import Engine, build, load
from diffopt.engine.engine_file import KIND
from diffopt.errors import DiffoptError
from diffopt.ir import graph
from diffopt.ir.program import Program
from diffopt.lowering import aoti
from diffopt.lowering.compile_inputs import dynamic_bounds
from diffopt.lowering.target import parse_target
from diffopt.storage import container, disk_cache
from diffopt.storage.temporary import work_folder
from diffopt.targets import cpu
from diffopt.targets.cpu import Cpu
from tests.sampler import check_images, denoiser, program

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("session_cache")


def no_compiler(*args: Any, **options: Any) -> Any:
    raise AssertionError("compiled")


def body_of(module: nn.Module, *args: Tensor) -> Any:
    """Return a module as the body of a component."""

    def call(**inputs: Tensor) -> Any:
        return module(*inputs.values())

    inputs = {f"x{index}": tensor for index, tensor in enumerate(args)}
    captured = diffopt.trace(call, components={"body": module}, **inputs)
    return captured.components["body"]


def kernel(gm: Any, **options: Any) -> Callable[[list[Tensor]], Any]:
    """Compile a body without weights and load it."""
    strides = [node.meta["val"].stride() for node in graph.placeholders(gm)]
    members = aoti.compile_body(gm, Cpu()._settings(), **options)
    return aoti.LibraryFunction(aoti.open_library(members, None), strides)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what this project has logged."""
    return [record.getMessage() for record in caplog.records if record.name == "diffopt"]


# What it computes


@pytest.mark.parametrize("text", ["cpu", "cpu(freeze=true)"])
def test_engine_gives_what_the_program_gives(
    text: str, captured: Program, engines: Callable[[str], Path]
) -> None:
    check_images(load(engines(text)), captured)


def test_engine_says_what_it_needs_and_holds(engines: Callable[[str], Path]) -> None:
    manifest = load(engines("cpu")).manifest
    assert manifest["target"] == "cpu"
    assert manifest["requires"] == cpu._requires()
    assert not manifest["holds_weights"]
    threads = torch.get_num_threads()
    assert manifest["components"] == {
        "unet": {"kernel": "unet.so", "layers": {"float": 2}, "threads": threads},
        "vae": {"kernel": "vae.so", "layers": {"float": 1}, "threads": threads},
    }
    assert {"kernels/unet.so", "kernels/vae.so"} <= manifest["members"].keys()


def test_weights_changed_in_place_are_changed_for_the_kernels(
    captured: Program, engines: Callable[[str], Path]
) -> None:
    opened = load(engines("cpu"))
    changed = program()
    for tensor in [opened.tensors["unet.first_bias"], changed.components["unet"].first_bias]:
        assert isinstance(tensor, Tensor)
        tensor.add_(1.0)
    expected = changed(seed=0)["images"]
    assert not torch.equal(expected, captured(seed=0)["images"])
    torch.testing.assert_close(opened(seed=0)["images"], expected, atol=1e-6, rtol=1e-5)


def test_frozen_weights_are_in_the_kernels_alone(engines: Callable[[str], Path]) -> None:
    opened = load(engines("cpu(freeze=true)"))
    assert not [name for name in opened.tensors if name.startswith(("unet", "vae"))]
    for use in (lambda: opened.program, lambda: load(opened.path, target="eager")):
        with pytest.raises(DiffoptError, match=r"keeps the weights in its kernels, so"):
            use()


def test_the_graphs_of_an_engine_run_without_its_kernels(
    captured: Program, engines: Callable[[str], Path]
) -> None:
    opened = load(engines("cpu"), target="eager")
    assert torch.equal(opened(seed=0)["images"], captured(seed=0)["images"])


def test_arguments_may_lie_in_memory_in_any_way(engines: Callable[[str], Path]) -> None:
    opened = load(engines("cpu"))
    noise = torch.randn(8, 2).t()
    assert not noise.is_contiguous()
    assert torch.equal(opened.run([noise])[0], opened.run([noise.contiguous()])[0])


def test_engines_do_not_disturb_each_other(engines: Callable[[str], Path]) -> None:
    first, second = load(engines("cpu")), load(engines("cpu"))
    expected = first(seed=0)["images"]
    second.tensors["unet.first_bias"].add_(1.0)
    assert torch.equal(first(seed=0)["images"], expected)
    assert not torch.equal(second(seed=0)["images"], expected)
    del second
    assert torch.equal(first(seed=0)["images"], expected)


class Scaled(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x.softmax(-1) * t


def test_one_kernel_serves_a_range_of_batch_sizes() -> None:
    module = Scaled()
    gm = body_of(module, torch.randn(2, 5), torch.ones(2, 1))
    run = kernel(gm, sizes={0: {0: (1, 8)}, 1: {0: (1, 8)}})
    for size in (1, 3, 8):
        x, t = torch.randn(size, 5), torch.rand(size, 1)
        torch.testing.assert_close(run([x, t])[0], module(x, t))


def test_one_engine_serves_a_range_of_batch_sizes(tmp_path: Path) -> None:
    captured = denoiser()
    batched = Pipeline.parse("batch(max=3)").run(captured)
    built = build(batched, "cpu", tmp_path / "x.engine")
    built.verify()
    # Another range is another kernel, the same one is in the cache.
    sizes = dynamic_bounds(batched)
    keys = [Cpu()._key(gm, sizes.get(name)) for name, gm in batched.components.items()]
    assert all(disk_cache.get(disk_cache.key(key)) for key in keys)
    wider = dynamic_bounds(Pipeline.parse("batch(max=4)").run(captured))
    assert not any(
        disk_cache.get(disk_cache.key(Cpu()._key(gm, wider[name])))
        for name, gm in batched.components.items()
    )
    for count in (1, 2, 3, 4):
        results = load(built.path).serve([{"seed": seed} for seed in range(count)])
        for seed, result in enumerate(results):
            expected = captured(seed=seed)["images"]
            torch.testing.assert_close(result["images"], expected, atol=1e-6, rtol=1e-5)


class Signal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x) * 0.5, n=8)


def test_operators_that_the_compiler_hands_back_to_torch() -> None:
    gm = body_of(Signal(), torch.randn(2, 8))
    x = torch.randn(2, 8)
    torch.testing.assert_close(kernel(gm)([x])[0], 0.5 * x)


# What is not done twice


def test_a_second_build_compiles_nothing(
    engines: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = engines("cpu")
    monkeypatch.setattr(aoti, "compile_body", no_compiler)
    monkeypatch.setattr(aoti, "_run_jobs", no_compiler)
    seen: list[str] = []
    again = build(program(), "cpu", tmp_path / "x", progress=lambda what, _: seen.append(what))
    assert again.path.read_bytes() == first.read_bytes()
    assert seen == ["unet: from the cache", "vae: from the cache", "writing"]


def test_other_weights_need_no_other_kernels(
    engines: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines("cpu")
    monkeypatch.setattr(aoti, "compile_body", no_compiler)
    monkeypatch.setattr(aoti, "_run_jobs", no_compiler)
    changed = program()
    for tensor in changed.weights().values():
        tensor.mul_(0.5)
    opened = build(changed, "cpu", tmp_path / "x")
    expected = changed(seed=0)["images"]
    torch.testing.assert_close(opened(seed=0)["images"], expected, atol=1e-6, rtol=1e-5)


def test_a_broken_cache_entry_is_compiled_again(
    captured: Program,
    engines: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engines("cpu")
    key = disk_cache.key(Cpu()._key(captured.components["unet"]))
    entry = disk_cache._path(key)
    content = bytearray(entry.read_bytes())
    content[len(content) // 2] ^= 1
    entry.write_bytes(content)
    seen: list[str] = []
    build(captured, "cpu", tmp_path / "x", progress=lambda what, _: seen.append(what))
    assert [what.partition(" in ")[0] for what in seen] == [
        "vae: from the cache",
        "compiling unet",
        "unet: compiled",
        "writing",
    ]
    assert messages(caplog)[0] == (
        f"cache: {entry}: member so is damaged; copy it again, or build it again; making it again"
    )
    assert disk_cache.get(key) is not None


def test_a_cache_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DIFFOPT_CACHE", str(tmp_path / "file"))
    disk_cache.put("0" * 64, {"so": b""})
    assert disk_cache.get("0" * 64) is None
    assert [message.partition(" cannot be written: ")[2] for message in messages(caplog)] == [
        "Not a directory"
    ]


def test_what_a_kernel_depends_on(captured: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(target: Cpu, change: Callable[[Any], None] = lambda gm: None) -> str:
        gm = graph.clone(captured.components["unet"])
        change(gm)
        return disk_cache.key(target._key(gm))

    def rename(gm: Any) -> None:
        for index, node in enumerate(gm.graph.nodes):
            node.name = f"n{index}"

    def use_gelu(gm: Any) -> None:
        (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.silu.default)
        node.target = torch.ops.aten.gelu.default

    def add_one(gm: Any) -> None:
        gm.first_weight = nn.Parameter(gm.first_weight + 1.0, requires_grad=False)

    def turn(gm: Any) -> None:
        gm.first_weight = nn.Parameter(gm.first_weight.t().contiguous().t(), requires_grad=False)

    plain = key(Cpu())
    assert key(Cpu(), rename) == plain
    assert key(Cpu(), add_one) == plain
    assert key(Cpu(), use_gelu) != plain
    assert key(Cpu(), turn) != plain
    assert key(Cpu(threads=3)) != plain
    assert key(Cpu(threads=torch.get_num_threads())) == plain
    frozen = key(Cpu(freeze=True))
    assert frozen != plain
    assert key(Cpu(freeze=True), add_one) != frozen
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert key(Cpu()) != plain


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFOPT_CACHE", "/somewhere")
    assert disk_cache.folder() == Path("/somewhere")
    monkeypatch.delenv("DIFFOPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/else")
    assert disk_cache.folder() == Path("/else/diffopt")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert disk_cache.folder() == Path("/home/me/.cache/diffopt")


# What it refuses


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "cpu(pack=true,freeze=true)",
            "pack packs the weights on loading, freeze when the engine is built: choose one\n"
            "  cpu(pack=true,freeze=true)\n  ^^^",
        ),
        (
            "cpu(max-autotune=true)",
            "max-autotune chooses among kernels for packed weights: add freeze=true\n"
            "  cpu(max-autotune=true)\n  ^^^",
        ),
        (
            "cpu(threads=-1)",
            "threads=-1: wants 0 or more\n  cpu(threads=-1)\n  ^^^",
        ),
        (
            "cpu(threads=many)",
            "option 'threads' of cpu wants int, got 'many'\n"
            "  cpu(threads=many)\n              ^^^^",
        ),
    ],
)
def test_wrong_options(text: str, message: str) -> None:
    with pytest.raises(DiffoptError) as caught:
        parse_target(text)
    assert str(caught.value) == message


def test_options_print_and_parse() -> None:
    for target in (Cpu(), Cpu(freeze=True, threads=2, max_autotune=True)):
        assert parse_target(str(target)) == target
    assert str(Cpu(freeze=True, threads=2)) == "cpu(freeze=true,threads=2)"


def test_no_compiler(captured: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_compiler", lambda: None)
    with pytest.raises(DiffoptError) as caught:
        build(captured, "cpu", tmp_path / "x")
    assert str(caught.value) == (
        "target cpu cannot take this program: it needs a C++ compiler: install g++, or name one"
        " in $CXX"
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("platform", "beos-ppc", "it was built for beos-ppc, this is {platform}"),
        ("isa", ["amx9", "avx9"], "its kernels need amx9, avx9, which this CPU lacks"),
        ("torch", "1.0", "its kernels need torch 1.0, this is {torch}"),
    ],
)
def test_engine_of_another_machine(
    key: str, value: Any, message: str, engines: Callable[[str], Path], tmp_path: Path
) -> None:
    opened = container.Archive(engines("cpu"), KIND, "an engine", "")
    members = {name: [opened.read(name)] for name in opened.manifest["members"]}
    requires = opened.manifest["requires"]
    changed = {**opened.manifest, "requires": {**requires, key: value}}
    container.write(tmp_path / "x", KIND, changed, members)
    with pytest.raises(DiffoptError) as caught:
        load(tmp_path / "x")
    assert str(caught.value) == (
        f"{tmp_path}/x: {message.format(**requires)}; build it again for this machine,"
        ' or load it with target="eager"'
    )
    assert isinstance(load(tmp_path / "x", target="eager"), Engine)


# What an interruption leaves


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_end_in_between_leaves_nothing_behind(
    tmp_path: Path, how: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {name: tmp_path / name for name in ("out", "temp", "cache")}
    for place in places.values():
        place.mkdir()
    code = (
        "import os\n"
        "os.sched_getaffinity = lambda _: {0, 1}\n"  # compiles in processes of its own
        "from diffopt.engine.engine import build\n"
        "from tests.sampler import program\n"
        "say = lambda what, fraction: print(what, flush=True)\n"
        f"build(program(), 'cpu', {str(places['out'] / 'x.engine')!r}, progress=say)\n"
    )
    environment = {
        **os.environ,
        "TMPDIR": str(places["temp"]),
        "DIFFOPT_CACHE": str(places["cache"]),
        # Not below TMPDIR, and with what compiling begins with, where a test has compiled.
        "TORCHINDUCTOR_CACHE_DIR": default_cache_dir(),
    }
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with the signal ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "compiling unet, vae\n"
    deadline = time.monotonic() + 60
    while (
        not list(places["temp"].glob("diffopt-*/diffopt-*/*.*p*")) and time.monotonic() < deadline
    ):
        time.sleep(0.05)  # until the compiler has written its first file
    child.send_signal(how)
    _, errors = child.communicate(timeout=60)
    if how == signal.SIGKILL:  # the next one tidies up, as soon as the children have ended
        monkeypatch.setattr(tempfile, "tempdir", str(places["temp"]))
        while list(places["temp"].iterdir()) and time.monotonic() < deadline:
            time.sleep(0.5)
            with work_folder():
                pass
    else:
        assert "KeyboardInterrupt" in errors
    for place in places.values():
        assert list(place.iterdir()) == []


def test_options_of_another_build_are_refused(tmp_path: Path) -> None:
    build(program(), "cpu(threads=1)", tmp_path / "x.engine")
    for same in ("cpu", "cpu(threads=1)", None):
        assert str(load(tmp_path / "x.engine", target=same).target) == "cpu(threads=1)"
    with pytest.raises(DiffoptError) as caught:
        load(tmp_path / "x.engine", target="cpu(threads=2)")
    assert str(caught.value) == (
        f"{tmp_path / 'x.engine'}: built for target cpu(threads=1), with whose options its kernels"
        " are compiled; build it again for cpu(threads=2)"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_again_maps_nothing_again(tmp_path: Path) -> None:
    build(program(), "cpu", tmp_path / "x.engine")
    counts = []
    for _ in range(4):
        load(tmp_path / "x.engine")(seed=0)
        gc.collect()
        counts.append(len(Path("/proc/self/maps").read_text().splitlines()))
    assert counts[3] == counts[1]
