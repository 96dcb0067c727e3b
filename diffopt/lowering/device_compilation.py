"""Lowerings that compile on the GPU: what is done without it, what is left to do there, loading.

What needs no GPU is done anywhere: quantized layers become CUDA's matrix products of 8 and 4 bits
(see `gemm`). The engine holds these graphs beside its weights, which are stored once. The rest
needs the GPU, so `diffopt finish FILE` does it there and keeps the result; where it was not done,
what loads the engine does it, and keeps the result in the cache of that machine:

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
from diffopt.ir import serialize, strides
from diffopt.ir.dynamic_sizes import Bounds, bounds_from_json, bounds_to_json
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
_MADE = "(made).json"

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten._unsafe_view.default)

log = logging.getLogger("diffopt")


@dataclass(frozen=True)
class Package:
    """A component that is compiled.

    Attributes:
        content: What AOTInductor can load.
        about: What the manifest says about it, as JSON.
    """

    content: bytes
    about: dict[str, Any] = field(default_factory=dict)


class Deferred(Target):
    """Lower components as far as that goes without the GPU, and compile them on it.

    A subclass is a dataclass. It has the option `cuda_graph`, to replay a run as one CUDA graph.

    Attributes:
        by_value: Packages hold the weights that they need; else they get the engine's on loading.
    """

    kinds: ClassVar[tuple[str, ...]] = ("cuda",)
    embeds_weights: ClassVar[bool] = False

    cuda_graph: bool

    def package(self, gm: fx.GraphModule, sizes: Bounds) -> Package:
        """Compile a component on the GPU, where its tensors are; they are empty unless `by_value`.

        Args:
            gm: The component.
            sizes: Those that may change.
        """
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Return, as JSON, the configuration of the compiler."""
        raise NotImplementedError

    def compiler(self) -> dict[str, Any]:
        """Return, as JSON, what a package can be used with: it is compiled again for another."""
        return {
            "torch": ".".join(torch.__version__.split(".")[:2]),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        }

    def strides(self, gm: fx.GraphModule) -> dict[str, list[int]]:
        """Return the memory layouts of those weights that are to be read in another one."""
        return {}

    def refuses(self, program: Program) -> str | None:
        """Refuse what was not traced on the CPU."""
        return not_on_cpu(program)

    def compile(self, program: Program, progress: Progress) -> Lowered:
        """Lower every component as far as it can be done without the GPU."""
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
        """Tell whether what is compiled fits this GPU and torch."""
        made = engine.members.get(_MADE)
        return made is not None and json.loads(bytes(made)) == self.compiler()

    def finish(self, engine: EngineContents, progress: Progress) -> Finished:
        """Compile the components for the GPU at hand, or take them from the cache."""
        done = Finished({_MADE: json.dumps(self.compiler()).encode()})
        for index, name in enumerate(engine.graphs):
            progress(f"compiling {name}", index / len(engine.graphs))
            made = self._made(name, engine)
            done.members[f"{name}.pt2"] = made["pt2"]
            done.bodies[name] = json.loads(made["json"])
        return done

    def _made(self, name: str, engine: EngineContents) -> dict[str, bytes]:
        """Return a component's package as an entry of the cache, from there or made now."""
        started = time.perf_counter()
        body = json.loads(bytes(engine.members[f"{name}.json"]))
        weights = _Weights(engine.graphs[name]["tensors"], body["strides"], _OnGpu(engine.tensors))
        used = sorted({row["target"] for row in body["nodes"] if row["op"] == "get_attr"})
        key = disk_cache.key(self._key(body, used, weights))
        if (found := disk_cache.get(key)) is not None:
            log.info("%s: from the cache", name)
            return found
        tensors = {
            part: weights[part] if self.embeds_weights else weights.empty(part) for part in used
        }
        gm = serialize.graph_from_json(body["nodes"], name, tensors, {})
        move_to_device(gm, cuda_runtime.DEVICE)
        package = self.package(gm, bounds_from_json(body["sizes"]))
        made = {"pt2": package.content, "json": json.dumps(package.about).encode()}
        disk_cache.put(key, made)
        log.info("%s: compiled in %.1f s", name, time.perf_counter() - started)
        return made

    def _key(self, body: Any, used: Iterable[str], weights: _Weights) -> dict[str, Any]:
        """Return all that a package depends on, as JSON."""
        return {
            "body": body,
            "tensors": {part: weights.identity(part, self.embeds_weights) for part in used},
            "settings": self.settings(),
            "compiler": self.compiler(),
            "torch": torch.__version__,
            "lowering": _source(inspect.getfile(type(self))),
        }

    def load(self, engine: EngineContents) -> dict[str, ComponentFunction]:
        """Map the packages into this process; what they read of the weights is on the GPU once."""
        members: Mapping[str, bytes | memoryview] = engine.members
        if not self.is_finished(engine):
            log.warning("compiling for this GPU and torch; `diffopt finish FILE` does it for good")
            members = {**members, **self.finish(engine, silent).members}
        tensors = _OnGpu(engine.tensors)
        further: dict[str, list[Tensor]] = {}
        if _SETUP in members:
            data = json.loads(bytes(members[_SETUP]))
            further = load_time_graph.run_setup(
                data, partial(_attribute, engine, tensors), cuda_runtime.DEVICE
            )
        return {
            name: self._load(name, engine, members, tensors, further.get(name, []))
            for name in engine.graphs
        }

    def _load(
        self,
        name: str,
        engine: EngineContents,
        members: Mapping[str, bytes | memoryview],
        tensors: _OnGpu,
        further: list[Tensor],
    ) -> ComponentFunction:
        weights = None
        if not self.embeds_weights:
            strides = json.loads(bytes(members[f"{name}.json"]))["strides"]
            weights = _Weights(engine.graphs[name]["tensors"], strides, tensors)
        library = aoti.open_package(members[f"{name}.pt2"], weights)
        return aoti.component_function(library, engine.graphs[name], further)

    def unfit(self, requires: Mapping[str, Any]) -> str | None:
        """Compare the GPU and its platform with what the kernels need."""
        return cuda_runtime.unfit(requires, "kernels")

    def executor(
        self, root: fx.GraphModule, bodies: Mapping[str, ComponentFunction]
    ) -> cuda_runtime.CudaExecutor:
        """Run what is between the components on the GPU too."""
        return cuda_runtime.CudaExecutor(
            SlotExecutor(root, bodies, cuda_runtime.DEVICE), self.cuda_graph
        )

    def _device(self) -> Hardware:
        device = self.hardware
        assert device is not None  # a device is named, as no CPU is among `kinds`
        return device


@dataclass
class _OnGpu:
    """An engine's tensors on the GPU: each once in every memory layout that it is read in."""

    tensors: Mapping[str, Tensor]
    made: dict[tuple[str, tuple[int, ...]], Tensor] = field(default_factory=dict)

    def get(self, key: str, stride: tuple[int, ...]) -> Tensor:
        if (key, stride) not in self.made:
            self.made[key, stride] = with_strides(self.tensors[key].to(cuda_runtime.DEVICE), stride)
        return self.made[key, stride]


@dataclass
class _Weights:
    """A component's weights by name, in the memory layout that it is compiled for."""

    table: Mapping[str, Any]
    strides: Mapping[str, list[int]]
    tensors: _OnGpu

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors.get(*self._where(name))

    def empty(self, name: str) -> Tensor:
        """Return a tensor on the GPU like a weight, with any values."""
        key, stride = self._where(name)
        stored = self.tensors.tensors[key]
        return torch.empty_strided(
            stored.shape, stride, dtype=stored.dtype, device=cuda_runtime.DEVICE
        )

    def identity(self, name: str, by_value: bool) -> Any:
        """Return, as JSON, what of a weight a package depends on."""
        key, stride = self._where(name)
        return [stride, compile_inputs.tensor_key(self.tensors.tensors[key], by_value)]

    def _where(self, name: str) -> tuple[str, tuple[int, ...]]:
        key, stride, _ = self.table[name]
        return key, tuple(self.strides.get(name, stride))


def _attribute(engine: EngineContents, tensors: _OnGpu, component: str, name: str) -> Tensor:
    return _Weights(engine.graphs[component]["tensors"], {}, tensors)[name]


def move_to_device(gm: fx.GraphModule, device: str) -> None:
    """Let a graph compute on a device, with its tensors there, and return values laid out as here.

    Kernels there, and weights in other memory layouts, lay out values in other ways.
    """
    set_device(gm, device)
    before = [node.meta["val"] for node in g.outputs(gm)]
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            node.meta["val"] = g.fake(example_tensor(node.meta["val"], device))
        elif node.op == "get_attr":
            node.meta["val"] = g.fake(g.attribute(gm, str(node.target)))
        elif node.op == "call_function":
            if node.target in _VIEWS:  # of what may be laid out otherwise
                node.target = aten.reshape.default
            node.meta["val"] = g.infer_value(node)
    restore_outputs(gm, before)
    gm.recompile()


@cache
def _source(target: str) -> str:
    """Return the hash of a lowering, which decides what comes out of the compiler."""
    shared = (
        aoti.__file__,
        compile_inputs.__file__,
        cuda_gemm.__file__,
        load_time_graph.__file__,
        strides.__file__,
        __file__,
    )
    return source_hash((*shared, target))
