"""Compiles every component ahead of time for this machine's CPU, with AOTInductor.

A component becomes a shared library that reads its weights from the engine file, where they are
stored once, and which components share. The weights of layers are packed for oneDNN when the engine
is loaded; with `pack=false` they are read as they are stored, and a change in place is a change for
all. With `freeze` the libraries contain the packed weights instead, and constants are folded.
Quantized weights are always stored once and packed on loading (see `onednn`).

The libraries use all instructions of this CPU, so an engine says which it needs. They are cached
under the hash of the component's graph and of everything else that they depend on.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.core import Progress
from diffopt.errors import DiffoptError
from diffopt.ir import qdq
from diffopt.ir.dynamic_sizes import Bounds
from diffopt.ir.program import Program
from diffopt.lowering import aoti, compile_inputs, load_time_graph, onednn
from diffopt.lowering.compile_inputs import (
    component_key,
    dynamic_bounds,
    not_on_cpu,
    platform_tag,
    source_hash,
)
from diffopt.lowering.cpu_instructions import has_integer_products, instructions
from diffopt.lowering.executor import ComponentFunction
from diffopt.lowering.hardware import Hardware, hardware
from diffopt.lowering.target import EngineContents, Lowered, Target, option
from diffopt.storage import disk_cache

# Instruction sets that -march=native may use.
_ISA = ("avx", "amx", "fma", "bmi", "sse4", "f16c", "sha", "vaes", "gfni", "sve", "asimd", "i8mm")

_SETUP = "(setup).json"

log = logging.getLogger("diffopt")


@dataclass(frozen=True)
class Cpu(Target):
    """Compile for this machine's CPU with AOTInductor."""

    pack: bool | None = option(
        None,
        "pack the weights on loading, the default without freeze; false: components read those"
        " stored, which may be changed in place",
    )
    freeze: bool = option(False, "pack the weights into the kernels, instead of sharing them")
    threads: int = option(0, "threads to run on, set on loading; 0: as many as torch has now")
    max_autotune: bool = option(False, "try several kernels for each matrix product; wants freeze")

    def __post_init__(self) -> None:
        if self.pack and self.freeze:
            raise DiffoptError(
                "pack packs the weights on loading, freeze when the engine is built: choose one"
            )
        if self.threads < 0:
            raise DiffoptError(f"threads={self.threads}: wants 0 or more")
        if self.max_autotune and not self.freeze:
            raise DiffoptError(
                "max-autotune chooses among kernels for packed weights: add freeze=true"
            )

    @property
    def hardware(self) -> Hardware | None:
        """The CPU, scaled to the number of threads."""
        return (super().hardware or hardware("cpu")).with_cores(self.threads)

    def refuses(self, program: Program) -> str | None:
        """Refuse programs that are not on the CPU, and machines without a C++ compiler."""
        if (reason := not_on_cpu(program)) is not None:
            return reason
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
        """Read the components from the cache, or compile them in a process for each core."""
        lowered = onednn.lower(program.components, self._packs(), _lack())
        bodies = lowered.bodies
        if self.pack is False and (count := _narrow_convolutions(bodies)):
            log.warning(
                "the weights of %d convolutions in 16 bits are packed again in every call, which"
                " takes as long as 16 bits save: without pack=false they are once, on loading",
                count,
            )
        free = dynamic_bounds(program)
        keys = {name: disk_cache.key(self._key(gm, free.get(name))) for name, gm in bodies.items()}
        done: dict[str, dict[str, bytes]] = {}

        def report(name: str, members: dict[str, bytes], how: str) -> None:
            done[name] = members
            log.info("%s: %s", name, how)
            progress(f"{name}: {how}", len(done) / len(bodies))

        missing = {}
        for name, gm in bodies.items():
            if (entry := disk_cache.get(keys[name])) is None:
                missing[name] = gm
            else:
                report(name, entry, "from the cache")
        if missing:
            progress(f"compiling {', '.join(missing)}", len(done) / len(bodies))
        for name, members, seconds in self._compile(missing, free):
            disk_cache.put(keys[name], members)
            report(name, members, f"compiled in {seconds:.1f} s")
        members = {f"{n}.{kind}": done[n][kind] for n in bodies for kind in done[n]}
        if lowered.setup.takes:
            members[_SETUP] = json.dumps(lowered.setup.to_json()).encode()
        return Lowered(
            members=members,
            requires=_requires(),
            bodies={
                name: {**lowered.about(name, f"{name}.so"), "threads": self._threads()}
                for name in bodies
            },
            holds_weights=self.freeze,
            load_time_weights=list(lowered.setup.sources.values()),
        )

    def _compile(
        self, bodies: Mapping[str, fx.GraphModule], sizes: Mapping[str, Bounds]
    ) -> Iterator[tuple[str, dict[str, bytes], float]]:
        # Autotuning takes times, which other processes would disturb.
        processes = 1 if self.max_autotune else len(os.sched_getaffinity(0))
        return aoti.compile_bodies(
            bodies, self._settings(), processes, with_weights=self.freeze, sizes=sizes
        )

    def load(self, engine: EngineContents) -> dict[str, ComponentFunction]:
        """Load the libraries, and set their weights."""
        if self.threads:
            torch.set_num_threads(self.threads)  # for the operators that call back into torch
        constants: dict[str, list[Tensor]] = {}
        if _SETUP in engine.members:
            data = json.loads(bytes(engine.members[_SETUP]))
            constants = load_time_graph.run_setup(data, engine.weight)
        return {name: self._load(name, engine, constants.get(name, [])) for name in engine.graphs}

    def reload(
        self,
        engine: EngineContents,
        bodies: Mapping[str, ComponentFunction],
        changed: Set[str],
    ) -> dict[str, ComponentFunction]:
        """Pack again what follows from the changed weights, and open their libraries again."""
        new: dict[str, dict[int, Tensor]] = {}
        if _SETUP in engine.members:
            data = json.loads(bytes(engine.members[_SETUP]))
            new = load_time_graph.rerun_setup(data, engine, changed)
        result = dict(bodies)
        reading = engine.reading(changed)
        for name, function in bodies.items():
            packed = new.get(name, {})
            assert isinstance(function, aoti.LibraryFunction)
            if packed or name in reading:
                constants = [packed.get(i, t) for i, t in enumerate(function.constants)]
                result[name] = self._load(name, engine, constants)
        return result

    def _load(
        self, name: str, engine: EngineContents, constants: list[Tensor]
    ) -> ComponentFunction:
        graph = engine.graphs[name]
        kinds = {kind: f"{name}.{kind}" for kind in ("so", "json")}
        members = {k: engine.members[file] for k, file in kinds.items() if file in engine.members}
        weight_of = None if self.freeze else partial(engine.weight, name)
        return aoti.component_function(aoti.open_library(members, weight_of), graph, constants)

    def _packs(self) -> bool:
        return not self.freeze if self.pack is None else self.pack

    def _threads(self) -> int:
        return self.threads or torch.get_num_threads()

    def _key(self, gm: fx.GraphModule, sizes: Bounds | None = None) -> dict[str, Any]:
        """Return everything that a library depends on, as JSON."""
        return {
            **component_key(gm, sizes, by_value=self.freeze),
            "settings": self._settings(),
            "requires": _requires(),
            "compiler": _compiler(),
            "torch": torch.__version__,
            "lowering": _source(),
        }

    def _settings(self) -> dict[str, Any]:
        """Return the configuration of the compiler."""
        return {
            "aot_inductor.package_constants_in_so": self.freeze,
            # A small weight written into the code could not be changed without compiling again.
            "always_keep_tensor_constants": not self.freeze,
            "freezing": self.freeze,
            # The channels-last layout would transpose every weight in every call.
            "layout_optimization": self.freeze,
            "max_autotune": self.max_autotune,
            "max_autotune_report_choices_stats": False,
            # By default Inductor sizes buffers for the threads of this machine, and uses as many
            # as there are where the engine runs.
            "cpp.threads": self._threads(),
            "aot_inductor.enable_line_tables": False,
            "aot_inductor.enable_frame_pointer": False,
        }


def _narrow_convolutions(bodies: Mapping[str, fx.GraphModule]) -> int:
    """Return how many convolutions compute in 16 bits."""
    layers = [layer for gm in bodies.values() for layer in qdq.layers(gm) if layer.convolution]
    return sum(layer.node.meta["val"].element_size() == 2 for layer in layers)


def _requires() -> dict[str, Any]:
    """Return what a library that is built here requires of a machine, as JSON."""
    return {
        "platform": platform_tag(),
        "isa": sorted(f for f in instructions() if f.startswith(_ISA)),
        "torch": ".".join(torch.__version__.split(".")[:2]),
    }


def _lack() -> str | None:
    """Return why integer products cannot run on this machine, None if they can."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "this torch has no oneDNN"
    if not has_integer_products():
        return "this CPU has no products of 8-bit integers (AVX-VNNI or AMX)"
    return None


def _compiler() -> str | None:
    """Return the command and version of the C++ compiler, None if there is none."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        command = get_cpp_compiler()
        text = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    except Exception:  # each torch version has its own kinds of errors for this
        return None
    return f"{command}: {text.stdout.partition(chr(10))[0]}"


@cache
def _source() -> str:
    """Return the hash of the sources of the lowering."""
    modules = aoti, compile_inputs, load_time_graph, onednn
    return source_hash(str(module.__file__) for module in modules)
