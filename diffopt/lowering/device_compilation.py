"""Lowerings that compile on the GPU, after what can be done without it.

Without a GPU, quantized layers become CUDA's matrix products of 8 and 4 bits (see `cuda_gemm`). The
engine contains these graphs, and its weights once. `diffopt finish FILE` compiles them on the GPU
and keeps the result in the file. For an engine that is not finished, loading it does the same, and
keeps the result in the machine's cache:

    written anywhere    NAME.json, (setup).json
    finished on a GPU   NAME.pt2, (made).json
"""

from __future__ import annotations

import inspect
import json
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from diffopt.ir import graph as g
from diffopt.ir import serialize
from diffopt.ir.allowed_operators import find_any
from diffopt.ir.dynamic_sizes import Bounds, bounds_from_json, bounds_to_json
from diffopt.ir.op_sets import RESHAPES
from diffopt.ir.program import Program
from diffopt.ir.strides import restore_outputs, with_strides
from diffopt.lowering import aoti, compile_inputs, cuda_gemm, cuda_runtime, load_time_graph
from diffopt.lowering.compile_inputs import dynamic_bounds, example_tensor, not_on_cpu, source_hash
from diffopt.lowering.executor import ComponentFunction, SlotExecutor, set_device
from diffopt.lowering.hardware import Hardware
from diffopt.lowering.target import EngineContents, Finished, Lowered, Target
from diffopt.progress import Progress, silent
from diffopt.storage import disk_cache

_SETUP = "(setup).json"
_COMPILER = "(made).json"

aten = torch.ops.aten

log = logging.getLogger("diffopt")


@dataclass(frozen=True)
class Package:
    """A compiled component.

    Attributes:
        content: A package of AOTInductor.
        about: Its entry in the manifest, as JSON.
    """

    content: bytes
    about: dict[str, Any] = field(default_factory=dict)


class Deferred(Target):
    """Lower components as far as possible without the GPU, and compile them on it.

    A subclass is a dataclass with the option `cuda_graph`, to replay a run as one CUDA graph.

    Attributes:
        embeds_weights: Whether packages contain weights, instead of sharing the engine's.
    """

    kinds: ClassVar[tuple[str, ...]] = ("cuda",)
    input_devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    embeds_weights: ClassVar[bool] = False

    cuda_graph: bool

    def package(self, gm: fx.GraphModule, sizes: Bounds) -> Package:
        """Compile a component on the GPU; without `embeds_weights` its weights have no values.

        Args:
            gm: The component.
            sizes: Those that may change.
        """
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Return, as JSON, the configuration of the compiler."""
        raise NotImplementedError

    def compiler(self) -> dict[str, Any]:
        """Return, as JSON, the versions and GPU that a package runs with; others recompile it."""
        return {
            "torch": ".".join(torch.__version__.split(".")[:2]),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        }

    def strides(self, gm: fx.GraphModule) -> dict[str, list[int]]:
        """Return the strides of weights whose layout is changed on loading."""
        return {}

    def refuses(self, program: Program) -> str | None:
        """Refuse programs that are not on the CPU."""
        return not_on_cpu(program)

    def compile(self, program: Program, progress: Progress) -> Lowered:
        """Lower every component as far as possible without the GPU."""
        progress("lowering", None)
        free = dynamic_bounds(program)
        lowered = cuda_gemm.lower(program.components, self._device(), free)
        members = {}
        for name, gm in lowered.bodies.items():
            body = {
                "nodes": serialize.graph_to_json(gm),
                "sizes": bounds_to_json(free.get(name, {})),
                "strides": self.strides(gm),
            }
            members[f"{name}.json"] = json.dumps(body).encode()
        if lowered.setup.takes:
            members[_SETUP] = json.dumps(lowered.setup.to_json()).encode()
        return Lowered(
            members=members,
            requires=cuda_runtime.requires(self._device()),
            bodies={name: lowered.about(name, f"{name}.pt2") for name in lowered.bodies},
            finished=False,
        )

    def is_finished(self, engine: EngineContents) -> bool:
        """Tell whether the packages were compiled for this GPU and torch."""
        compiler = engine.members.get(_COMPILER)
        return compiler is not None and json.loads(bytes(compiler)) == self.compiler()

    def finish(self, engine: EngineContents, progress: Progress) -> Finished:
        """Compile the components for this machine's GPU, or read them from the cache."""
        finished = Finished({_COMPILER: json.dumps(self.compiler()).encode()})
        for index, name in enumerate(engine.graphs):
            progress(f"compiling {name}", index / len(engine.graphs))
            entry = self._package(name, engine)
            finished.members[f"{name}.pt2"] = entry["pt2"]
            finished.bodies[name] = json.loads(entry["json"])
        return finished

    def _package(self, name: str, engine: EngineContents) -> dict[str, bytes]:
        """Return a component's package as an entry of the cache, compiled if it has none."""
        started = time.perf_counter()
        body = json.loads(bytes(engine.members[f"{name}.json"]))
        weights = _Weights(
            engine.graphs[name]["tensors"], body["strides"], _GpuTensors(engine.tensors)
        )
        names = sorted({row["target"] for row in body["nodes"] if row["op"] == "get_attr"})
        key = disk_cache.key(self._key(body, names, weights))
        if (entry := disk_cache.get(key)) is not None:
            log.info("%s: from the cache", name)
            return entry
        tensors = {
            part: weights.get(part) if self.embeds_weights else weights.empty(part)
            for part in names
        }
        gm = serialize.graph_from_json(body["nodes"], name, tensors, {}, find_any)
        move_to_device(gm, cuda_runtime.DEVICE)
        package = self.package(gm, bounds_from_json(body["sizes"]))
        entry = {"pt2": package.content, "json": json.dumps(package.about).encode()}
        disk_cache.put(key, entry)
        log.info("%s: compiled in %.1f s", name, time.perf_counter() - started)
        return entry

    def _key(self, body: Any, names: Iterable[str], weights: _Weights) -> dict[str, Any]:
        """Return everything that a package depends on, as JSON."""
        return {
            "body": body,
            "tensors": {part: weights.identity(part, self.embeds_weights) for part in names},
            "settings": self.settings(),
            "compiler": self.compiler(),
            "torch": torch.__version__,
            "lowering": _source(inspect.getfile(type(self))),
        }

    def load(self, engine: EngineContents) -> dict[str, ComponentFunction]:
        """Load the packages, and their weights to the GPU, each once."""
        members: Mapping[str, bytes | memoryview] = engine.members
        if not self.is_finished(engine):
            log.warning("compiling for this GPU and torch; `diffopt finish FILE` does it for good")
            members = {**members, **self.finish(engine, silent).members}
        tensors = _GpuTensors(engine.tensors)
        constants: dict[str, list[Tensor]] = {}
        if _SETUP in members:
            data = json.loads(bytes(members[_SETUP]))
            constants = load_time_graph.run_setup(
                data, partial(_attribute, engine, tensors), cuda_runtime.DEVICE
            )
        return {
            name: self._load(name, engine, members, tensors, constants.get(name, []))
            for name in engine.graphs
        }

    def _load(
        self,
        name: str,
        engine: EngineContents,
        members: Mapping[str, bytes | memoryview],
        tensors: _GpuTensors,
        constants: list[Tensor],
    ) -> ComponentFunction:
        weight_of = None
        if not self.embeds_weights:
            strides = json.loads(bytes(members[f"{name}.json"]))["strides"]
            weight_of = _Weights(engine.graphs[name]["tensors"], strides, tensors).get
        library = aoti.open_package(members[f"{name}.pt2"], weight_of)
        return aoti.component_function(library, engine.graphs[name], constants)

    def unfit(self, requires: Mapping[str, Any]) -> str | None:
        """Compare the GPU and the platform with what the kernels need."""
        return cuda_runtime.unfit(requires, "kernels")

    def executor(
        self, root: fx.GraphModule, bodies: Mapping[str, ComponentFunction]
    ) -> cuda_runtime.CudaExecutor:
        """Run the operators between the components on the GPU too."""
        return cuda_runtime.CudaExecutor(
            SlotExecutor(root, bodies, cuda_runtime.DEVICE), self.cuda_graph
        )

    def _device(self) -> Hardware:
        device = self.hardware
        assert device is not None  # a device is named, as no CPU is among `kinds`
        return device


@dataclass
class _GpuTensors:
    """An engine's tensors on the GPU: each once for all strides with which it is read."""

    tensors: Mapping[str, Tensor]
    copies: dict[tuple[str, tuple[int, ...]], Tensor] = field(default_factory=dict)

    def get(self, key: str, stride: tuple[int, ...]) -> Tensor:
        if (key, stride) not in self.copies:
            self.copies[key, stride] = with_strides(
                self.tensors[key].to(cuda_runtime.DEVICE), stride
            )
        return self.copies[key, stride]


@dataclass
class _Weights:
    """A component's weights by name, with the strides for which it is compiled."""

    table: Mapping[str, Any]
    strides: Mapping[str, list[int]]
    tensors: _GpuTensors

    def get(self, name: str) -> Tensor:
        """Return a weight, on the GPU."""
        return self.tensors.get(*self._key_and_stride(name))

    def empty(self, name: str) -> Tensor:
        """Return an uninitialized tensor like a weight, on the GPU."""
        key, stride = self._key_and_stride(name)
        stored = self.tensors.tensors[key]
        return torch.empty_strided(
            stored.shape, stride, dtype=stored.dtype, device=cuda_runtime.DEVICE
        )

    def identity(self, name: str, by_value: bool) -> Any:
        """Return the part of a cache key that identifies a weight, as JSON."""
        key, stride = self._key_and_stride(name)
        return [stride, compile_inputs.tensor_key(self.tensors.tensors[key], by_value)]

    def _key_and_stride(self, name: str) -> tuple[str, tuple[int, ...]]:
        key, stride, _ = self.table[name]
        return key, tuple(self.strides.get(name, stride))


def _attribute(engine: EngineContents, tensors: _GpuTensors, component: str, name: str) -> Tensor:
    return _Weights(engine.graphs[component]["tensors"], {}, tensors).get(name)


def move_to_device(gm: fx.GraphModule, device: str) -> None:
    """Move a graph to a device, on which its tensors are; its results keep their strides.

    The device's kernels, and weights with other strides, change the strides of values.
    """
    set_device(gm, device)
    before = [node.meta["val"] for node in g.outputs(gm)]
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            node.meta["val"] = g.fake(example_tensor(node.meta["val"], device))
        elif node.op == "get_attr":
            node.meta["val"] = g.fake(g.attribute(gm, str(node.target)))
        elif node.op == "call_function":
            if node.target in RESHAPES:  # strides may have changed
                node.target = aten.reshape.default
            node.meta["val"] = g.infer_value(node)
    restore_outputs(gm, before)
    gm.recompile()


@cache
def _source(target: str) -> str:
    """Return the hash of the sources of a lowering."""
    shared = (
        aoti.__file__,
        compile_inputs.__file__,
        cuda_gemm.__file__,
        load_time_graph.__file__,
        __file__,
    )
    return source_hash((*shared, target))
