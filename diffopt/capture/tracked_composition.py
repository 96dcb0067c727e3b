"""What f-strings, `%`, `format`, `join`, `replace` and `in` make and read of texts.

Python does these in C, where no method of a tracked text is called; `followed_code` calls the
functions here in their place.
"""

import builtins
import collections
import collections.abc
import re
import string
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffopt.capture.tracked_text import (
    TrackedText,
    any_tracked,
    plain_texts,
    read_all,
    text_of,
    tracked_in,
)


def joined(*parts: str) -> str:
    """Return the parts of an f-string as one."""
    if not any_tracked(parts):
        return "".join(parts)
    total: Any = None
    for part in parts:
        if isinstance(part, TrackedText) or part:
            total = part if total is None else total + part
    return total  # type: ignore[no-any-return]


def field(value: Any, conversion: int, spec: str) -> str:
    """Return a field of an f-string."""
    if isinstance(spec, TrackedText):
        read_all([spec])
        spec = plain_texts(spec)
    if isinstance(value, TrackedText) and conversion in (ord("r"), ord("a")):
        name = "repr" if conversion == ord("r") else "ascii"
        value = value.made(getattr(builtins, name)(plain_texts(value)), (name, ()))
    elif conversion != -1:
        convert: dict[int, Callable[[Any], str]] = {
            ord("s"): text_of,
            ord("r"): repr,
            ord("a"): ascii,
        }
        value = convert[conversion](value)
    if not isinstance(value, TrackedText):
        return format(value, spec)
    if not spec:
        return value
    return value.made(format(plain_texts(value), spec), ("format", (spec,)))  # type: ignore[no-any-return]


def percent(text: Any, values: Any) -> Any:
    """Return `text % values`."""
    if type(text) is not str or type(values) in (int, float):
        return text % values
    parts = _percent_parts(text, values)
    if parts is not None and any_tracked(parts):
        return joined(*parts)
    read_all([values])
    return text % values


def percent_in_place(text: Any, values: Any) -> Any:
    """Return what `text %= values` assigns: arrays and tensors are written."""
    if isinstance(text, str):
        return percent(text, values)
    text %= values
    return text


_FIELD = re.compile(r"%(?:\((.*?)\))?([#0\- +]*)(\d*)((?:\.\d+)?)(.?)", re.DOTALL)
_KINDS = frozenset("sradiouxXeEfFgGc")


def _percent_parts(text: str, values: Any) -> list[Any] | None:
    """Return the literals and fields of `text % values`; None where there are others than texts."""
    row = values if isinstance(values, tuple) else (values,)
    parts: list[Any] = []
    end = count = 0
    for match in _FIELD.finditer(text):
        parts.append(text[end : match.start()])
        end = match.end()
        key, flags, width, precision, kind = match.groups()
        if kind == "%":
            parts.append("%")
            continue
        if kind not in _KINDS or (key is None and count >= len(row)):
            return None
        value = row[count] if key is None else values[key]
        count += key is None
        if kind in ("s", "r", "a"):
            spec = f"{'<' if '-' in flags else '>'}{width}" if width else ""
            parts.append(field(field(value, ord(kind), ""), -1, spec + precision))
        else:
            parts.append(f"%{flags}{width}{precision}{kind}" % (value,))
    if not isinstance(values, Mapping) and count != len(row):
        return None
    return [*parts, text[end:]]


def of_plain(text: str, method: str, /, *args: Any, **kwargs: Any) -> Any:
    """Return `text.method(…)` of a text that is not tracked; its arguments may be."""
    parts: list[Any] | None = None
    if method == "join" and len(args) == 1:
        rows = [*args[0]]
        args = (rows,)  # of an iterator, which is spent
        parts = _separated(rows, text) if all(isinstance(row, str) for row in rows) else None
    elif method == "format":
        parts = _parts(text, args, kwargs)
    elif method == "format_map" and len(args) == 1:
        parts = _parts(text, (), args[0])
    elif method == "replace" and len(args) == 2 and type(args[0]) is str and args[0]:
        parts = _separated(text.split(args[0]), args[1])
    if parts is not None and any_tracked(parts):
        return joined(*parts)
    values = (*args, *kwargs.values())
    if not tracked_in(values):
        return getattr(text, method)(*args, **kwargs)
    read_all(values)
    return getattr(text, method)(*plain_texts(args), **plain_texts(kwargs))


def _parts(text: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str] | None:
    """Return a format's literals and fields; None for one that is not well formed."""
    formatter = string.Formatter()
    parts, count = [], 0
    try:
        for literal, name, spec, conversion in formatter.parse(text):
            parts.append(literal)
            if name is None:
                continue
            if name[:1] in ("", ".", "["):
                name = f"{count}{name}"
                count += 1
            if spec and "{" in spec:
                return None
            value, _ = formatter.get_field(name, args, kwargs)
            parts.append(field(value, ord(conversion) if conversion else -1, spec or ""))
    except (ValueError, LookupError, AttributeError, TypeError):
        return None  # it is raised by the format itself
    return parts


def _of_tracked(method: str) -> Callable[..., Any]:
    """Return a method of a template that is a caller's text itself: what it makes is followed."""

    def composed(self: TrackedText, *args: Any, **kwargs: Any) -> Any:
        read_all([self])
        text = plain_texts(self)
        return (
            percent(text, *args) if method == "__mod__" else of_plain(text, method, *args, **kwargs)
        )

    return composed


for _name in ("format", "format_map", "join", "__mod__"):
    setattr(TrackedText, _name, _of_tracked(_name))


def _separated(parts: list[Any], separator: Any) -> list[Any]:
    return [one for part in parts for one in (separator, part)][1:]


def contains(part: Any, whole: Any) -> bool:
    """Return `part in whole`."""
    if not isinstance(part, TrackedText):
        return part in whole
    if type(whole) is str:
        return bool(part.made(plain_texts(part) in whole, ("is_in", (whole,))))
    method = getattr(type(whole), "__contains__", None)
    is_python = isinstance(method, types.FunctionType)
    if is_python and method.__module__.partition(".")[0] in sys.stdlib_module_names:
        is_python = False
    if not isinstance(whole, _SEARCHED) and not is_python:
        read_all([part])
    return part in whole


# Containers that compare what they hold by its methods.
_SEARCHED = (dict, list, tuple, set, frozenset, collections.deque, TrackedText)


def has_items(length: Callable[[Any], int], value: Any) -> bool:
    """Return whether `len(value)` is true, which is less than how much it is."""
    is_text = length is len and isinstance(value, TrackedText)
    return bool(value if is_text else length(value))


def reading(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that reads all of the texts that it is given."""

    def call(*args: Any, **kwargs: Any) -> Any:
        read_all((*args, *kwargs.values(), getattr(function, "__self__", None)))
        named = {name: handed(value) for name, value in kwargs.items()}
        return function(*map(handed, args), **named)

    return call


def handed(value: Any) -> Any:
    """Return an argument of what reads: what comes of iterators and functions later is read."""
    if isinstance(value, TrackedText):
        return plain_texts(value)
    if isinstance(value, (types.LambdaType, types.MethodType)) and not _is_pickled(value):
        return lambda *args, **kwargs: seen(value(*args, **kwargs))
    is_iterator = isinstance(value, collections.abc.Iterator)
    if is_iterator and type(value).__module__ in ("builtins", "itertools"):
        return map(seen, value)
    return value


def _is_pickled(function: Any) -> bool:
    """Tell whether a function may be known by its name."""
    return "<locals>" not in function.__qualname__ and "<lambda>" not in function.__qualname__


def seen(value: Any) -> Any:
    """Return a value for what no one follows: all of its texts are read."""
    read_all([value])
    return plain_texts(value)
