"""What targets that compile components have in common: the sizes left open, and the cache's key."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.ir import batching, serialize
from diffopt.ir import graph as g
from diffopt.ir.dynamic_sizes import Bounds, bounds, bounds_to_json
from diffopt.ir.program import Program
from diffopt.ir.strides import empty_like
from diffopt.storage import container


def dynamic_bounds(program: Program) -> dict[str, Bounds]:
    """Return the sizes that may change, of requests or tokens, of components that have some."""
    if program.lengths:
        return bounds(program.root, program.lengths)
    low, high = program.batch or (1, 1)
    if low == high:
        return {}
    axes = batching.batch_axes(program.root, high)
    return {
        name: {index: {axis: (low, high)} for index, axis in own.items()}
        for name, own in axes.items()
        if own
    }


def not_on_cpu(program: Program) -> str | None:
    """Say which value of a program is not on the CPU."""
    for name, gm in {"the program": program.root, **program.components}.items():
        for node in gm.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, Tensor) and value.device.type not in ("cpu", "meta"):
                return f"{node.name} of {name} is on {value.device}; trace the model on the CPU"
    return None


def platform_tag() -> str:
    """Return the operating system and the kind of processor, which libraries are made for."""
    return f"{platform.system().lower()}-{platform.machine()}"


def example_tensor(value: Tensor, device: str = "cpu") -> Tensor:
    """Return a tensor of zeros like a value, to compile or export with."""
    # Made there, since a copy to another device has another memory layout where there are gaps.
    return empty_like(value, device).zero_()


def dynamic_shapes(count: int, sizes: Bounds) -> tuple[dict[int, Any], ...]:
    """Return what `torch.export` is to leave open; it finds out itself which sizes are related."""
    return tuple(
        {
            axis: torch.export.Dim.DYNAMIC(min=low, max=high)
            for axis, (low, high) in sizes.get(index, {}).items()
        }
        for index in range(count)
    )


def component_key(gm: fx.GraphModule, sizes: Bounds | None, by_value: bool) -> dict[str, Any]:
    """Return, as JSON, all of a component that what is compiled from it depends on.

    Args:
        gm: The component.
        sizes: Those that may change.
        by_value: Whether that holds the weights, or gets them when it runs.
    """
    rows = serialize.graph_to_json(gm)
    for row in rows:
        for key in ("name", "where", "module"):
            row.pop(key, None)
        if row["op"] == "placeholder":
            del row["target"]
    return {
        "graph": rows,
        "tensors": {name: tensor_key(t, by_value) for name, t in g.named_tensors(gm)},
        "sizes": bounds_to_json(sizes or {}),
    }


def source_hash(files: Iterable[str | Path]) -> str:
    """Return the hash of a lowering's source files, which decide what comes out of it."""
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()


def tensor_key(tensor: Tensor, by_value: bool) -> Any:
    """Return, as JSON, what of a tensor something depends on that is compiled."""
    what = [str(tensor.dtype), list(tensor.shape), list(tensor.stride())]
    if by_value:
        what.append(hashlib.sha256(container.raw(tensor)).hexdigest())
    return what
