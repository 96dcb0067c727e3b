"""What the arguments of the captured call were, leaf by leaf, and what a later call may change.

A leaf from which an input is computed may have another value of its type; every other leaf is
bound: it must be what it was. The schema is JSON and holds no contents, only digests of them.
"""

import dataclasses
import enum
import hashlib
from collections.abc import Mapping, Set
from pathlib import PurePath
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffopt.errors import DiffoptError
from diffopt.host.arguments import Place, holds_any, is_within, items, place_text, short

Schema = dict[str, Any]

_PLAIN = (type(None), bool, int, float, str)
_BY_REPR: tuple[type, ...] = (
    *(bytes, complex, range, slice, enum.Enum, PurePath, np.generic, np.dtype),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


def describe(value: Any, *, shallow: bool = False) -> Schema:
    """Return the schema of a value, as JSON; `shallow`: without parts and digests of contents."""
    if type(value) in _PLAIN:
        return {"value": value}
    if isinstance(value, _BY_REPR):
        return {"constant": [_class(value), repr(value)]}
    if isinstance(value, (set, frozenset)) and all(type(item) in _PLAIN for item in value):
        return {"constant": [_class(value), repr(sorted(value, key=repr))]}
    if isinstance(value, Tensor):
        strides = None if value.is_contiguous() else list(value.stride())
        return {"tensor": [_name(value.dtype), list(value.shape), strides]}
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return {"array": [str(value.dtype), list(value.shape), "" if shallow else _digest(value)]}
    if isinstance(value, Image.Image):
        return {"picture": [value.mode, list(value.size), "" if shallow else _digest(value)]}
    if isinstance(value, torch.Generator):
        return {"generator": None}
    parts = items(value)
    if parts is None or not all(type(key) in _PLAIN for key, _ in parts):
        return {"object": _class(value)}
    rows = [[key, None if shallow else describe(part)] for key, part in parts]
    if type(value) in (list, tuple):
        return {type(value).__name__: [row for _, row in rows]}
    return {"dict": rows} if type(value) is dict else {"class": [_class(value), rows]}


@dataclasses.dataclass(frozen=True)
class Checker:
    """Compares the arguments of later calls with the schema of the captured ones.

    Attributes:
        inputs: Places of values from which inputs are computed, and everything within these.
        objects: The captured values that no schema describes, by place; a later call may pass the
            same object, while it is at hand.
    """

    inputs: Set[Place]
    objects: Mapping[Place, Any] = dataclasses.field(default_factory=dict)

    def check(self, place: Place, schema: Schema, value: Any) -> None:
        """Raise a `DiffoptError` where a value is not what the program was traced with."""
        ((kind, known),) = schema.items()
        free = is_within(place, self.inputs)
        if kind == "object":
            if self.objects.get(place, self) is not value:
                self._refuse(place, schema, value, free=False)
            return
        actual = describe(value, shallow=free or items(value) is not None)
        if kind not in actual:
            self._refuse(place, schema, value, free=free)
        if kind in ("list", "tuple", "dict", "class"):
            self._check_parts(place, schema, value, actual, free=free)
        elif not (_is_like if free else _is_equal)(place, kind, known, actual[kind]):
            self._refuse(place, schema, value, free=free)

    def _check_parts(
        self, place: Place, schema: Schema, value: Any, actual: Schema, *, free: bool
    ) -> None:
        ((kind, known),) = schema.items()
        ours, theirs = _rows(kind, known), _rows(kind, actual[kind])
        same_class = kind != "class" or known[0] == actual[kind][0]
        if not same_class or [key for key, _ in ours] != [key for key, _ in theirs]:
            self._refuse(place, schema, value, free=free)
        parts = items(value) or ()
        for (key, row), (_, part) in zip(ours, parts, strict=True):
            self.check((*place, key), row, part)

    def _refuse(self, place: Place, schema: Schema, value: Any, *, free: bool) -> NoReturn:
        ((kind, known),) = schema.items()
        name = place_text(place)
        got = (
            short(value) if type(value) in (*_PLAIN, list, tuple, dict) else phrase(describe(value))
        )
        if kind != "value":
            was, is_alike = phrase(schema), _is_like(place, kind, known, describe(value).get(kind))
            if is_alike and kind in ("array", "picture"):  # other contents, in a type that fits
                was = "another one bound"
            is_input = free or holds_any(place, self.inputs)
            advice = "pass one like it" if is_input else "leave it out"
            raise DiffoptError(
                f"{name}={got}: the program was traced with {was} there; {advice}, or trace it "
                "again with this"
            )
        if free:
            raise DiffoptError(
                f"{name} must be {_KINDS.get(type(known), 'what it was')}, got {got}: the program "
                "was traced with one there"
            )
        advice = "trace again with this value"
        if _are_numbers(known, value) and len(place) == 1:
            advice += f", or with dynamic=({str(place[0])!r},)"
        raise DiffoptError(
            f"{name}={got}: {name!r} was bound to {short(known)} at capture; {advice}"
        )


def _is_like(place: Place, kind: str, known: Any, actual: Any) -> bool:
    """Tell whether an input's value has the type of the captured one, and its size if it is fixed.

    A tensor's size is fixed by the type of the graph's input, of which passes may free an axis.
    """
    if kind == "generator":
        return True
    if actual is None and known is not None:
        return False
    if kind == "value" and len(place) == 1 and _are_numbers(known, actual):
        return True  # a dynamic number, which is passed on as a float
    if kind == "value":
        return type(known) is type(actual)
    if kind == "tensor":  # kernels round by strides, and draws alike are in the order of memory
        return bool((known[0], known[2]) == (actual[0], actual[2]))
    return bool(known[:2] == actual[:2])


def _is_equal(place: Place, kind: str, known: Any, actual: Any) -> bool:
    if kind == "value":  # NaN differs from itself
        return type(known) is type(actual) and (known == actual or repr(known) == repr(actual))
    return bool(known == actual)


_KINDS: dict[type, str] = {str: "a text", int: "a whole number", float: "a number"}


def phrase(schema: Schema) -> str:
    """Return what a schema describes in words: "a list of 2", "a float32 tensor of [2, 4]"."""
    ((kind, known),) = schema.items()
    if kind == "value":
        return short(known)
    if kind == "constant":
        return str(known[1])
    if kind in ("list", "tuple"):
        return f"a {kind} of {len(known)}"
    if kind in ("dict", "class"):
        keys = ", ".join(str(key) for key, _ in _rows(kind, known))
        return f"a {'dict' if kind == 'dict' else known[0].rpartition(':')[2]} with {keys}"
    if kind == "tensor" and known[2] is not None:
        return f"a {known[0]} tensor of {known[1]} with strides {known[2]}"
    if kind in ("tensor", "array"):
        return f"a {known[0]} {kind} of {known[1]}"
    if kind == "picture":
        return f"an {known[0]} picture of {known[1][0]}x{known[1][1]}"
    if kind == "generator":
        return "a torch.Generator"
    return f"an object of class {known.rpartition(':')[2]}"


def _rows(kind: str, known: Any) -> list[Any]:
    if kind in ("list", "tuple"):
        return [[index, row] for index, row in enumerate(known)]
    return list(known[1] if kind == "class" else known)


def _are_numbers(*values: Any) -> bool:
    return all(type(value) in (int, float) for value in values)


def _class(value: Any) -> str:
    return f"{type(value).__module__}:{type(value).__qualname__}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _digest(value: np.ndarray | Image.Image) -> str:
    palette = value.getpalette() if isinstance(value, Image.Image) and value.mode == "P" else None
    return hashlib.sha256(value.tobytes() + bytes(palette or ())).hexdigest()[:16]


def rows(place: Place, schema: Schema, inputs: Set[Place]) -> list[tuple[str, str, str]]:
    """Return what became of an argument: the places of its parts, "input" or "bound", and what.

    A container of which nothing is an input is one row.
    """
    ((kind, known),) = schema.items()
    is_whole = kind not in ("list", "tuple", "dict", "class")
    if is_whole or place in inputs or not holds_any(place, inputs):
        text = phrase(schema) if kind not in ("list", "tuple", "dict") else short(plain(schema))
        return [(place_text(place), "input" if place in inputs else "bound", text)]
    parts = _rows(kind, known)
    return [row for key, part in parts for row in rows((*place, key), part, inputs)]


def plain(schema: Schema) -> Any:
    """Return the captured value, with words in place of what a schema does not hold."""
    ((kind, known),) = schema.items()
    if kind == "value":
        return known
    if kind in ("list", "tuple"):
        return (list if kind == "list" else tuple)(map(plain, known))
    if kind == "dict":
        return {key: plain(part) for key, part in known}
    return phrase(schema)
