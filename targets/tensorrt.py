"""Builds a TensorRT plan of every component, through ONNX.

Plans are built and run by TensorRT for RTX or by TensorRT, whichever is installed and supports the
device. TensorRT for RTX builds without a GPU. Types are those of the graph, and quantized layers
are rewritten to what TensorRT has kernels for (see `qdq_legalize`).

A plan contains its weights. Plans are cached under the hash of the component's graph and weights,
and of everything else that they depend on.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import fx

import diffopt.lowering.onnx
import diffopt.lowering.trt
from diffopt import optional
from diffopt.errors import DiffoptError
from diffopt.ir import graph as g
from diffopt.ir.dynamic_sizes import Bounds
from diffopt.ir.nodes import is_call
from diffopt.ir.program import Program
from diffopt.lowering import cuda_runtime, legality
from diffopt.lowering.compile_inputs import component_key, dynamic_bounds, source_hash
from diffopt.lowering.executor import ComponentFunction, SlotExecutor
from diffopt.lowering.onnx import export
from diffopt.lowering.onnx.export import NEEDS
from diffopt.lowering.target import EngineContents, Lowered, Target, option
from diffopt.lowering.trt import library, plan_runtime, qdq_legalize
from diffopt.lowering.trt.builder import Ranges, Settings, build
from diffopt.lowering.trt.library import Library
from diffopt.progress import Progress, within
from diffopt.storage import disk_cache
from diffopt.transforms.sparsity_2_4 import sparse_layers

aten = torch.ops.aten

_BUILD = "(build).json"

_PRODUCTS = (
    aten.linear.default,
    aten.matmul.default,
    aten.bmm.default,
    aten.mm.default,
    aten.addmm.default,
    aten.scaled_dot_product_attention.default,
)

_PACKAGES = ("torch", "onnx", "onnxscript", "onnx-graphsurgeon")

log = logging.getLogger("diffopt")


@dataclass(frozen=True)
class Tensorrt(Target):
    """Build TensorRT plans, for NVIDIA GPUs."""

    kinds: ClassVar[tuple[str, ...]] = ("cuda",)
    input_devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    reads_weights: ClassVar[bool] = False

    builder: Literal["auto", "tensorrt", "tensorrt-rtx"] = option(
        "auto", "the package to build with; auto: tensorrt if it can here, else tensorrt-rtx"
    )
    level: int | None = option(
        None, "how long to search for faster kernels, from 0 to 5; none: the builder's own default"
    )
    workspace: int = option(0, "MiB that kernels may use besides their data; 0: all there is")
    stream_weights: bool = option(
        False, "leave in the host's memory the weights that do not fit into the GPU's"
    )
    keep_weights: bool = option(
        False, "keep the weights beside the plans too, so that the target eager can run the engine"
    )
    cuda_graph: bool = option(
        False, "replay a whole run as one CUDA graph, from the second on with inputs of a shape"
    )

    def __post_init__(self) -> None:
        Settings(self.level, self.workspace)  # says what cannot be

    def refuses(self, program: Program) -> str | None:
        """Refuse devices that no installed builder supports, and types that TensorRT lacks."""
        try:
            optional.check(*NEEDS, extra="onnx")
            chosen = self._library()
        except DiffoptError as error:
            return error.message
        for name, gm in program.components.items():
            for node in gm.graph.nodes:
                if (reason := _refused(node, chosen)) is not None:
                    return f"{node.name} of {name}: {reason}"
        return None

    def compile(self, program: Program, progress: Progress) -> Lowered:
        """Read the plans from the cache, or build them one after another."""
        chosen = self._library()
        free = dynamic_bounds(program)
        members: dict[str, bytes] = {}
        names: dict[str, Any] = {}
        about: dict[str, dict[str, Any]] = {}
        count = len(program.components)
        for index, (name, gm) in enumerate(program.components.items()):
            step_progress = within(progress, index, count, f"{name}: ")
            key = disk_cache.key(self._key(gm, free.get(name), chosen))
            entry = disk_cache.get(key)
            if entry is None:
                started = time.perf_counter()
                entry = self._build(name, gm, free.get(name), chosen, step_progress)
                disk_cache.put(key, entry)
                step_progress(f"built in {time.perf_counter() - started:.1f} s", 1.0)
            else:
                step_progress("from the cache", 1.0)
            members[f"{name}.plan"] = entry["plan"]
            row = json.loads(entry["json"])
            names[name] = row["names"]
            about[name] = {"kernel": f"{name}.plan", **row["about"]}
        members[_BUILD] = json.dumps({"builder": chosen.name, "names": names}).encode()
        return Lowered(
            members=members,
            requires=self._requires(chosen),
            bodies=about,
            holds_weights=not self.keep_weights,
        )

    def _build(
        self,
        name: str,
        gm: fx.GraphModule,
        sizes: Bounds | None,
        chosen: Library,
        progress: Progress,
    ) -> dict[str, bytes]:
        progress("exporting to ONNX", 0.0)
        model = export(qdq_legalize.rewrite(gm), name, sizes=sizes)
        names = {
            "inputs": [value.name for value in model.graph.input],
            "outputs": [value.name for value in model.graph.output],
        }
        ranges = _ranges(gm, names["inputs"], sizes)
        progress("building", 0.5)
        second_half = within(progress, 1, 2)
        plan = build(name, model, chosen, self._settings(gm), ranges, second_half)
        for warning in plan.warnings:
            log.info("%s: %s", name, warning)
        text = json.dumps({"names": names, "about": plan.about})
        return {"plan": plan.content, "json": text.encode()}

    def _settings(self, gm: fx.GraphModule) -> Settings:
        is_sparse = any(True for _ in sparse_layers(gm))
        return Settings(self.level, self.workspace, self.stream_weights, is_sparse)

    def _library(self) -> Library:
        device = self.hardware
        if device is None or device.capability is None:
            raise DiffoptError("it needs a GPU of a known compute capability")
        return library.find_library(self.builder, device.name, device.capability)

    def _requires(self, chosen: Library) -> dict[str, Any]:
        device = self.hardware
        assert device is not None
        return {
            **cuda_runtime.requires(device),
            "builder": chosen.name,
            "version": chosen.version,
        }

    def _key(self, gm: fx.GraphModule, sizes: Bounds | None, chosen: Library) -> dict[str, Any]:
        """Return everything that a plan depends on, as JSON."""
        return {
            **component_key(gm, sizes, by_value=True),
            "settings": asdict(self._settings(gm)),
            "requires": {**self._requires(chosen), "device": None},
            # TensorRT has timed kernels on this kind of GPU.
            "gpu": torch.cuda.get_device_name() if chosen.name == "tensorrt" else None,
            "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
            "lowering": _source(),
        }

    def unfit(self, requires: Mapping[str, Any]) -> str | None:
        """Compare the GPU, the platform and the installed TensorRT with what the plans need."""
        if (reason := cuda_runtime.unfit(requires, "plans")) is not None:
            return reason
        name = requires["builder"]
        if not library.is_installed(name):
            return f"its plans need the package {name}, which is not installed"
        if (version := library.load_library(name).version) != requires["version"]:
            return f"its plans need {name} {requires['version']}, this is {version}"
        return None

    def load(self, engine: EngineContents) -> dict[str, ComponentFunction]:
        """Load the plans with the TensorRT that has built them."""
        build_info = json.loads(bytes(engine.members[_BUILD]))
        chosen = library.load_library(build_info["builder"])
        return {
            name: plan_runtime.PlanFunction(
                name,
                chosen,
                engine.members[f"{name}.plan"],
                **build_info["names"][name],
                stream_weights=self.stream_weights,
                eager=self.cuda_graph,
            )
            for name in engine.graphs
        }

    def executor(
        self, root: fx.GraphModule, bodies: Mapping[str, ComponentFunction]
    ) -> cuda_runtime.CudaExecutor:
        """Run the operators between the components on the GPU too."""
        return cuda_runtime.CudaExecutor(
            SlotExecutor(root, bodies, cuda_runtime.DEVICE), self.cuda_graph
        )


def _refused(node: fx.Node, chosen: Library) -> str | None:
    """Return why TensorRT cannot run a node, None if it can."""
    if (
        node.op == "placeholder"
        and (kind := node.meta["val"].dtype) not in plan_runtime.DTYPES.values()
    ):
        return f"TensorRT has no type {str(kind).removeprefix('torch.')}"
    if is_call(node, *_PRODUCTS) and (number := legality.product_format(node)):
        return chosen.lacks(number)
    return None


def _ranges(gm: fx.GraphModule, names: list[str], sizes: Bounds | None) -> Ranges:
    """Return the smallest and the largest shape of each argument with dynamic sizes."""
    ranges = {}
    for index, node in enumerate(g.placeholders(gm)):
        if axes := (sizes or {}).get(index):
            low, high = list(node.meta["val"].shape), list(node.meta["val"].shape)
            for axis, bounds in axes.items():
                low[axis], high[axis] = bounds
            ranges[names[index]] = tuple(low), tuple(high)
    return ranges


@cache
def _source() -> str:
    """Return the hash of the sources that turn a component into a plan."""
    folders = (
        Path(str(package.__file__)).parent
        for package in (diffopt.lowering.onnx, diffopt.lowering.trt)
    )
    return source_hash(path for folder in folders for path in sorted(folder.glob("*.py")))
