"""AOTInductor: compiles components in several processes, and loads what it has compiled.

For a CPU the result is a shared library; for a GPU a package, a library with its GPU kernels.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from diffopt.ir import graph as g
from diffopt.ir import qdq, serialize
from diffopt.ir.allowed_operators import find_any
from diffopt.ir.dynamic_sizes import Bounds, bounds_from_json
from diffopt.ir.insert import replace_calls
from diffopt.ir.strides import empty_like, with_strides
from diffopt.lowering import onednn
from diffopt.lowering.compile_inputs import dynamic_shapes, example_tensor
from diffopt.lowering.executor import ComponentFunction
from diffopt.storage import container
from diffopt.storage.temporary import work_folder

Settings = Mapping[str, Any]
"""Inductor's configuration, without the output path."""

KIND = "application/x-diffopt-job"
# In an ELF file a note: the lengths of a name and of a hash of all that was linked, then these.
_BUILD_ID = re.compile(rb"(\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0).{20}", re.DOTALL)
_ADDRESS = re.compile(" at 0x[0-9a-f]+")
# Linux ends the child when its parent has ended, however that was (`PR_SET_PDEATHSIG`).
_WORK = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(sys.argv[3]):
        sys.exit()
from diffopt.lowering import aoti
aoti.run_job(sys.argv[1], sys.argv[2])
"""


def compile_body(
    gm: fx.GraphModule, settings: Settings, sizes: Bounds | None = None
) -> dict[str, bytes]:
    """Compile a component for the CPU; return the library as "so".

    If it calls operators through the dispatcher, "json" lists these.
    """
    with (
        work_folder() as folder,
        quiet_inductor(folder),
        onednn.kernels(),
    ):
        _compile(gm, settings, sizes, "cpu", folder)
        files = {p.suffix[1:]: p for p in Path(folder).rglob("*") if _is_output(p)}
        return {kind: path.read_bytes() for kind, path in sorted(files.items())}


def compile_package(
    gm: fx.GraphModule, settings: Settings, sizes: Bounds | None = None, device: str = "cuda"
) -> bytes:
    """Compile a component whose tensors are on `device`; return the package."""
    from torch._inductor.package.package import package_aoti

    with work_folder() as folder, quiet_inductor():
        files = _compile(gm, settings, sizes, device, folder)
        kinds = (".so", ".json", ".cubin", ".wrapper.cpp")
        packaged: list[Any] = [str(file) for file in files if str(file).endswith(kinds)]
        for file in packaged:
            if file.endswith(".cpp"):  # torch 2.11 looks for the metadata by the name of the source
                Path(file).write_bytes(b"")
        path = Path(folder, "body.pt2")
        package_aoti(str(path), packaged)
        return path.read_bytes()


def _compile(
    gm: fx.GraphModule, settings: Settings, sizes: Bounds | None, device: str, folder: str
) -> Any:
    """Compile into a folder; return the names of the resulting files."""
    arguments = tuple(example_tensor(n.meta["val"], device) for n in g.placeholders(gm))
    known = torch._inductor.config.get_config_copy()  # each torch version has its own settings
    options = {key: value for key, value in settings.items() if key in known}
    options |= {"aot_inductor.package": True, "aot_inductor.output_path": folder}
    module: Any = _without_callbacks(gm)
    for node, argument in zip(g.placeholders(module), arguments, strict=True):
        node.meta["val"] = g.fake(argument)  # Inductor refuses fake tensors of another device
    if sizes:  # without dynamic sizes, exporting would change nothing
        shapes = dynamic_shapes(len(arguments), sizes)
        exported = torch.export.export(module, arguments, dynamic_shapes=shapes, strict=False)
        module = exported.module()
    files = torch._inductor.aot_compile(module, arguments, options=options)
    for path in Path(folder).rglob("*.so"):
        _forget_folder(path, folder)
    return files


def _without_callbacks(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy without operators on rows, which a library would call through the dispatcher.

    That takes longer, and torch 2.11 calls them with another dtype than the graph's.
    """
    result = g.clone(gm)
    replace_calls(result, qdq.ROWS_IN_PLAIN_OPERATORS)
    return result


def _forget_folder(path: Path, folder: str) -> None:
    """Take out of a library where it was compiled: the same source gives the same library."""
    if sys.platform == "darwin":  # there a library that was changed has to be signed again
        return
    content = path.read_bytes()
    # The hash in a kernel's name is of its source, in which the folder is named.
    for name in [folder, *(file.name for file in Path(folder).rglob("*.kernel.cpp"))]:
        content = content.replace(os.fsencode(name), b"." * len(os.fsencode(name)))
    path.write_bytes(_BUILD_ID.sub(rb"\g<1>" + bytes(20), content))


def compile_bodies(
    bodies: Mapping[str, fx.GraphModule],
    settings: Settings,
    processes: int,
    with_weights: bool,
    sizes: Mapping[str, Bounds],
) -> Iterator[tuple[str, dict[str, bytes], float]]:
    """Compile components, several at once; yield each with its seconds as it is done.

    Args:
        bodies: Components by name.
        settings: Inductor's configuration.
        processes: How many to compile at once; 1 compiles in this process.
        with_weights: Whether the library depends on the weights' values.
        sizes: The dynamic sizes of components that have some.
    """
    remaining = dict(bodies)
    if min(processes, len(remaining)) > 1:
        with work_folder() as folder:
            jobs = {}
            for name, gm in remaining.items():
                jobs[name] = str(Path(folder, f"{name}.job")), str(Path(folder, f"{name}.done"))
                _write_job(jobs[name][0], gm, settings, with_weights, sizes.get(name))
            for name, seconds in _run_jobs(jobs, processes, folder):
                done = Path(jobs[name][1])
                if done.exists():  # else the process failed: compiling here shows the error
                    del remaining[name]
                    result = container.Archive(done, KIND, "a result", "")
                    table = result.manifest["members"]
                    yield name, {member: bytes(result.read(member)) for member in table}, seconds
    for name, gm in remaining.items():
        started = time.perf_counter()
        members = compile_body(gm, settings, sizes.get(name))
        yield name, members, time.perf_counter() - started


def _write_job(
    path: str, gm: fx.GraphModule, settings: Settings, with_weights: bool, sizes: Bounds | None
) -> None:
    tensors = dict(g.named_tensors(gm))
    table = {
        name: [serialize.encode_value(tensor), isinstance(tensor, torch.nn.Parameter)]
        for name, tensor in tensors.items()
    }
    body = {
        "nodes": serialize.graph_to_json(gm),
        "tensors": table,
        "settings": dict(settings),
        "sizes": [[index, list(axes.items())] for index, axes in (sizes or {}).items()],
        "threads": torch.get_num_threads(),
    }
    weights = container.pack_tensors(tensors if with_weights else {})
    members: dict[str, container.Buffers] = {
        "body": [json.dumps(body).encode()],
        "weights": weights,
    }
    container.write(path, KIND, {}, members)


def run_job(job: str, result: str) -> None:
    """Run a job of `compile_bodies`, in a process of its own; both arguments are paths."""
    archive = container.Archive(job, KIND, "a job", "")
    body = json.loads(bytes(archive.read("body")))
    weights = archive.tensors("weights")
    tensors: dict[str, Tensor] = {}
    for name, (value, parameter) in body["tensors"].items():
        fake = serialize.decode_value(value)
        tensor = empty_like(fake)
        if name in weights:
            tensor.copy_(weights[name])
        tensors[name] = torch.nn.Parameter(tensor, requires_grad=False) if parameter else tensor
    torch.set_num_threads(body["threads"])
    gm = serialize.graph_from_json(body["nodes"], "body", tensors, {}, find_any)
    members = compile_body(gm, body["settings"], bounds_from_json(body["sizes"]))
    container.write(result, KIND, {}, {name: [content] for name, content in members.items()})


def _run_jobs(
    jobs: Mapping[str, tuple[str, str]], processes: int, folder: str
) -> Iterator[tuple[str, float]]:
    """Run jobs in so many processes at once; yield the name and seconds of each that is done.

    An interruption ends all processes. What they leave is in `folder`.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    environment = {
        **os.environ,
        # So that the children import the same package.
        "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
        # Not below the folder: what every compilation begins with is compiled once.
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()),
        "TMPDIR": folder,
    }
    waiting = list(jobs.items())
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                name, paths = waiting.pop(0)
                child = subprocess.Popen(
                    [sys.executable, "-c", _WORK, *paths, str(os.getpid())],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                running[name] = child, time.perf_counter()
            done = [name for name, (child, _) in running.items() if child.poll() is not None]
            for name in done:
                yield name, time.perf_counter() - running.pop(name)[1]
            if not done:
                time.sleep(0.02)
    finally:
        for child, _ in running.values():
            child.send_signal(signal.SIGINT)
        for child, _ in running.values():
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


WeightOf = Callable[[str], Tensor]
"""Returns a component's weight by its name, in the memory layout that it was compiled for."""

# The function of a library; and its weights, of which the library holds references for ever.
_Library = tuple[Callable[[list[Tensor]], list[Tensor]], list[Tensor]]


def open_library(members: Mapping[str, bytes | memoryview], weight_of: WeightOf | None) -> _Library:
    """Load a library.

    Args:
        members: The result of `compile_body`.
        weight_of: The component's weights; None if the library contains them.
    """
    runner = torch._C._aoti.AOTIModelContainerRunnerCpu(_unpacked(members), 1)
    if weight_of is None:
        return runner.run, []
    names = runner.get_constant_names_to_original_fqns()
    table = {name: _alias(weight_of(original)) for name, original in names.items()}
    runner.update_constant_buffer(table, False, True, True)
    return runner.run, list(table.values())


def _unpacked(members: Mapping[str, bytes | memoryview]) -> str:
    """Return the path of a library, the same for the same content.

    The system unloads no library that has unique symbols of C++, as these have: it would map each
    copy for ever, and knows an earlier one by its file.
    """
    digest = hashlib.sha256()
    for kind, content in sorted(members.items()):
        digest.update(kind.encode())
        digest.update(content)
    folder = Path(_folder_of_process(os.getpid()), digest.hexdigest())
    if not folder.exists():
        new = Path(tempfile.mkdtemp(dir=folder.parent))
        for kind, content in members.items():
            (new / f"body.{kind}").write_bytes(content)
        with contextlib.suppress(OSError):  # another thread was first
            new.rename(folder)
    return str(folder / "body.so")


@functools.cache
def _folder_of_process(number: int) -> str:
    """Return a folder that is removed when the process with this number ends."""
    kept = contextlib.ExitStack()
    atexit.register(kept.close)
    return kept.enter_context(work_folder())


def open_package(content: bytes | memoryview, weight_of: WeightOf | None) -> _Library:
    """Load a package.

    Args:
        content: The result of `compile_package`.
        weight_of: The component's weights, on the device; None if the package contains them.
    """
    with work_folder() as folder:
        path = Path(folder, "body.pt2")
        path.write_bytes(content)
        # Single-threaded: else it queries an event of the last run, which is not allowed while a
        # CUDA graph is captured.
        runner = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1)
    if weight_of is None:
        return runner.run, []
    table = {name: _alias(weight_of(name)) for name in runner.get_constant_fqns()}
    runner.load_constants(table, False, True, True)
    return runner.run, list(table.values())


@torch.no_grad()
def _alias(tensor: Tensor) -> Tensor:
    """Return another tensor of the same storage, which can be released alone."""
    layout = tensor.storage_offset(), tensor.shape, tensor.stride()
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage, *layout)


def _release(tensors: list[Tensor]) -> None:
    # Whenever Python searches for garbage: what is traced just then would have it in its graph.
    with _disable_current_modes():
        for tensor in tensors:
            tensor.set_()  # type: ignore[call-overload]


class LibraryFunction:
    """A loaded library, as a function of a component's flat arguments."""

    def __init__(
        self,
        library: _Library,
        strides: list[tuple[int, ...] | None],
        constants: Sequence[Tensor] = (),
    ) -> None:
        """Make a function of a library.

        Args:
            library: The result of `open_library` or `open_package`.
            strides: The strides that each argument was compiled for; None: contiguous.
            constants: Further arguments, the same in every call (see `load_time_graph`).
        """
        self._strides = strides
        self.constants = list(constants)
        self._run, weights = library
        weakref.finalize(self, _release, weights).atexit = False

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run the component; the list `tensors` is changed."""
        for index, stride in enumerate(self._strides):
            if stride is None:
                tensors[index] = tensors[index].contiguous()
            elif tensors[index].stride() != stride:
                tensors[index] = with_strides(tensors[index], stride)
        return self._run(tensors + self.constants)


def component_function(
    library: _Library, graph: Mapping[str, Any], constants: Sequence[Tensor] = ()
) -> ComponentFunction:
    """Return a library as a function; `graph` is the component's graph as JSON."""
    values = [
        serialize.decode_value(row["val"]) for row in graph["nodes"] if row["op"] == "placeholder"
    ]
    # Strides of contiguous arguments vary with dynamic sizes.
    strides = [None if value.is_contiguous() else value.stride() for value in values]
    return LibraryFunction(library, strides, constants)


def _is_output(path: Path) -> bool:
    """Tell whether a file is the library or its list of operators, not an intermediate one."""
    return path.name.endswith((".wrapper.so", ".wrapper.json"))


@contextlib.contextmanager
def quiet_inductor(folder: str | None = None) -> Iterator[None]:
    """Silence Inductor, and set the folder of its temporary files.

    No folder for GPU kernels: the processes that compile these outlive the context.
    """
    from torch._inductor import select_algorithm
    from torch._inductor.ir import ExternKernel

    named = ExternKernel.get_op_name

    def op_name(kernel: ExternKernel) -> str:
        """Name an operator without the address of a function that its pattern put there."""
        return _ADDRESS.sub("", named(kernel))

    with (
        torch.no_grad(),
        warnings.catch_warnings(),
        mock.patch.object(select_algorithm, "PRINT_AUTOTUNE", False),
        mock.patch.object(ExternKernel, "get_op_name", op_name),
        mock.patch.dict(os.environ, {} if folder is None else {"TMPDIR": folder}),
    ):
        warnings.simplefilter("ignore")
        yield
