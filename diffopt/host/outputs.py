"""Host-side packing: from a graph's flat outputs to what the pipeline returns."""

import dataclasses
import math
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffopt.errors import DiffoptError
from diffopt.host.arguments import short
from diffopt.host.array_expressions import evaluate
from diffopt.host.guards import mismatch


class Output(dict[str, Any]):
    """What a pipeline returns: entries by name, also as attributes and by position."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the output has no {name!r}, only {', '.join(self)}") from None

    def __getitem__(self, key: str | int) -> Any:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


@dataclasses.dataclass(frozen=True)
class Check:
    """A value of a model's on which Python branched: every run must have the same."""

    output: int
    """The number of the program's output that has it."""
    expected: Any
    where: str

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Raise a `Mismatch` where a run had another value, whose result is not the pipeline's."""
        actual = tensors[self.output].tolist()
        if actual != self.expected:
            raise mismatch(
                f"{self.where.rstrip(':')}: what Python reads here is {short(actual)} in this run "
                f"and was {short(self.expected)} at capture; trace the program again with "
                "arguments like these",
                from_text=False,
            )


def pack(
    data: Any,
    tensors: Sequence[Tensor],
    output_type: str | None = None,
    classes: Mapping[str, type] = MappingProxyType({}),
) -> Any:
    """Return what the pipeline returns, from flat output tensors and the structure as JSON.

    Args:
        data: The structure: {"list" | "tuple" | "dict": …}, {"class": [name, fields]},
            {"value": …}, {"tensor": i}, or {"array" | "image": [i, index…]} for a part of output i
            as a numpy array, or as an 8-bit PIL image; {"stack": […]} for stacked arrays;
            {"expression": rows} for what `array_expressions.evaluate` computes of the outputs.
        tensors: The flat outputs.
        output_type: "pil", "np" or "pt" for images of another type than at capture, which
            `expect_convertible` has allowed.
        classes: Of results, by the names that the structure has. Of others an `Output` is made,
            unless they are the libraries' own.
    """
    ((kind, value),) = data.items()
    if kind == "value":
        return value
    if kind == "tensor":
        tensor = tensors[value]
        if output_type in ("pil", "np") and _is_image(tensors, kind, value, 0):
            return to_images(np.asarray(tensor.movedim(-3, -1).float().cpu()), output_type)
        return tensor
    if kind in ("array", "image"):
        array = np.asarray(tensors[value[0]].cpu())
        array = array[tuple(value[1:])] if value[1:] else array
        if output_type == "pt" and _is_image(tensors, kind, value[0], len(value) - 1):
            return torch.from_numpy(array).movedim(-1, -3)
        return to_images(array, output_type or ("np" if kind == "array" else "pil"))
    if kind == "expression":
        return evaluate(value, {}, lambda index: np.array(tensors[index].cpu()))
    if kind == "stack":
        parts = [pack(item, tensors, "np", classes) for item in value]
        return torch.from_numpy(np.stack(parts)) if output_type == "pt" else np.stack(parts)
    if kind in ("list", "tuple"):
        items = [pack(item, tensors, output_type, classes) for item in value]
        if output_type in ("pt", "np") and value and all("image" in item for item in value):
            return torch.stack(items) if output_type == "pt" else np.stack(items)
        return items if kind == "list" else tuple(items)
    if kind == "dict":
        return {k: pack(v, tensors, output_type, classes) for k, v in value.items()}
    name, fields = value
    packed = {k: pack(v, tensors, output_type, classes) for k, v in fields.items()}
    cls = classes.get(name) or _library_class(name)
    return cls(**packed) if cls is not None else Output(packed)


def _library_class(name: str) -> type | None:
    """Return a class of results of diffusers or transformers, if it is imported already.

    Importing it would take seconds. A file may name no other class: its fields are arguments.
    """
    module, _, qualname = name.partition(":")
    if module.partition(".")[0] not in ("diffusers", "transformers"):
        return None
    found = getattr(sys.modules.get(module), qualname, None)
    if isinstance(found, type) and issubclass(found, OrderedDict):
        return found if hasattr(found, "__dataclass_fields__") else None
    return None


IMAGE_TYPES = ("pil", "np", "pt")


def expect_convertible(data: Any, values: Sequence[Tensor], traced: Any, output_type: str) -> None:
    """Raise a `DiffoptError` where a result cannot be given as another `output_type`.

    Args:
        data: The structure of the result; see `pack`.
        values: The flat outputs, or fake ones of their types.
        traced: The `output_type` of the captured call, by the pipeline's default if it was left
            out; None for a pipeline that has none.
        output_type: The one wanted.
    """
    known = ", ".join(repr(name) for name in IMAGE_TYPES)
    if output_type not in IMAGE_TYPES and traced not in IMAGE_TYPES:
        advice = "trace it again with this one" if traced is not None else f"it may be {known}"
    elif output_type not in IMAGE_TYPES:
        advice = f"it may be {known}; trace it again for another"
    elif traced is not None and traced not in IMAGE_TYPES:
        advice = "trace it again with this one"
    elif not any(_is_image(values, *part) for part in _parts(data)):
        advice = "what it returns is no image, and is not converted"
    elif any(kind == "expression" for kind, _ in _kinds(data)):
        advice = "numpy computes a part of the result, which is not converted"
    else:
        return
    was = "without one" if traced is None else f"with {traced!r}"
    raise DiffoptError(f"output_type={output_type!r}: the program was traced {was}; {advice}")


def _kinds(data: Any) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a result's structure."""
    ((kind, value),) = data.items()
    if kind in ("tensor", "array", "image", "value", "expression"):
        yield kind, value
        return
    rows = value[1] if kind == "class" else value
    for row in rows.values() if isinstance(rows, dict) else rows:
        yield from _kinds(row)


def _parts(data: Any) -> Iterator[tuple[str, int, int]]:
    """Yield the parts of a result that are outputs: the kind, the number, the axes indexed."""
    for kind, value in _kinds(data):
        if kind == "tensor":
            yield kind, value, 0
        elif kind in ("array", "image"):
            yield kind, value[0], len(value) - 1


def picture_sizes(data: Any, values: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return the width and height of each picture in a result of this structure.

    Args:
        data: The structure; see `pack`.
        values: The flat outputs, or fake ones of their types.
    """
    sizes: list[tuple[int, int]] = []
    for kind, index, indexed in _parts(data):
        if _is_image(values, kind, index, indexed):
            shape = list(values[index].shape[indexed:])
            height, width = shape[-2:] if kind == "tensor" else shape[-3:-1]
            sizes += [(width, height)] * math.prod(shape[:-3])
    return sizes


def first_output(result: Any) -> Any:
    """Return the main entry of a result: `.images`, `.frames`, `.audios` or else the first."""
    for name in ("images", "frames", "audios", "sample"):
        if hasattr(result, name):
            return getattr(result, name)
    if isinstance(result, dict):
        return next(iter(result.values()))
    return result[0] if isinstance(result, list | tuple) else result


def pictures_in(output: Any) -> list[Image.Image]:
    """Return the pictures in the main entry of a result; a `DiffoptError` if it is no picture."""
    if isinstance(output, Image.Image):
        return [output]
    if not isinstance(output, list | tuple):
        raise DiffoptError("this model returns no pictures; write to a .pt or .npy file")
    return [image for item in output for image in pictures_in(item)]


def to_images(array: np.ndarray, output_type: str) -> Any:
    """Return images (…, height, width, channels) from 0 to 1 as PIL images, if that is the type."""
    if output_type != "pil":
        return array
    if array.ndim > 3:
        return [to_images(item, output_type) for item in array]
    pixels = (array * 255).round().astype("uint8")
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _is_image(values: Sequence[Tensor], kind: str, index: int, indexed: int) -> bool:
    """Tell whether a part of the result is an image, or several: channels first in a tensor."""
    value = values[index]
    if not value.is_floating_point():
        return False
    if kind == "tensor":
        return value.ndim >= 4 and value.shape[-3] in (1, 3, 4)
    return value.ndim - indexed >= 3 and value.shape[-1] in (1, 3, 4)
