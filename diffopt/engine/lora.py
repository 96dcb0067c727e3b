"""Low-rank adapters (LoRA) of a loaded engine: they change its weights in place, and are taken off.

An engine's tensors are the pipeline's weights, or were made of them by passes. How they change with
the pipeline's weights is in the file (see `ir.weight_origins`), and a LoRA's change goes the same
way. Of weights for which that is not known, layers are refused by name.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffopt.engine.computed_constants import ComputedConstant, Run
from diffopt.engine.engine_file import EngineFile
from diffopt.engine.lora_files import Layer, read
from diffopt.engine.lora_names import Names
from diffopt.errors import DiffoptError
from diffopt.ir import serialize, weight_origins
from diffopt.ir.program import CONSTANT

log = logging.getLogger("diffopt")


@dataclass(eq=False)
class _Lora:
    """A LoRA that is loaded, and the layer that changes each weight of the pipeline."""

    path: str
    scale: float
    layers: Mapping[str, Layer]


class Loras:
    """The adapters of a loaded engine.

    Args:
        file: The engine, whose tensors are changed in place.
        run: Runs a graph that calls its components.
    """

    def __init__(self, file: EngineFile, run: Run) -> None:
        self._file, self._run = file, run
        self._loras: dict[str, _Lora] = {}
        self._before: dict[str, Tensor] = {}
        self._stale: set[str] = set()
        program = file.program_json()
        data = program.get("origins")
        if data is None:
            raise DiffoptError(
                f"{file.path}: does not say which weights of the pipeline it has, as engines of"
                " earlier versions and of functions do not; build it again from the pipeline"
            )
        with file.archive.making("member program.json"):
            self._origins = self._read(data["tensors"])
            low, _ = program.get("batch") or (None, None)
            self._constants = self._read_constants(data["computed"], program["graphs"], low)
        self._closed = {name: by for by, names in data["closed"].items() for name in names}
        self._names = Names(data["weights"])
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._followers: dict[str, list[str]] = {}
        for key, origin in self._origins.items():
            for weight in weight_origins.weights(origin):
                self._shapes[weight.name] = weight.shape
                self._followers.setdefault(weight.name, []).append(key)

    def _read(self, rows: Mapping[str, Any]) -> dict[str, weight_origins.Origin]:
        tensors = self._file.tensors
        origins = {k: weight_origins.from_json(row, tensors) for k, row in rows.items()}
        for key, origin in origins.items():
            shape = tuple(tensors[key].shape)
            if weight_origins.shape_of(origin) != shape or not tensors[key].is_floating_point():
                raise ValueError(f"{key!r} of the shape {list(shape)} comes from another")
        return origins

    def _read_constants(
        self, rows: Mapping[str, list[str]], graphs: Mapping[str, Any], requests: int | None
    ) -> dict[str, ComputedConstant]:
        constants = {}
        for number, (key, names) in enumerate(rows.items()):
            data = graphs[f"{CONSTANT}{number})"]
            tensors = {n: self._file.tensors[k] for n, (k, _, _) in data["tensors"].items()}
            graph = serialize.graph_from_json(data["nodes"], "constant", tensors, {})
            tensor = self._file.tensors[key]
            constants[key] = ComputedConstant(tensor, frozenset(names), graph, graphs, requests)
        return constants

    @property
    def scales(self) -> dict[str, float]:
        """The scale of each LoRA by name, in the order in which they were loaded."""
        return {name: lora.scale for name, lora in self._loras.items()}

    @property
    def arguments(self) -> list[tuple[str, float, str]]:
        """What to call `load` with for the same adapters."""
        return [(lora.path, lora.scale, name) for name, lora in self._loras.items()]

    def load(self, path: str | os.PathLike[str], scale: float, name: str | None) -> set[str]:
        """Add a LoRA; return the keys of the tensors that it has changed.

        A file that does not fit as a whole is a `DiffoptError`, and changes nothing.
        """
        name = Path(path).stem if name is None else name
        if name in self._loras:
            raise DiffoptError(f"a LoRA '{name}' is loaded already: give this one another name")
        layers = self._matched(path, read(path))
        self._expect_computable(path, layers)
        self._loras[name] = _Lora(os.path.abspath(path), _number(scale), layers)
        return self._apply(layers)

    def set_scale(self, name: str, scale: float) -> set[str]:
        """Change the scale of a LoRA; return the keys of the tensors that it has changed."""
        lora = self._find(name)
        lora.scale = _number(scale)
        return self._apply(lora.layers)

    def unload(self, name: str | None) -> set[str]:
        """Take off a LoRA, or all; return the keys of the tensors that have changed."""
        taken = [name] if name is not None else list(self._loras)
        layers = {weight for each in taken for weight in self._find(each).layers}
        for each in taken:
            del self._loras[each]
        return self._apply(layers)

    def _find(self, name: str) -> _Lora:
        if name not in self._loras:
            known = ", ".join(self._loras) or "none"
            raise DiffoptError(f"there is no LoRA '{name}'; loaded: {known}")
        return self._loras[name]

    def _matched(self, path: str | os.PathLike[str], layers: Iterable[Layer]) -> dict[str, Layer]:
        """Return the layers by the weight of the pipeline that they change."""
        found: dict[str, Layer] = {}
        unknown, closed, misfits, unread = [], [], [], []
        for layer in layers:
            weight = self._names.find(layer.key)
            if weight is None:
                unknown.append(layer.key)
            elif weight in self._closed:
                closed.append(weight)
            elif weight not in self._shapes:
                unread.append(weight)
            elif reason := layer.misfit(self._shapes[weight]):
                misfits.append(reason)
            elif weight in found:
                misfits.append(f"{found[weight].key} and {layer.key} are the same layer")
            else:
                found[weight] = layer
        if unknown:
            raise DiffoptError(
                f"{path}: {_some(unknown)}: the engine's pipeline has no such layers"
            )
        if closed:
            raise DiffoptError(
                f"{path}: changes {_some(closed)}, of which {self._closed[closed[0]]} has computed"
                " something else: build an engine without that, or fuse the LoRA into the pipeline"
                " and build it again"
            )
        if misfits:
            raise DiffoptError(f"{path}: {misfits[0]}")
        if not found:
            raise DiffoptError(f"{path}: changes {_some(unread)}, which the engine never reads")
        if unread:
            log.warning("%s changes %s, which the engine never reads", path, _some(unread))
        return found

    def _expect_computable(self, path: str | os.PathLike[str], changed: Collection[str]) -> None:
        """Raise a `DiffoptError` where a constant depends on weights, and nobody knows how."""
        for constant in self._constants.values():
            names = sorted(constant.names.intersection(changed))
            if names and not constant.is_found(self._run):
                raise DiffoptError(
                    f"{path}: changes {_some(names)}, of which a constant was computed that the"
                    " engine cannot compute again, as of a bound prompt: make the prompt an input,"
                    " or fuse the LoRA into the pipeline, and build it again"
                )

    def refresh(self) -> set[str]:
        """Compute constants anew, once components have the changed weights; return their keys."""
        keys, self._stale = self._stale, set()
        used = {weight for lora in self._loras.values() for weight in lora.layers}
        with torch.no_grad():
            for key in keys:
                constant = self._constants[key]
                if key not in self._before:
                    self._before[key] = constant.tensor.clone()
                if constant.names.isdisjoint(used):
                    constant.tensor.copy_(self._before.pop(key))
                else:
                    constant.compute(self._run)
        return keys

    def _apply(self, changed: Collection[str]) -> set[str]:
        """Compute the tensors anew that follow from weights of the pipeline; return their keys."""
        for key, constant in self._constants.items():
            if not constant.names.isdisjoint(changed):
                self._stale.add(key)
        keys = {key for weight in changed for key in self._followers[weight]}
        used = {weight for lora in self._loras.values() for weight in lora.layers}
        with torch.no_grad():
            for key in keys:
                origin, tensor = self._origins[key], self._file.tensors[key]
                if key not in self._before:
                    self._before[key] = tensor.clone()
                names = {weight.name for weight in weight_origins.weights(origin)} & used
                if names:
                    dtype = torch.promote_types(tensor.dtype, torch.float32)
                    changes = {name: self._change(name, dtype) for name in names}
                    change = weight_origins.change(origin, changes)
                    assert change is not None
                    # Rounded once, when it is copied.
                    tensor.copy_(self._before[key].to(dtype, copy=True).add_(change))
                else:
                    tensor.copy_(self._before.pop(key))
        return keys

    def _change(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return how all adapters together change a weight of the pipeline."""
        loras = [lora for lora in self._loras.values() if name in lora.layers]
        shape = self._shapes[name]
        first, *rest = (lora.layers[name].change(shape, dtype, lora.scale) for lora in loras)
        return sum(rest, first)


def _number(scale: float) -> float:
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise DiffoptError(f"scale={scale!r}: must be a finite number")
    return float(scale)


def _some(names: list[str]) -> str:
    """Return the first few of some names, and how many there are."""
    rest = len(names) - 3
    return ", ".join(names[:3]) + (f" and {rest} more" if rest > 0 else "")
