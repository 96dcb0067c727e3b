"""Where the elements of a tensor lie in memory, which kernels and orders of sums depend on.

torch's `empty_like` and copies to another device keep no strides that leave gaps; these do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.ir import graph as g

aten = torch.ops.aten


def empty_like(value: Tensor, device: str | torch.device = "cpu") -> Tensor:
    """Return a tensor of any values with the type, shape and strides of another."""
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)


def with_strides(tensor: Tensor, stride: Sequence[int]) -> Tensor:
    """Return the values with other strides; where no element can be moved, the tensor itself."""
    stride = tuple(stride)
    if tensor.stride() == stride or tensor.numel() == 0 or 0 in stride:
        return tensor
    empty = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)
    return empty.copy_(tensor)


def restore_outputs(gm: fx.GraphModule, before: Sequence[Any]) -> None:
    """Copy outputs of a graph that have other strides than before: who reads them relies on these.

    Args:
        gm: The graph.
        before: The fake value of each output, as it was.
    """
    outputs = g.outputs(gm)
    for index, (node, value) in enumerate(zip(outputs, before, strict=True)):
        if _geometry(node.meta["val"]) != _geometry(value):
            with gm.graph.inserting_before(g.output_node(gm)):
                outputs[index] = _copy(gm.graph, node, value)
    g.set_outputs(gm, outputs)


def _copy(graph: fx.Graph, node: fx.Node, like: Tensor) -> fx.Node:
    """Return a copy of a node's value with the strides of another, if they are dense."""
    stride = like.stride()
    if node.meta["val"].shape != like.shape or node.meta["val"].clone().stride() == stride:
        return g.call(graph, _CLONE, node, like=node)
    order = sorted(range(like.dim()), key=lambda axis: -stride[axis])
    back = sorted(range(like.dim()), key=order.__getitem__)
    rows = g.call(graph, aten.permute.default, node, order, like=node)
    copy = g.call(graph, _CLONE, rows, memory_format=torch.contiguous_format, like=node)
    return g.call(graph, aten.permute.default, copy, back, like=node)


_CLONE = aten.clone.default


def _geometry(value: Any) -> tuple[Any, ...] | None:
    if not isinstance(value, Tensor):
        return None
    return tuple(value.shape), value.stride(), value.storage_offset()
