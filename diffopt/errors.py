"""Errors that diffopt raises on purpose."""

from __future__ import annotations

import os
import re
from typing import Any

# Control characters, and those that turn the direction of what follows.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return a text with control characters escaped: those of files are not a terminal's."""
    return _CONTROL.sub(lambda match: ascii(match.group())[1:-1], text)


def first_line(error: BaseException) -> str:
    """Return the first line of what an error of another library says, or the name of its class."""
    return printable(str(error).strip().partition("\n")[0]) or type(error).__name__


def expect_type(name: str, value: Any, *kinds: type, wanted: str) -> None:
    """Raise a `DiffoptError` where an argument is of none of these types.

    Args:
        name: Of the argument.
        value: What was passed.
        kinds: The types that it may have.
        wanted: What they are, in words.
    """
    if not isinstance(value, kinds):
        got = "None" if value is None else f"{type(value).__name__} {repr(value)[:40]}"
        raise DiffoptError(printable(f"{name} must be {wanted}, got {got}"))


def expect_path(name: str, value: Any) -> None:
    """Raise a `DiffoptError` where an argument is no path."""
    expect_type(name, value, str, os.PathLike, wanted="a path")


class DiffoptError(Exception):
    """An error that the user can mend; its message says what is wrong and what to write instead.

    The command line prints it as `diffopt: error: …` with exit code 2 and no traceback. Anything
    that is not a `DiffoptError` is a bug in diffopt and keeps its traceback.

    Args:
        message: One line.
        text: The user's text that the message is about (a pipeline of passes, say).
        span: The part of `text` that is wrong, as (start, end); carets are drawn under it.
    """

    def __init__(
        self, message: str, *, text: str | None = None, span: tuple[int, int] | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.text = text
        self.span = span

    def __str__(self) -> str:
        if self.text is None or self.span is None:
            return self.message
        start, end = self.span
        carets = " " * start + "^" * max(1, end - start)
        line = re.sub(r"\s", " ", self.text)  # one line, so that carets stand under their column
        return f"{self.message}\n  {line}\n  {carets}"


class Cancelled(DiffoptError):
    """A run of an engine was ended between two steps, as the caller wished."""


class CaptureError(DiffoptError):
    """A pipeline does something that cannot be captured; the message has the line."""


class ToleranceError(DiffoptError):
    """A pass changed the output by more than it may."""


class VerifyError(AssertionError):
    """A program breaks an invariant of the IR: a bug in a pass, never the user's."""
