"""Compiles every component ahead of time for this machine's CPU, with AOTInductor.

A component becomes a shared library that takes its weights from the engine file, where they are
stored once: components share them, and one changed in place is changed for all. With `freeze` the
libraries hold the weights instead, packed for the matrix library; what else is constant is folded.

The libraries use what this CPU has, so an engine says which instructions it needs. They are kept in
a cache under the hash of the component's graph and of all else that they depend on.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx

from diffopt import cachedir, serialize
from diffopt import graph as g
from diffopt.core import Progress
from diffopt.errors import DiffoptError
from diffopt.program import Program
from diffopt.runtime import Body, lay_out
from diffopt.target import Image, Lowered, Target, option

Dims = Mapping[int, Mapping[int, tuple[str, int, int]]]
"""Dynamic dimensions: argument -> axis -> (name, smallest, largest)."""

# What a compiler told to use all of this CPU may emit instructions of.
_ISA = ("avx", "amx", "fma", "bmi", "sse4", "f16c", "sha", "vaes", "gfni", "sve", "asimd", "i8mm")

log = logging.getLogger("diffopt")


@dataclass(frozen=True)
class Cpu(Target):
    """Compile for this machine's CPU with AOTInductor."""

    dtype: str = option("fp32", "what to compute in; only fp32 so far")
    freeze: bool = option(False, "pack the weights into the kernels, instead of sharing them")
    threads: int = option(0, "threads to run on, set on loading; 0: as many as torch has now")
    max_autotune: bool = option(False, "try several kernels for each matrix product; wants freeze")

    def __post_init__(self) -> None:
        if self.dtype != "fp32":
            raise DiffoptError(
                f"target cpu cannot compute in {self.dtype}: it keeps the dtype of the program;"
                " casting is for a pass to do, leave dtype=fp32"
            )
        if self.threads < 0:
            raise DiffoptError(f"threads={self.threads}: wants 0 or more")
        if self.max_autotune and not self.freeze:
            raise DiffoptError(
                "max-autotune chooses among kernels for packed weights: add freeze=true"
            )

    def refuses(self, program: Program) -> str | None:
        """Refuse what is not on the CPU, and machines without a C++ compiler."""
        graphs = {"the program": program.root, **program.components}
        for name, gm in graphs.items():
            for node in gm.graph.nodes:
                value = node.meta.get("val")
                if isinstance(value, Tensor) and value.device.type not in ("cpu", "meta"):
                    return f"{node.name} of {name} is on {value.device}; trace the model on the CPU"
        if _compiler() is None:
            return "it needs a C++ compiler: install g++, or name one in $CXX"
        return None

    def unfit(self, requires: Mapping[str, Any]) -> str | None:
        """Compare the platform, the CPU's instructions and torch with what the kernels need."""
        here = _requires()
        if requires["platform"] != here["platform"]:
            return f"it was built for {requires['platform']}, this is {here['platform']}"
        lacking = sorted(set(requires["isa"]) - set(here["isa"]))
        if lacking:
            return f"its kernels need {', '.join(lacking)}, which this CPU lacks"
        if requires["torch"] != here["torch"]:
            return f"its kernels need torch {requires['torch']}, this is {here['torch']}"
        return None

    def compile(self, program: Program, progress: Progress) -> Lowered:
        """Compile the components one after another, or take them from the cache."""
        lowered = Lowered(requires=_requires(), holds_weights=self.freeze)
        bodies = program.components
        for index, (name, gm) in enumerate(bodies.items()):
            progress(f"compiling {name}", index / len(bodies))
            started = time.perf_counter()
            members, cached = self._compile_cached(gm)
            seconds = time.perf_counter() - started
            files = {f"{name}.{kind}": content for kind, content in members.items()}
            lowered.members |= files
            lowered.bodies[name] = {"kernel": f"{name}.so", "threads": self._threads()}
            how = "from the cache" if cached else "compiled"
            log.info("%s: %s in %.1f s", name, how, seconds)
            progress(f"{name}: {how} in {seconds:.1f} s", (index + 1) / len(bodies))
        return lowered

    def load(self, image: Image) -> dict[str, Body]:
        """Map the libraries into this process and give them their weights."""
        if self.threads:
            torch.set_num_threads(self.threads)  # for the operators that call back into torch
        return {name: self._load(name, image) for name in image.graphs}

    def _load(self, name: str, image: Image) -> Body:
        graph = image.graphs[name]
        with tempfile.TemporaryDirectory(prefix="diffopt-") as folder:
            for kind in ("so", "json"):
                if f"{name}.{kind}" in image.members:
                    Path(folder, f"body.{kind}").write_bytes(image.members[f"{name}.{kind}"])
            runner = torch._C._aoti.AOTIModelContainerRunnerCpu(f"{folder}/body.so", 1)
        if not self.freeze:
            wanted = runner.get_constant_names_to_original_fqns()
            table = {key: _weight(image.tensors, graph, fqn) for key, fqn in wanted.items()}
            runner.update_constant_buffer(table, False, True, True)
            # The library keeps bare pointers: what they point to must live as long as it does.
            return _Kernel(runner, _strides(graph), list(table.values()))
        return _Kernel(runner, _strides(graph), [])

    def _threads(self) -> int:
        return self.threads or torch.get_num_threads()

    def _compile_cached(self, gm: fx.GraphModule) -> tuple[dict[str, bytes], bool]:
        key = cachedir.key(self._key(gm))
        if (found := cachedir.get(key)) is not None:
            return found, True
        members = self._compile(gm)
        cachedir.put(key, members)
        return members, False

    def _key(self, gm: fx.GraphModule) -> dict[str, Any]:
        """Return all that a library depends on, as JSON."""
        rows = serialize.graph_to_json(gm)
        for row in rows:
            for key in ("name", "where", "module"):
                row.pop(key, None)
            if row["op"] == "placeholder":
                del row["target"]
        tensors = {name: _content(t, self.freeze) for name, t in g.named_tensors(gm)}
        return {
            "graph": rows,
            "tensors": tensors,
            "options": [self.freeze, self.max_autotune, self._threads()],
            "requires": _requires(),
            "compiler": _compiler(),
            "torch": torch.__version__,
            "lowering": _source(),
        }

    def _compile(self, gm: fx.GraphModule, dims: Dims | None = None) -> dict[str, bytes]:
        """Return the files of one component: the library, and what it needs of other operators."""
        arguments = tuple(_example(n.meta["val"]) for n in g.placeholders(gm))
        shapes = _dynamic_shapes(len(arguments), dims) if dims else None
        with tempfile.TemporaryDirectory(prefix="diffopt-") as folder, _quiet(), torch.no_grad():
            exported = torch.export.export(gm, arguments, dynamic_shapes=shapes, strict=False)
            torch._inductor.aot_compile(exported.module(), arguments, options=self._options(folder))
            found = {p.suffix[1:]: p for p in Path(folder).rglob("*") if _is_product(p)}
            return {kind: path.read_bytes() for kind, path in sorted(found.items())}

    def _options(self, folder: str) -> dict[str, Any]:
        """Return the settings of the compiler."""
        settings = {
            "aot_inductor.package": True,
            "aot_inductor.output_path": folder,
            "aot_inductor.package_constants_in_so": self.freeze,
            # A small weight written into the code could not be changed without compiling again.
            "always_keep_tensor_constants": not self.freeze,
            "freezing": self.freeze,
            "max_autotune": self.max_autotune,
            "max_autotune_report_choices_stats": False,
            # Named threads: left to itself, the compiler sizes buffers for as many as there are
            # here and then uses as many as there are where the engine runs.
            "cpp.threads": self._threads(),
            "aot_inductor.enable_line_tables": False,
            "aot_inductor.enable_frame_pointer": False,
        }
        known = torch._inductor.config.get_config_copy()
        return {key: value for key, value in settings.items() if key in known}


class _Kernel:
    """A loaded library, as a function of flat arguments."""

    def __init__(self, runner: Any, strides: list[tuple[int, ...]], weights: list[Tensor]) -> None:
        self._run = runner.run
        self._strides = strides
        self._weights = weights

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        for index, stride in enumerate(self._strides):
            if tensors[index].stride() != stride:
                tensors[index] = lay_out(tensors[index], stride)
        outputs: list[Tensor] = self._run(tensors)
        return outputs


def _is_product(path: Path) -> bool:
    """Tell the library and the list of operators it calls back for from the steps to them."""
    return path.name.endswith((".wrapper.so", ".wrapper.json"))


def _example(value: Tensor) -> Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).zero_()


def _dynamic_shapes(count: int, dims: Dims) -> tuple[dict[int, Any], ...]:
    made: dict[str, Any] = {}
    for axes in dims.values():
        for name, low, high in axes.values():
            made.setdefault(name, torch.export.Dim(name, min=low, max=high))
    return tuple(
        {axis: made[name] for axis, (name, _, _) in dims.get(index, {}).items()}
        for index in range(count)
    )


def _weight(tensors: Mapping[str, Tensor], graph: Mapping[str, Any], name: str) -> Tensor:
    key, stride, _ = graph["tensors"][name]
    return lay_out(tensors[key], tuple(stride))


def _strides(graph: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Return the memory layout that each argument of a component was compiled for."""
    return [tuple(row["val"][2]) for row in graph["nodes"] if row["op"] == "placeholder"]


def _content(tensor: Tensor, by_value: bool) -> Any:
    what = [str(tensor.dtype), list(tensor.shape), list(tensor.stride())]
    if by_value:
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        what.append(hashlib.sha256(flat.numpy().data).hexdigest())
    return what


def _requires() -> dict[str, Any]:
    """Return what a library built here needs of the machine that is to run it."""
    flags: set[str] = set()
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                flags.update(line.partition(":")[2].split())
                break
    return {
        "platform": f"{platform.system().lower()}-{platform.machine()}",
        "isa": sorted(f for f in flags if f.startswith(_ISA)),
        "torch": ".".join(torch.__version__.split(".")[:2]),
    }


def _compiler() -> str | None:
    """Return the C++ compiler's name and version; None where there is none."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        command = get_cpp_compiler()
        text = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    except Exception:  # each torch version has its own kinds of errors for this
        return None
    return f"{command}: {text.stdout.partition(chr(10))[0]}"


@cache
def _source() -> str:
    """Return the hash of this file, whose settings decide what comes out of the compiler."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the compiler's warnings and autotuning tables from the user's terminal."""
    from torch._inductor import select_algorithm

    with warnings.catch_warnings(), mock.patch.object(select_algorithm, "PRINT_AUTOTUNE", False):
        warnings.simplefilter("ignore")
        yield
