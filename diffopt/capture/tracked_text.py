"""Texts that note what Python reads of them: a branch on a text holds for texts alike only."""

import collections
import dataclasses
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

import regex

from diffopt.capture.dispatch_modes import location
from diffopt.host.arguments import leaves, replaced
from diffopt.host.text_reads import MATCHES, READS, TEXTS, WHOLE, Derived, Step, TextRead

# What these modules read of a text is part of how it is normalized or tokenized.
_NORMALIZING = frozenset(
    {"html", "ftfy", "re", "transformers", "tokenizers", "logging", "warnings"}
)

Note = Callable[[TextRead], None]


class TrackedText(str):
    """One of the caller's texts, or what its methods made of it."""

    origin: Derived
    note: Note

    @staticmethod
    def make(text: str, origin: Derived, note: Note) -> "TrackedText":
        """Return a text that hands each read of it to `note`."""
        tracked = TrackedText(text)
        tracked.origin, tracked.note = origin, note
        return tracked

    def after(self, *steps: Step) -> Derived:
        """Return what more methods make of this text."""
        return Derived(self.origin.place, (*self.origin.steps, *steps))

    def read(self, *steps: Step, result: Any) -> None:
        """Note that the running Python code read this text."""
        if calling_package(sys._getframe(1)) not in _NORMALIZING:
            self.note(TextRead(self.after(*steps), result, str(location())))

    def read_whole(self) -> None:
        """Note that the running Python code read all of this text."""
        self.read((WHOLE, ()), result=str.__str__(self))

    def made(self, result: Any, *steps: Step) -> Any:
        """Return what some steps have made of this text: texts are tracked, all else is read."""
        if isinstance(result, str):
            return TrackedText.make(result, self.after(*steps), self.note)
        if result is None or isinstance(result, (re.Match, regex.Match)):
            self.read(*steps, ("is_found", ()), result=result is not None)
            return None if result is None else TrackedMatch(result, self, steps)
        if isinstance(result, (list, tuple)):
            self.read(*steps, ("__len__", ()), result=len(result))
            return type(result)(self._parts(enumerate(result), steps).values())
        if isinstance(result, dict):
            self.read(*steps, ("list", ()), result=list(result))
            return self._parts(result.items(), steps)
        self.read(*steps, result=result)
        return result

    def _parts(self, parts: Any, steps: tuple[Step, ...]) -> dict[Any, Any]:
        return {k: self.made(part, *steps, ("__getitem__", (k,))) for k, part in parts}

    # As `str` says of itself: a tracked text is told apart by its type alone.
    __class__ = property(lambda self: str)

    def __str__(self) -> str:
        self.read_whole()
        return str.__str__(self)

    def __repr__(self) -> str:
        self.read_whole()
        return str.__repr__(self)

    def __hash__(self) -> int:
        self.read_whole()
        return str.__hash__(self)

    def __bool__(self) -> bool:
        return bool(self.made(str.__len__(self) > 0, ("bool", ())))

    def __len__(self) -> int:
        count = str.__len__(self)
        self.read(("__len__", ()), result=count)
        return count

    def __int__(self) -> int:
        return int(self._number(int))

    def __float__(self) -> float:
        return float(self._number(float))

    def _number(self, kind: Callable[[str], Any]) -> Any:
        with ReadingWholeOfErrors(self):
            return self.made(kind(str.__str__(self)), (kind.__name__, ()))

    def __copy__(self) -> "TrackedText":
        return self

    def __deepcopy__(self, memo: Any) -> "TrackedText":
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        self.read_whole()
        return str, (str.__str__(self),)

    def __radd__(self, other: Any) -> Any:
        if not isinstance(other, str):
            return NotImplemented
        plain = str.__str__(other)
        return self.made(str.__add__(plain, self), ("__radd__", (plain,)))

    def __iter__(self) -> Iterator[str]:
        count = len(self)
        return iter([self[index] for index in range(count)])


class TrackedMatch:
    """What a regular expression found in a text."""

    def __init__(self, match: Any, text: TrackedText, steps: tuple[Step, ...]) -> None:
        self._match, self._text, self._steps = match, text, steps

    __class__ = property(lambda self: type(self._match))

    def __getitem__(self, group: Any) -> Any:
        return self.group(group)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._match, name)
        if name not in MATCHES:
            self._text.read_whole()
            return value

        def method(*args: Any) -> Any:
            return self._text.made(value(*args), *self._steps, (name, args))

        return method


class ReadingWholeOfErrors:
    """Notes that Python read all of a text where what reads it fails, as that is a branch, too."""

    def __init__(self, *texts: Any) -> None:
        self.texts = texts

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, (LookupError, ValueError)):
            read_all(self.texts)


def any_tracked(values: Iterable[Any]) -> bool:
    """Tell whether a tracked text is among these values."""
    return any(isinstance(value, TrackedText) for value in values)


def text_of(value: Any) -> str:
    """Return `str(value)`, tracked where it is."""
    return value if isinstance(value, TrackedText) else str(value)


def plain_texts(value: Any) -> Any:
    """Return a value with plain strings in place of tracked ones."""
    if isinstance(value, TrackedText):
        return str.__str__(value)
    if not tracked_in([value]):
        return value
    texts = {p: str.__str__(v) for p, v in leaves(value) if isinstance(v, TrackedText)}
    return replaced(value, texts)


def tracked_in(values: Iterable[Any]) -> list[TrackedText]:
    """Return the tracked texts among these values, and in containers among them."""
    found: list[TrackedText] = []
    stack: list[Any] = [*values]
    seen: set[int] = set()
    while stack:
        value = stack.pop()
        if isinstance(value, TrackedText):
            found.append(value)
            continue
        if id(value) in seen or isinstance(value, (str, bytes, int, float)):
            continue
        seen.add(id(value))
        if isinstance(value, _MAPPINGS):
            stack += [*value.keys(), *value.values()]
        elif isinstance(value, _COLLECTIONS):
            stack += value
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            stack += vars(value).values() if hasattr(value, "__dict__") else ()
    return found


_EMPTY: dict[Any, Any] = {}
_VIEWS = (type(_EMPTY.keys()), type(_EMPTY.values()), type(_EMPTY.items()))
_COLLECTIONS = (list, tuple, set, frozenset, collections.deque, *_VIEWS)
_MAPPINGS = (dict, types.MappingProxyType, collections.ChainMap, collections.UserDict)


def read_all(values: Iterable[Any]) -> None:
    """Note that Python read all of each tracked text among these values."""
    for text in tracked_in(values):
        text.note(TextRead(text.after((WHOLE, ())), str.__str__(text), str(location())))


def calling_package(frame: FrameType) -> str:
    """Return the package whose code called what tracks texts."""
    while _is_ours(frame) and frame.f_back is not None:
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _is_ours(frame: FrameType) -> bool:
    name = str(frame.f_globals.get("__name__"))
    return name.startswith("diffopt.capture.tracked_")


def as_arguments(values: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Return the arguments of a step as it keeps them; None where one is no plain value."""
    given = [value.origin if isinstance(value, TrackedText) else value for value in values]

    def is_plain(value: Any) -> bool:
        if isinstance(value, tuple):
            return all(map(is_plain, value))
        if type(value) is slice:
            return all(map(is_plain, (value.start, value.stop, value.step)))
        return type(value) in (str, int, float, bool, type(None))

    known = all(isinstance(value, Derived) or is_plain(value) for value in given)
    return tuple(given) if known else None


def _method(name: str) -> Callable[..., Any]:
    original = getattr(str, name)

    def method(self: TrackedText, *args: Any, **kwargs: Any) -> Any:
        given = None if kwargs or name not in TEXTS | READS else as_arguments(args)
        if name == "__add__" and not isinstance(args[0], str):
            return NotImplemented
        with ReadingWholeOfErrors(self, args):
            result = original(self, *args, **kwargs)
        if result is NotImplemented:
            if type(args[0]).__module__.partition(".")[0] == "numpy":
                read_all((self,))  # numpy compares what is in its memory
            return result
        if given is None:
            read_all((self, *args, *kwargs.values()))
            return result
        return self.made(result, (name, given))

    method.__name__ = name
    return method


_OTHERS = ("encode", "translate")
for _name in (*(TEXTS | READS) - {"__radd__", "__len__"}, *_OTHERS):
    setattr(TrackedText, _name, _method(_name))
