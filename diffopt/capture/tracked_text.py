"""Texts that note what Python reads of them: a branch on a text holds for texts alike only."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

from diffopt.capture.dispatch_modes import location
from diffopt.host.text_reads import READS, TEXTS, WHOLE, Derived, Step, TextRead

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
        frame = sys._getframe(1)
        while frame.f_globals.get("__name__") == __name__ and frame.f_back is not None:
            frame = frame.f_back
        caller = str(frame.f_globals.get("__name__", ""))
        if caller.partition(".")[0] not in _NORMALIZING:
            self.note(TextRead(self.after(*steps), result, str(location())))

    def made(self, step: Step, result: Any) -> Any:
        """Return a text, or a list of texts, that one of the methods has made of this one."""
        if isinstance(result, str):
            return TrackedText.make(result, self.after(step), self.note)
        self.read(step, ("__len__", ()), result=len(result))
        origins = [self.after(step, ("__getitem__", (index,))) for index in range(len(result))]
        parts = zip(result, origins, strict=True)
        return type(result)([TrackedText.make(part, origin, self.note) for part, origin in parts])

    def __hash__(self) -> int:
        self.read((WHOLE, ()), result=str.__str__(self))
        return str.__hash__(self)

    def __radd__(self, other: str) -> Any:
        return self.made(("__radd__", (str.__str__(other),)), str.__add__(other, self))

    def __iter__(self) -> Iterator[str]:
        count = len(self)
        return iter([self[index] for index in range(count)])


def _method(name: str) -> Callable[..., Any]:
    original = getattr(str, name)

    def method(self: TrackedText, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if result is NotImplemented:
            return result
        if kwargs:
            self.read((WHOLE, ()), result=str.__str__(self))
            return result
        step = (name, tuple(a.origin if isinstance(a, TrackedText) else a for a in args))
        if name in TEXTS:
            return self.made(step, result)
        self.read(step, result=result)
        return result

    method.__name__ = name
    return method


for _name in (TEXTS | READS) - {"__radd__"}:
    setattr(TrackedText, _name, _method(_name))
