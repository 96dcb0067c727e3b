"""Runs every component with ONNX Runtime on the CPU.

A component becomes an ONNX model without its weights: those stay in the engine file, stored once.
What follows from them alone (a matrix turned around, 4-bit numbers as integers) is computed by a
model of its own when the engine is loaded, once for all components.

Layers whose weight and input are both quantized run on 8-bit integers. bfloat16 and float16 save
space only: ONNX Runtime has no kernels for them on the CPU, so they are computed in float32.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

import diffopt.lowering.onnx
from diffopt import optional
from diffopt.core import Progress
from diffopt.errors import DiffoptError
from diffopt.ir import graph as g
from diffopt.ir import serialize
from diffopt.ir.dynamic_sizes import Bounds
from diffopt.ir.program import Program
from diffopt.lowering.compile_inputs import elsewhere, free_sizes, identity, source
from diffopt.lowering.executor import Body
from diffopt.lowering.hardware import Hardware, hardware
from diffopt.lowering.onnx import NEEDS, export
from diffopt.lowering.target import Image, Lowered, Target, option
from diffopt.storage import disk_cache

_TABLE = "(weights).json"
_SETUP = "(setup).onnx"
_OPSET = 21

log = logging.getLogger("diffopt")


@dataclass(frozen=True)
class Onnxruntime(Target):
    """Run on this machine's CPU with ONNX Runtime; 16-bit types are computed in float32."""

    threads: int = option(0, "threads to run on; 0: as many as torch has when it is loaded")
    pack: bool = option(True, "copy the weights into what kernels like best, for each component")

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise DiffoptError(f"threads={self.threads}: wants 0 or more")

    @property
    def hardware(self) -> Hardware | None:
        """The CPU, or as much of it as the threads have."""
        return (super().hardware or hardware("cpu")).share(self.threads)

    def refuses(self, program: Program) -> str | None:
        """Refuse what is not on the CPU, and a Python without the packages."""
        return optional.lacks(*NEEDS, "onnxruntime", extra="onnx") or elsewhere(program)

    def unfit(self, requires: Mapping[str, Any]) -> str | None:
        """Compare ONNX Runtime with the one that the models were made for."""
        optional.check("onnxruntime", extra="onnx")
        here = _version()
        if _numbers(here) < _numbers(requires["onnxruntime"]):
            return f"its models need onnxruntime {requires['onnxruntime']}, this is {here}"
        return None

    def compile(self, program: Program, progress: Progress) -> Lowered:
        """Export the components, or take them from the cache, and choose kernels."""
        from diffopt.lowering.onnx import ort_kernels, weight_precompute

        free, adapted = free_sizes(program), {}
        for index, (name, gm) in enumerate(program.components.items()):
            progress(f"exporting {name}", index / len(program.components))
            model = _exported(name, gm, free.get(name))
            adapted[name] = ort_kernels.adapt(model)
        owners = {
            (name, key): id(tensor)
            for name, gm in program.components.items()
            for key, tensor in g.named_tensors(gm)
        }
        made = weight_precompute.separate(
            {name: own.model for name, own in adapted.items()}, owners
        )
        bodies: dict[str, dict[str, Any]] = {}
        for name, own in adapted.items():
            bodies[name] = {"kernel": f"{name}.onnx"}
            if own.layers:
                bodies[name]["layers"] = own.layers
            if own.widened:
                bodies[name]["computes"] = "float32"
        widened = [name for name, own in adapted.items() if own.widened]
        if widened:
            log.warning(
                "%s: ONNX Runtime's CPU provider has no kernels for 16 bits; computed in float32",
                ", ".join(widened),
            )
        return Lowered(members=_members(made), requires={"onnxruntime": _version()}, bodies=bodies)

    def load(self, image: Image) -> dict[str, Body]:
        """Start a session for each component, with the engine's weights."""
        optional.check("onnxruntime", extra="onnx")
        from diffopt.lowering.onnx import sessions

        threads = self.threads or torch.get_num_threads()
        table = json.loads(bytes(image.members[_TABLE]))
        results: list[Tensor] = []
        if _SETUP in image.members:
            weights = {name: _weight(image, *source) for name, source in table["setup"].items()}
            results = sessions.run_setup(bytes(image.members[_SETUP]), weights, threads)
        bodies: dict[str, Body] = {}
        for name, own in table["components"].items():
            constants = {
                key: _weight(image, name, attribute).reshape(shape)
                for key, (attribute, shape) in own["weights"].items()
            }
            constants |= {key: results[index] for key, index in own["setup"].items()}
            model = bytes(image.members[f"{name}.onnx"])
            strides = _strides(image.graphs[name])
            try:
                bodies[name] = sessions.Session(model, constants, strides, threads, self.pack)
            except DiffoptError as error:
                raise DiffoptError(f"{name}: {error.message}; use another target") from error
        return bodies


def _weight(image: Image, component: str, name: str) -> Tensor:
    key, _, _ = image.graphs[component]["tensors"][name]
    tensor = image.tensors[key]
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _strides(graph: Mapping[str, Any]) -> list[tuple[int, ...] | None]:
    """Return the memory layout of each result of a component; None: contiguous."""
    rows = graph["nodes"]
    results = [rows[result["node"]] for result in rows[-1]["args"][0]["tuple"]]
    values = [serialize.decode_value(row["val"]) for row in results]
    return [None if value.is_contiguous() else value.stride() for value in values]


def _members(made: Any) -> dict[str, bytes]:
    from diffopt.lowering.onnx import gs_tools

    table = {
        "setup": made.sources,
        "components": {
            name: {
                "weights": gs_tools.outside_names(model, made.takes[name]),
                "setup": made.takes[name],
            }
            for name, model in made.models.items()
        },
    }
    members = {_TABLE: json.dumps(table).encode()}
    if made.setup is not None:
        members[_SETUP] = made.setup.SerializeToString(deterministic=True)
    for name, model in made.models.items():
        members[f"{name}.onnx"] = model.SerializeToString(deterministic=True)
    return members


def _exported(name: str, gm: fx.GraphModule, sizes: Bounds | None) -> Any:
    """Return a component as ONNX, from the cache if it was exported before."""
    import onnx

    key = disk_cache.key(_key(name, gm, sizes))
    if (found := disk_cache.get(key)) is not None:
        log.info("%s: from the cache", name)
        return onnx.load_from_string(found["onnx"])
    model = export(gm, name, opset=_OPSET, sizes=sizes, weights=False)
    disk_cache.put(key, {"onnx": model.SerializeToString(deterministic=True)})
    return model


def _key(name: str, gm: fx.GraphModule, sizes: Bounds | None) -> dict[str, Any]:
    """Return all that an exported model depends on, as JSON."""
    return {
        **identity(gm, sizes, by_value=False),
        "names": [name, *(node.name for node in g.placeholders(gm))],
        "modules": [node.meta.get("module", "") for node in gm.graph.nodes],
        "opset": _OPSET,
        "torch": torch.__version__,
        "packages": {name: importlib.metadata.version(name) for name in NEEDS},
        "exporter": source(sorted(Path(diffopt.lowering.onnx.__file__).parent.glob("*.py"))),
    }


def _version() -> str:
    return ".".join(importlib.metadata.version("onnxruntime").split(".")[:2])


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]
