"""Exports components and builds their plans."""

import time
from collections.abc import Mapping
from typing import Any

from torch import fx

from diffopt.errors import DiffoptError
from diffopt.ir.program import Program
from diffopt.lowering import legality, onnx
from diffopt.lowering.hardware import hardware
from diffopt.lowering.trt import library, qdq_legalize
from diffopt.lowering.trt.builder import Settings, build


def refused(program: Program, devices: list[str]) -> dict[str, str]:
    """Return why devices cannot run a program, of those that cannot."""
    reasons = {device: legality.unsupported(program, hardware(device)) for device in devices}
    return {device: reason for device, reason in reasons.items() if reason}


def component(name: str, gm: fx.GraphModule, devices: list[str]) -> dict[str, Any]:
    """Build a component for some devices; return times, sizes and the builder's report."""
    started = time.perf_counter()
    row: dict[str, Any] = {"nodes": len(gm.graph.nodes)}
    try:
        model = onnx.export(qdq_legalize.rewrite(gm), name)
    except DiffoptError as error:
        return {**row, "not exported": error.message.partition(": ")[2]}
    row |= {"operators": len(model.graph.node), "export seconds": _since(started), "devices": {}}
    for device in devices:
        row["devices"][device] = _build(name, model, device)
    return row


def _build(name: str, model: Any, device: str) -> dict[str, Any]:
    capability = hardware(device).capability
    assert capability is not None
    started = time.perf_counter()
    try:
        chosen = library.find_library("tensorrt-rtx", device, capability)
        plan = build(name, model, chosen, Settings(), {})
    except DiffoptError as error:
        return {"refused": error.message}
    return {**plan.about, "seconds": _since(started)}


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 2)


def whole(rows: Mapping[str, Any], device: str) -> bool:
    """Tell whether all components have a plan for a device."""
    return all("bytes" in row.get("devices", {}).get(device, {}) for row in rows.values())
