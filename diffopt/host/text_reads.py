"""What Python read of the caller's texts at capture, other than to tokenize them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from diffopt.host.arguments import Place, place_text, short, value_at
from diffopt.host.guards import mismatch

TEXTS = frozenset(
    (
        *("strip", "lstrip", "rstrip", "lower", "upper", "casefold", "title", "capitalize"),
        *("swapcase", "replace", "removeprefix", "removesuffix", "expandtabs", "split", "rsplit"),
        *("splitlines", "partition", "rpartition", "__getitem__", "__add__", "__radd__"),
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
WHOLE = "whole"
"""The read of a text as a key of a dictionary or a set: all of it."""

Step = tuple[str, tuple[Any, ...]]
"""A method of a text, and its arguments: plain values, slices, and `Derived` texts."""


@dataclasses.dataclass(frozen=True)
class Derived:
    """What some methods make of one of the caller's texts."""

    place: Place
    steps: tuple[Step, ...] = ()

    def value(self, arguments: Mapping[str, Any]) -> Any:
        """Return the value for a call's arguments."""
        value = value_at(arguments, self.place)
        for name, args in self.steps:
            if name == WHOLE:
                continue
            if name not in TEXTS and name not in READS:
                raise ValueError(f"{name} is no method by which texts are read")
            given = [a.value(arguments) if isinstance(a, Derived) else a for a in args]
            value = given[0] + value if name == "__radd__" else getattr(value, name)(*given)
        return value

    def __str__(self) -> str:
        calls = [f".{name}({', '.join(map(_text, args))})" for name, args in self.steps]
        return place_text(self.place) + "".join(calls)

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
        """The place of the argument that was read."""
        return [self.text.place]

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Raise a `Mismatch` where a text gives another value than the one at capture."""
        try:
            actual = self.text.value(arguments)
        except (IndexError, ValueError) as error:
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
