"""The flat inputs of a run, checked before a kernel sees them.

A compiled kernel reads memory as the shapes at its compilation say: a smaller tensor is read past
its end, another type as other numbers. The check is a comparison of a few fields for each input;
only what differs in how it lies in memory, and not in what it holds, is copied.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.errors import DiffoptError
from diffopt.host.arguments import short
from diffopt.ir import graph as g
from diffopt.ir.dynamic_sizes import Length, free_axes
from diffopt.ir.printing import format_type

_ALIGNMENT = 64
"""Bytes, to which torch aligns memory: a GPU's kernels fail on less than 16, and libraries for CPUs
choose kernels by it, which add up in another order."""


@dataclasses.dataclass(frozen=True)
class _Input:
    """What an input must be; axes of no fixed size are those in `free`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    free: frozenset[int]

    def placed(self, tensor: Tensor) -> Tensor:
        """Return the tensor with the strides of the captured one, a copy where it has others."""
        stride = self.stride
        if tensor.shape != self.shape:  # of another size: in the order of the captured one
            order = sorted(range(tensor.ndim), key=lambda axis: (-stride[axis], axis))
            whole = torch.empty(tensor.shape, device="meta").permute(order).contiguous()
            inverse = [order.index(axis) for axis in range(tensor.ndim)]
            stride = tuple(whole.permute(inverse).stride())
        if tensor.stride() == stride:
            return tensor
        result = torch.empty_strided(tensor.shape, stride, dtype=self.dtype, device=tensor.device)
        return result.copy_(tensor)


class FlatInputs:
    """The types that the inputs of a graph have, and the check of new ones."""

    def __init__(
        self,
        root: fx.GraphModule,
        batch: tuple[int, int] | None,
        lengths: Sequence[Length],
        devices: Collection[str],
        *,
        limited: bool = True,
    ) -> None:
        """Prepare the check.

        Args:
            root: The graph.
            batch: The fewest and the most requests of one run, the first axis of all inputs.
            lengths: Numbers of tokens that no graph fixes.
            devices: The types of devices on which inputs may be.
            limited: Whether the numbers of tokens are within those that kernels were built for.
        """
        self._limited = limited
        self._batch, self._lengths, self._devices = batch, list(lengths), frozenset(devices)
        self._inputs = []
        for index, node in enumerate(g.placeholders(root)):
            value: Tensor = node.meta["val"]
            axes = free_axes(lengths, index)  # of a request: without the axis of requests
            free = frozenset([0, *(axis + 1 for axis in axes)] if batch else axes)
            shape, stride = tuple(value.shape), tuple(value.stride())
            self._inputs.append(_Input(node.name, value.dtype, shape, stride, free))

    def checked(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors as kernels may read them.

        Raises:
            DiffoptError: They are of another number, or one is of another shape, type or device.
        """
        if len(tensors) != len(self._inputs):
            names = ", ".join(each.name for each in self._inputs)
            raise DiffoptError(
                f"{len(tensors)} inputs for {len(self._inputs)} of the graph: {names}"
            )
        checked = [
            tensor
            if (
                type(tensor) is Tensor
                and tensor.dtype is wanted.dtype
                and tensor.shape == wanted.shape
                and tensor.stride() == wanted.stride
                and tensor.device.type == "cpu"
                and "cpu" in self._devices
                and not (tensor.is_conj() or tensor.is_neg())
                and tensor.data_ptr() % _ALIGNMENT == 0
            )
            else self._one(wanted, tensor)
            for wanted, tensor in zip(self._inputs, tensors, strict=True)
        ]
        if self._batch or self._lengths:
            self._check_sizes(checked)
        return checked

    def _one(self, wanted: _Input, tensor: Any) -> Tensor:
        """Return an input that is not just as at capture; a `DiffoptError` where it may not be."""
        if not isinstance(tensor, Tensor):
            raise _refused(wanted, f"{type(tensor).__name__} {short(tensor)}")
        fits = len(tensor.shape) == len(wanted.shape) and all(
            size == expected or axis in wanted.free
            for axis, (size, expected) in enumerate(zip(tensor.shape, wanted.shape, strict=True))
        )
        if tensor.layout != torch.strided:
            raise _refused(wanted, f"a tensor of layout {tensor.layout}")
        if not fits or tensor.dtype != wanted.dtype:
            raise _refused(wanted, format_type(tensor))
        if tensor.device.type not in self._devices:
            known = " or ".join(sorted(self._devices))
            raise _refused(wanted, f"one on {tensor.device}, and inputs have to be on {known}")
        result = wanted.placed(tensor.detach().resolve_conj().resolve_neg())
        return result if result.data_ptr() % _ALIGNMENT == 0 else result.clone()

    def _check_sizes(self, tensors: Sequence[Tensor]) -> None:
        if self._batch:
            low, high = self._batch
            counts = sorted({tensor.shape[0] for tensor in tensors})
            if len(counts) > 1 or not all(low <= count <= high for count in counts):
                numbers = " and ".join(map(str, counts))
                raise DiffoptError(
                    f"the inputs are of {numbers} requests: a run serves {low} to {high}, and all"
                    " inputs are of as many"
                )
        skipped = 1 if self._batch else 0
        for length in self._lengths if self._limited else ():
            length.check([tensor.shape[skipped:] for tensor in tensors])


def _refused(wanted: _Input, got: str) -> DiffoptError:
    shape = ",".join("?" if axis in wanted.free else str(n) for axis, n in enumerate(wanted.shape))
    name = str(wanted.dtype).removeprefix("torch.")
    return DiffoptError(f"input {wanted.name} must be {name}[{shape}], got {got}")
