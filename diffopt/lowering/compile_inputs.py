"""Inputs of compilers: dynamic sizes, example arguments, and the keys of the cache."""

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
    """Return the bounds of dynamic sizes, of requests or tokens, of components that have some."""
    if program.lengths:
        return bounds(program.root, program.lengths)
    low, high = program.batch or (1, 1)
    if low == high:
        return {}
    axes = batching.batch_axes(program.root, high)
    return {
        name: {index: {axis: (low, high)} for index, axis in arguments.items()}
        for name, arguments in axes.items()
        if arguments
    }


def not_on_cpu(program: Program) -> str | None:
    """Return which value of a program is not on the CPU, None if all are."""
    for name, gm in {"the program": program.root, **program.components}.items():
        for node in gm.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, Tensor) and value.device.type not in ("cpu", "meta"):
                return f"{node.name} of {name} is on {value.device}; trace the model on the CPU"
    return None


def platform_tag() -> str:
    """Return operating system and architecture, such as `linux-x86_64`."""
    return f"{platform.system().lower()}-{platform.machine()}"


def example_tensor(value: Tensor, device: str = "cpu") -> Tensor:
    """Return a tensor of zeros like a value, to compile or export with."""
    # `.to(device)` would drop gaps between the elements.
    return empty_like(value, device).zero_()


def dynamic_shapes(count: int, sizes: Bounds) -> tuple[dict[int, Any], ...]:
    """Return the `dynamic_shapes` of `torch.export` for `count` arguments.

    Dimensions are unnamed: `torch.export` infers which are equal.
    """
    return tuple(
        {
            axis: torch.export.Dim.DYNAMIC(min=low, max=high)
            for axis, (low, high) in sizes.get(index, {}).items()
        }
        for index in range(count)
    )


def component_key(gm: fx.GraphModule, sizes: Bounds | None, by_value: bool) -> dict[str, Any]:
    """Return the part of a cache key that identifies a component, as JSON.

    Args:
        gm: The component.
        sizes: Its dynamic sizes.
        by_value: Whether compiled code contains the weights, so that their values count.
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
    """Return the hash of a lowering's source files and of `diffopt.ir`, with which it is written.

    It is part of the key of everything that they produce.
    """
    used = [*files, *sorted(Path(serialize.__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in used)).hexdigest()


def tensor_key(tensor: Tensor, by_value: bool) -> Any:
    """Return the part of a cache key that identifies a tensor, as JSON."""
    key = [str(tensor.dtype), list(tensor.shape), list(tensor.stride())]
    if by_value:
        key.append(hashlib.sha256(container.raw_bytes(tensor)).hexdigest())
    return key
