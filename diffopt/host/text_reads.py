"""What Python read of the caller's texts at capture, other than to tokenize them."""

import dataclasses
import html
import json
import re
import unicodedata
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import regex

from diffopt.host.arguments import Place, place_text, short, value_at
from diffopt.host.cleaners import fix_text
from diffopt.host.guards import mismatch

TEXTS = frozenset(
    (
        *("strip", "lstrip", "rstrip", "lower", "upper", "casefold", "title", "capitalize"),
        *("swapcase", "replace", "removeprefix", "removesuffix", "expandtabs", "split", "rsplit"),
        *("splitlines", "partition", "rpartition", "__getitem__", "__add__", "__radd__"),
        *("center", "ljust", "rjust", "zfill", "__mul__", "__rmul__"),
    )
)
"""Methods that return texts, or lists of texts."""
READS = frozenset(
    (
        *("__contains__", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__len__"),
        *("startswith", "endswith", "find", "rfind", "index", "rindex", "count", "isalnum"),
        *("isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric"),
        *("isprintable", "isspace", "istitle", "isupper"),
    )
)
"""Methods whose result Python branches on."""
MATCHES = frozenset(("group", "groups", "groupdict", "start", "end", "span"))
"""Methods of what a regular expression has found."""


def _patterns(library: Any) -> dict[str, Callable[..., Any]]:
    """Return the functions of a library of regular expressions, by the names of their steps."""

    def searching(method: str) -> Callable[..., Any]:
        return lambda text, *pattern: getattr(library.compile(*pattern), method)(text)

    name = library.__name__
    compiled = library.compile
    return {
        **{f"{name}.{m}": searching(m) for m in ("search", "match", "fullmatch", "findall")},
        f"{name}.finditer": lambda text, *pattern: list(compiled(*pattern).finditer(text)),
        f"{name}.split": lambda text, count, *pattern: compiled(*pattern).split(text, count),
        f"{name}.sub": lambda text, new, count, *pattern: compiled(*pattern).sub(new, text, count),
    }


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


FUNCTIONS: dict[str, Callable[..., Any]] = {
    **_patterns(re),
    **_patterns(regex),
    "re.escape": re.escape,
    "is_found": lambda match: match is not None,
    "html.unescape": html.unescape,
    "html.escape": html.escape,
    "ftfy.fix_text": fix_text,
    "unicodedata.normalize": lambda text, form: unicodedata.normalize(form, text),
    "urllib.parse.unquote": urllib.parse.unquote,
    "urllib.parse.unquote_plus": urllib.parse.unquote_plus,
    "json.loads": json.loads,
    "json.dumps": json.dumps,
    "is_json": _is_json,
    "is_in": lambda text, whole: text in whole,
    "list": list,
    "repr": repr,
    "ascii": ascii,
    "format": format,
    "int": int,
    "float": float,
    "bool": bool,
}
"""What the standard library makes of a text, which comes first; see `TrackedText`."""
WHOLE = "whole"
"""The read of a text as a key of a dictionary or a set: all of it."""

NO_VALUE = (LookupError, ValueError, TypeError, AttributeError)
"""What steps raise for a text of another structure."""

Step = tuple[str, tuple[Any, ...]]
"""A method or one of `FUNCTIONS`, and its arguments: plain values, slices, `Derived` texts."""


@dataclasses.dataclass(frozen=True)
class Derived:
    """What some methods make of one of the caller's texts."""

    place: Place
    steps: tuple[Step, ...] = ()

    def value(self, arguments: Mapping[str, Any]) -> Any:
        """Return the value for a call's arguments."""
        value = value_at(arguments, self.place)
        for name, args in self.steps:
            given = [a.value(arguments) if isinstance(a, Derived) else a for a in args]
            value = _applied(value, name, given)
        return value

    def places(self) -> list[Place]:
        """Return the places of the caller's texts of which this is made."""
        others = [a for _, args in self.steps for a in args if isinstance(a, Derived)]
        return [self.place, *(place for other in others for place in other.places())]

    def __str__(self) -> str:
        text = place_text(self.place)
        for name, args in self.steps:
            given = [_text(argument) for argument in args]
            if name == WHOLE:
                continue
            if name in FUNCTIONS:
                text = f"{name}({', '.join([text, *given])})"
            else:
                text = f"{text}.{name}({', '.join(given)})"
        return text

    def to_json(self) -> list[Any]:
        """Return the text as JSON."""
        steps = [[name, [_to_json(argument) for argument in args]] for name, args in self.steps]
        return [list(self.place), steps]

    @staticmethod
    def from_json(data: Sequence[Any]) -> "Derived":
        """Rebuild a text from what `to_json` returned."""
        steps = tuple((name, tuple(map(_from_json, args))) for name, args in data[1])
        return Derived(tuple(data[0]), steps)


@dataclasses.dataclass(frozen=True)
class TextRead:
    """A value that Python read of a text: new texts must give the same."""

    text: Derived
    """The value: a method that reads is the last of its steps."""
    result: Any
    where: str

    @property
    def about(self) -> str:
        """What was read, whatever it was."""
        return str(self.text)

    @property
    def places(self) -> list[Place]:
        """The places of the arguments that were read."""
        return self.text.places()

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Raise a `Mismatch` where a text gives another value than the one at capture."""
        try:
            actual = self.text.value(arguments)
        except NO_VALUE as error:
            actual = str(error)
        if actual != self.result:
            raise mismatch(
                f"{self.where.rstrip(':')}: {self.text} is {short(actual)} for this text and was "
                f"{short(self.result)} at capture; trace the program again with a text like this",
                from_text=True,
            )

    def to_json(self) -> list[Any]:
        """Return the read as JSON."""
        return [self.text.to_json(), self.result, self.where]

    @staticmethod
    def from_json(data: Sequence[Any]) -> "TextRead":
        """Rebuild a read from what `to_json` returned."""
        return TextRead(Derived.from_json(data[0]), *data[1:])


def _applied(value: Any, name: str, args: Sequence[Any]) -> Any:
    """Return what a step makes of a value."""
    if name == WHOLE:
        return value
    if name in FUNCTIONS:
        return FUNCTIONS[name](value, *args)
    known = MATCHES if isinstance(value, (re.Match, regex.Match)) else TEXTS | READS
    if name not in known:
        raise ValueError(f"{name} is no method by which texts are read")
    if name == "__radd__":
        return args[0] + value
    result = getattr(value, name)(*args)
    return list(result) if name in MATCHES and isinstance(result, tuple) else result


def _text(argument: Any) -> str:
    return str(argument) if isinstance(argument, Derived) else repr(argument)


def _to_json(argument: Any) -> Any:
    if isinstance(argument, slice):
        return {"slice": [argument.start, argument.stop, argument.step]}
    if isinstance(argument, Derived):
        return {"derived": argument.to_json()}
    return argument


def _from_json(data: Any) -> Any:
    if not isinstance(data, dict):
        return tuple(data) if isinstance(data, list) else data
    ((kind, value),) = data.items()
    return slice(*value) if kind == "slice" else Derived.from_json(value)
