"""Runs every component with ONNX Runtime on the CPU.

A component becomes an ONNX model without weights: these are in the engine file, stored once. What
is computed from them alone (a transposed matrix, 4-bit numbers as integers) is computed by a setup
model when the engine is loaded, once for all components.

Layers whose weight and input are both quantized run on 8-bit integers. bfloat16 and float16 save
space only: ONNX Runtime has no CPU kernels for them, so they are computed in float32.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffopt import optional
from diffopt.core import Progress
from diffopt.errors import DiffoptError
from diffopt.ir import graph as g
from diffopt.ir.program import Program
from diffopt.lowering.compile_inputs import dynamic_bounds, not_on_cpu
from diffopt.lowering.cpu_instructions import saturates
from diffopt.lowering.executor import ComponentFunction
from diffopt.lowering.onnx import NEEDS, component_model, result_strides, weight_value
from diffopt.lowering.target import EngineContents, Lowered, ThreadedTarget, option

_TABLE = "(weights).json"
_SETUP = "(setup).onnx"

log = logging.getLogger("diffopt")


@dataclass(frozen=True)
class Onnxruntime(ThreadedTarget):
    """Run on this machine's CPU with ONNX Runtime; 16-bit types are computed in float32."""

    pack: bool = option(True, "copy the weights into what kernels like best, for each component")

    def refuses(self, program: Program) -> str | None:
        """Refuse programs that are not on the CPU, and environments without the packages."""
        return optional.lacks(*NEEDS, "onnxruntime", extra="onnx") or not_on_cpu(program)

    def unfit(self, requires: Mapping[str, Any]) -> str | None:
        """Compare the installed version of ONNX Runtime with the engine's."""
        optional.check("onnxruntime", extra="onnx")
        return optional.too_old("onnxruntime", requires["onnxruntime"])

    def compile(self, program: Program, progress: Progress) -> Lowered:
        """Export the components, or read them from the cache, and choose kernels."""
        from diffopt.lowering.onnx import ort_kernels, weight_precompute

        free, adapted = dynamic_bounds(program), {}
        for index, (name, gm) in enumerate(program.components.items()):
            progress(f"exporting {name}", index / len(program.components))
            model = component_model(name, gm, free.get(name))
            adapted[name] = ort_kernels.adapt(model, integer_convolutions=not saturates())
        tensor_ids = {
            (name, key): id(tensor)
            for name, gm in program.components.items()
            for key, tensor in g.named_tensors(gm)
        }
        precomputed = weight_precompute.precompute_weights(
            {name: component.model for name, component in adapted.items()}, tensor_ids
        )
        bodies: dict[str, dict[str, Any]] = {}
        for name, component in adapted.items():
            bodies[name] = {"kernel": f"{name}.onnx"}
            if component.layers:
                bodies[name]["layers"] = component.layers
            if component.widened:
                bodies[name]["computes"] = "float32"
        widened = [name for name, component in adapted.items() if component.widened]
        if widened:
            log.warning(
                "%s: ONNX Runtime's CPU provider has no kernels for 16 bits; computed in float32",
                ", ".join(widened),
            )
        requires = {"onnxruntime": optional.release("onnxruntime")}
        return Lowered(members=_members(precomputed), requires=requires, bodies=bodies)

    def load(self, engine: EngineContents) -> dict[str, ComponentFunction]:
        """Start a session for each component, with the engine's weights."""
        optional.check("onnxruntime", extra="onnx")
        from diffopt.lowering.onnx import sessions

        threads = self.threads or torch.get_num_threads()
        table = json.loads(bytes(engine.members[_TABLE]))
        results: list[Tensor] = []
        if _SETUP in engine.members:
            weights = {
                name: weight_value(engine, *source) for name, source in table["setup"].items()
            }
            results = sessions.run_setup(bytes(engine.members[_SETUP]), weights, threads)
        bodies: dict[str, ComponentFunction] = {}
        for name, row in table["components"].items():
            constants = {
                key: weight_value(engine, name, attribute).reshape(shape)
                for key, (attribute, shape) in row["weights"].items()
            }
            constants |= {key: results[index] for key, index in row["setup"].items()}
            model = bytes(engine.members[f"{name}.onnx"])
            if saturates() and b"ConvInteger" in model:
                raise DiffoptError(
                    f"{name}: its convolutions on integers need a CPU with AVX-VNNI or AMX: build"
                    " it again for this machine"
                )
            strides = result_strides(engine.graphs[name])
            try:
                bodies[name] = sessions.Session(model, constants, strides, threads, self.pack)
            except DiffoptError as error:
                raise DiffoptError(f"{name}: {error.message}; use another target") from error
        return bodies


def _members(precomputed: Any) -> dict[str, bytes]:
    from diffopt.lowering.onnx import gs_tools

    table = {
        "setup": precomputed.sources,
        "components": {
            name: {
                "weights": gs_tools.external_locations(model, precomputed.results[name]),
                "setup": precomputed.results[name],
            }
            for name, model in precomputed.models.items()
        },
    }
    members = {_TABLE: json.dumps(table).encode()}
    if precomputed.setup is not None:
        members[_SETUP] = precomputed.setup.SerializeToString(deterministic=True)
    for name, model in precomputed.models.items():
        members[f"{name}.onnx"] = model.SerializeToString(deterministic=True)
    return members
