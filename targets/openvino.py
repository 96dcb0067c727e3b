"""Runs every component with OpenVINO, on the CPU.

A component becomes an OpenVINO model, by way of ONNX. Models hold no weights: these are in the
engine file, stored once, and OpenVINO packs them for its kernels when the engine is loaded. So an
engine runs on any CPU, and a C++ compiler is needed nowhere.

Types are the program's own: bfloat16 where `cast(bf16)` has put it, and float32 in its islands.
Nothing is rounded that the program does not round.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

import torch

from diffopt import optional
from diffopt.core import Progress
from diffopt.errors import DiffoptError
from diffopt.ir.program import Program
from diffopt.lowering.compile_inputs import dynamic_bounds, not_on_cpu
from diffopt.lowering.executor import ComponentFunction
from diffopt.lowering.onnx import NEEDS, component_model, result_strides, weight_value
from diffopt.lowering.target import EngineContents, Lowered, ThreadedTarget

_TABLE = "(interfaces).json"
_DEVICES = {"cpu": "CPU", "intel-gpu": "GPU", "intel-npu": "NPU"}

log = logging.getLogger("diffopt")


@dataclass(frozen=True)
class Openvino(ThreadedTarget):
    """Run on this machine's CPU with OpenVINO."""

    kinds = ("cpu", "intel-gpu", "intel-npu")

    def refuses(self, program: Program) -> str | None:
        """Refuse programs that are not on the CPU, missing packages, and devices not found."""
        lacking = optional.lacks(*NEEDS, "openvino", extra="openvino")
        return lacking or not_on_cpu(program) or self._missing_device()

    def unfit(self, requires: Mapping[str, Any]) -> str | None:
        """Compare the installed version of OpenVINO with the engine's, and look for the device."""
        optional.check("openvino", extra="openvino")
        return optional.too_old("openvino", requires["openvino"]) or self._missing_device()

    def compile(self, program: Program, progress: Progress) -> Lowered:
        """Export the components, or read them from the cache, and convert them."""
        from diffopt.lowering import openvino_models

        members: dict[str, bytes] = {}
        table, bodies, wider = {}, {}, set()
        free = dynamic_bounds(program)
        for index, (name, gm) in enumerate(program.components.items()):
            progress(f"exporting {name}", index / len(program.components))
            if wide := openvino_models.wide_integers(gm):
                raise DiffoptError(
                    f"{name}: {wide} has whole numbers of more than 32 bits, in which OpenVINO"
                    " computes; use another target"
                )
            model = component_model(name, gm, free.get(name))
            try:
                files = openvino_models.convert(model)
            except DiffoptError as error:
                raise DiffoptError(f"{name}: {error.message}; use another target") from error
            members |= {f"{name}.{kind}": content for kind, content in files.items()}
            table[name] = openvino_models.interface(model)
            bodies[name] = {"kernel": f"{name}.xml"}
            if widened := openvino_models.widened_types(model, self._openvino_device()):
                bodies[name]["computes"] = "float32"
                wider |= widened
        if wider:
            log.warning(
                "OpenVINO has no kernels for %s on this device; computed in float32",
                " and ".join(sorted(wider)),
            )
        members[_TABLE] = json.dumps(table).encode()
        requires = {"openvino": optional.release("openvino")}
        return Lowered(members=members, requires=requires, bodies=bodies)

    def load(self, engine: EngineContents) -> dict[str, ComponentFunction]:
        """Compile the models for this machine, with the engine's weights."""
        optional.check("openvino", extra="openvino")
        from diffopt.lowering import openvino_models

        options = openvino_models.options(self.threads or torch.get_num_threads())
        bodies: dict[str, ComponentFunction] = {}
        table = json.loads(bytes(engine.members[_TABLE]))
        for name in engine.graphs:
            row = table[name]
            files = {kind: engine.members[f"{name}.{kind}"] for kind in ("xml", "bin")}
            values = {
                key: weight_value(engine, name, attribute)
                for key, attribute in row["weights"].items()
            }
            strides = result_strides(engine.graphs[name])
            try:
                bodies[name] = openvino_models.Session(
                    files, row["arguments"], values, strides, self._openvino_device(), options
                )
            except DiffoptError as error:
                raise DiffoptError(f"{name}: {error.message}; use another target") from error
        return bodies

    def reload(
        self,
        engine: EngineContents,
        bodies: Mapping[str, ComponentFunction],
        changed: Set[str],
    ) -> dict[str, ComponentFunction]:
        """Compile the models again that have changed weights."""
        graphs = {name: engine.graphs[name] for name in engine.reading(changed)}
        return {**bodies, **self.load(replace(engine, graphs=graphs))}

    def _openvino_device(self) -> str:
        """Return OpenVINO's name of the device."""
        return _DEVICES[self.hardware_kind()]

    def _missing_device(self) -> str | None:
        """Return that OpenVINO finds no device of this kind here, None if it does."""
        from diffopt.lowering import openvino_models

        wanted, found = self._openvino_device(), openvino_models.devices()
        if any(name.partition(".")[0] == wanted for name in found):
            return None
        return f"OpenVINO finds no {wanted} on this machine, but {', '.join(found)}"
