"""What f-strings, `%`, `format`, `join`, `replace` and `in` make and read of texts.

Python does these in C, where no method of a tracked text is called; `followed_code` calls the
functions here in their place.
"""

import builtins
import string
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

from diffopt.capture.tracked_text import (
    TrackedText,
    any_tracked,
    plain_texts,
    read_all,
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
    return str(total)


def field(value: Any, conversion: int, spec: str) -> str:
    """Return a field of an f-string."""
    if isinstance(value, TrackedText) and conversion in (ord("r"), ord("a")):
        name = "repr" if conversion == ord("r") else "ascii"
        value = value.made(getattr(builtins, name)(plain_texts(value)), (name, ()))
    elif conversion != -1:
        convert: dict[int, Callable[[Any], Any]] = {ord("s"): str, ord("r"): repr, ord("a"): ascii}
        value = convert[conversion](value)
    if not isinstance(value, TrackedText):
        return format(value, spec)
    if not spec:
        return value
    return str(value.made(format(plain_texts(value), spec), ("format", (spec,))))


def percent(text: Any, values: Any) -> Any:
    """Return `text % values`."""
    row = values if isinstance(values, tuple) else (values,)
    given = [*values.values()] if isinstance(values, dict) else row
    if not isinstance(text, str) or not any_tracked(given):
        return text % values
    literals = text.split("%s")
    if len(literals) != len(row) + 1 or any("%" in literal for literal in literals):
        read_all(given)
        return text % values
    return joined(literals[0], *chain(*zip(map(str, row), literals[1:], strict=True)))


def of_plain(text: str, method: str, /, *args: Any, **kwargs: Any) -> Any:
    """Return `text.method(…)` of a text that is not tracked; its arguments may be."""
    rows = [*args[0]] if method == "join" and len(args) == 1 else []
    values = (*args, *kwargs.values(), *rows)
    if rows:
        args = (rows,)  # of an iterator, which is spent
    if not tracked_in(values):
        return getattr(text, method)(*args, **kwargs)
    parts: list[Any] | None = None
    if method == "join":
        parts = _separated(rows, text)
    elif method == "format":
        parts = _parts(text, {**{str(index): value for index, value in enumerate(args)}, **kwargs})
    elif method == "replace" and len(args) == 2 and type(args[0]) is str and args[0]:
        parts = _separated(text.split(args[0]), args[1])
    if parts is not None:
        return joined(*parts)
    read_all(values)
    return getattr(text, method)(*plain_texts(args), **plain_texts(kwargs))


def _parts(text: str, known: Mapping[str, Any]) -> list[str] | None:
    """Return a format's literals and values; None where it has other things than values."""
    parts, count = [], 0
    for literal, name, spec, conversion in string.Formatter().parse(text):
        parts.append(literal)
        if name is None:
            continue
        key = name or str(count)
        if spec or conversion or key not in known:
            return None
        parts.append(str(known[key]))
        count += 1
    return parts


def _separated(parts: list[Any], separator: Any) -> list[Any]:
    return [one for part in parts for one in (separator, part)][1:]


def contains(part: Any, whole: Any) -> bool:
    """Return `part in whole`."""
    if isinstance(part, TrackedText) and type(whole) is str:
        return bool(part.made(plain_texts(part) in whole, ("is_in", (whole,))))
    return part in whole
