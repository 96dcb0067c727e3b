"""What lowerings through ONNX share: models of components, cached, and what engines run them on."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from diffopt.ir import graph as g
from diffopt.ir import serialize
from diffopt.ir.dynamic_sizes import Bounds
from diffopt.lowering.compile_inputs import component_key, source_hash
from diffopt.lowering.onnx.export import NEEDS, export
from diffopt.lowering.target import EngineContents
from diffopt.storage import disk_cache

if TYPE_CHECKING:
    import onnx

_OPSET = 21

log = logging.getLogger("diffopt")


def component_model(name: str, gm: fx.GraphModule, sizes: Bounds | None) -> onnx.ModelProto:
    """Return a component as an ONNX model without weights, from the cache if it is there."""
    import onnx

    key = disk_cache.key(_key(name, gm, sizes))
    if (cached := disk_cache.get(key)) is not None:
        log.info("%s: from the cache", name)
        return onnx.load_from_string(cached["onnx"])
    model = export(gm, name, opset=_OPSET, sizes=sizes, weights=False)
    disk_cache.put(key, {"onnx": model.SerializeToString(deterministic=True)})
    return model


def _key(name: str, gm: fx.GraphModule, sizes: Bounds | None) -> dict[str, Any]:
    """Return everything that an exported model depends on, as JSON."""
    return {
        **component_key(gm, sizes, by_value=False),
        "names": [name, *(node.name for node in g.placeholders(gm))],
        "modules": [node.meta.get("module", "") for node in gm.graph.nodes],
        "opset": _OPSET,
        "torch": torch.__version__,
        "packages": {name: importlib.metadata.version(name) for name in NEEDS},
        "exporter": _source(),
    }


@cache
def _source() -> str:
    """Return the hash of the sources of the exporter."""
    return source_hash(sorted(Path(__file__).parent.glob("*.py")))


def weight_value(engine: EngineContents, component: str, name: str) -> Tensor:
    """Return a component's weight without the strides of the trace; complex numbers as pairs."""
    key, _, _ = engine.graphs[component]["tensors"][name]
    tensor = engine.tensors[key]
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def result_strides(graph: Mapping[str, Any]) -> list[tuple[int, ...] | None]:
    """Return the strides of each result of a component; None: contiguous."""
    rows = graph["nodes"]
    results = [rows[result["node"]] for result in rows[-1]["args"][0]["tuple"]]
    values = [serialize.decode_value(row["val"]) for row in results]
    return [None if value.is_contiguous() else value.stride() for value in values]
