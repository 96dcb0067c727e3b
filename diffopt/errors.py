"""Errors that diffopt raises on purpose."""

from __future__ import annotations

import re


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


class CaptureError(DiffoptError):
    """A pipeline does something that cannot be captured; the message has the line."""


class ToleranceError(DiffoptError):
    """A pass changed the output by more than it may."""


class VerifyError(AssertionError):
    """A program breaks an invariant of the IR: a bug in a pass, never the user's."""
