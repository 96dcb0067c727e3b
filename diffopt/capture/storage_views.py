"""Tensors as views of storages: what a write in place into one changes of the others."""

import dataclasses

from torch import Tensor, fx


@dataclasses.dataclass
class StorageValue:
    """The current value of a storage that was written in place, as a node with a layout."""

    node: fx.Node
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    version: int
    keep: Tensor


def storage_of(tensor: Tensor) -> int:
    """Return the identity of a tensor's storage."""
    return int(tensor.untyped_storage()._cdata)


def layout_of(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Return a tensor's size, strides and storage offset."""
    return tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset())


def covers(tensor: Tensor) -> bool:
    """Tell whether a tensor has every element of its storage exactly once."""
    if (
        tensor.storage_offset()
        or tensor.numel() * tensor.element_size() != tensor.untyped_storage().nbytes()
    ):
        return False
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def slice_of(
    base: StorageValue, size: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> tuple[int, int, int, int] | None:
    """Return (dim, start, end, step) if a layout is a slice of the base in one dimension."""
    if len(size) != len(base.size):
        return None
    differing = [
        d for d in range(len(size)) if (size[d], stride[d]) != (base.size[d], base.stride[d])
    ]
    if len(differing) != 1 or offset < base.offset:
        return None
    (dim,) = differing
    unit = base.stride[dim]
    if unit == 0 or stride[dim] % unit or (offset - base.offset) % unit:
        return None
    start, step = (offset - base.offset) // unit, stride[dim] // unit
    end = start + (size[dim] - 1) * step + 1
    return (dim, start, end, step) if step > 0 and end <= base.size[dim] else None
