"""The arguments of a pipeline's call as a tree: lists, dictionaries and dataclasses of leaves."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence, Set
from typing import Any

Place = tuple[Any, ...]
"""The path of a value in the call's arguments: ("prompt", 0) is the first of a list of prompts.

The parts are names of arguments and fields, numbers of items, and keys of dictionaries.
"""


def items(value: Any) -> list[tuple[Any, Any]] | None:
    """Return the parts of a container with what leads to each; None for a leaf."""
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return [(name, getattr(value, name)) for name in names if hasattr(value, name)]
    return None


def leaves(value: Any, place: Place = ()) -> list[tuple[Place, Any]]:
    """Return every leaf of nested containers with its place; an empty container has none."""
    parts = items(value)
    if parts is None:
        return [(place, value)]
    return [leaf for key, part in parts for leaf in leaves(part, (*place, key))]


def is_within(place: Place, places: Set[Place]) -> bool:
    """Tell whether a place is one of these, or a part of one."""
    return any(place[:end] in places for end in range(1, len(place) + 1))


def holds_any(place: Place, places: Set[Place]) -> bool:
    """Tell whether one of these places is this, or a part of it."""
    return any(other[: len(place)] == place for other in places)


def value_at(arguments: Any, place: Sequence[Any]) -> Any:
    """Return the value at a place of the arguments; None where there is none."""
    value = arguments
    for key in place:
        parts = items(value)
        value = next((part for name, part in parts or () if name == key), None)
    return value


def replaced(value: Any, changed: Mapping[Place, Any], place: Place = ()) -> Any:
    """Return the value with other values at some places; what is not changed is the same object."""
    if place in changed:
        return changed[place]
    parts = items(value)
    if parts is None:
        return value
    new = {key: replaced(part, changed, (*place, key)) for key, part in parts}
    return value if all(new[key] is part for key, part in parts) else rebuilt(value, new)


def rebuilt(value: Any, parts: Mapping[Any, Any]) -> Any:
    """Return a container like `value` with these parts; see `items`."""
    if isinstance(value, (list, tuple)):
        new = list(parts.values())
        return type(value)(*new) if hasattr(value, "_fields") else type(value)(new)
    if type(value) is dict:
        return dict(parts)
    result = copy.copy(value)
    for key, part in parts.items():
        if isinstance(value, Mapping):
            result[key] = part
        else:
            object.__setattr__(result, key, part)  # of a frozen dataclass, too
    return result


def place_text(place: Sequence[Any]) -> str:
    """Return a place as a user writes it: `prompt[0]`."""
    return "".join(
        f"[{key!r}]" if not isinstance(key, str) else (f".{key}" if index else key)
        for index, key in enumerate(place)
    )


def short(value: Any) -> str:
    """Return a value's `repr` in at most 40 characters."""
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 40 else text[:37] + "…"
