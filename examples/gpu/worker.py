"""A process that measures rows, and is killed when it takes too long.

A compiler cannot be interrupted otherwise, an error of the GPU leaves the process unusable, and
only the end of a process frees all memory.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import time
import traceback
from dataclasses import dataclass
from typing import Any, Protocol

from diffopt.errors import DiffoptError
from diffopt.ir.program import Program
from examples.gpu import measure
from examples.gpu.measure import Settings
from examples.gpu.rows import Row

Answer = dict[str, Any]
"""What was measured, or why not: under "failed" or "stopped"."""

PATIENCE = 3.0
"""Seconds after which a process is killed that does not end by itself."""

_SPOILED = "spoiled"


class Answers(Protocol):
    """Runs in the process."""

    def prepare(self) -> None:
        """Do what needs no GPU, while others use it."""

    def __call__(self, what: Any) -> Answer:
        """Return the answer to a question."""


class Worker:
    """A process that answers one question after another.

    Args:
        answers: Runs in the process.
    """

    def __init__(self, answers: Answers) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA works in no forked process
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, answers))
        self._process.start()
        theirs.close()

    def ask(self, what: Any, seconds: float) -> Answer:
        """Return the answer, or why there is none after so many seconds."""
        try:
            self._pipe.send(what)
            if self._pipe.poll(max(0.0, seconds)):
                answer: Answer = self._pipe.recv()
                return answer
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            return {"failed": f"its process ended with exit code {code}", _SPOILED: True}
        return {"stopped": f"took longer than {seconds:.0f} s", _SPOILED: True}

    def close(self) -> None:
        """End the process and its children."""
        self._pipe.close()  # it ends by itself unless it is measuring
        self._process.join(PATIENCE)
        pid = self._process.pid
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        self._process.kill()  # if it had no group yet
        self._process.join()


def _serve(pipe: Any, answers: Answers) -> None:
    os.setpgid(0, 0)  # a process group, with the compilers that it starts
    with contextlib.suppress(Exception):  # the first answer will say what is wrong
        answers.prepare()
    while True:
        try:
            what = pipe.recv()
        except EOFError:
            return
        pipe.send(_answer(answers, what))


def _answer(answers: Answers, what: Any) -> Answer:
    try:
        return answers(what)
    except DiffoptError as error:
        return {"failed": error.message}
    except Exception as error:  # one failure must not stop the others
        traceback.print_exc()
        text = str(error).strip().partition("\n")[0]
        kind = type(error).__name__
        return {"failed": f"{kind}: {text}" if text else kind, _SPOILED: True}


class Engines:
    """Measures the rows of engines, all of one captured program."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    @functools.cached_property
    def _captured(self) -> Program:
        return measure.capture(self._settings)

    def prepare(self) -> None:
        """Capture the program."""
        assert self._captured

    def __call__(self, what: Row) -> Answer:
        """Measure a row."""
        return measure.engine(self._settings, what, self._captured)


@dataclass(frozen=True)
class Diffusers:
    """Measures the rows of diffusers."""

    settings: Settings

    def prepare(self) -> None:
        """Do nothing: everything needs the GPU."""

    def __call__(self, what: Row | None) -> Answer:
        """Measure a row; None: only save the latents that rows are compared with."""
        if what is None:
            return measure.reference(self.settings)
        if what.kind == "compiled":
            return measure.compiled(self.settings, what)
        return (measure.eager if what.kind == "eager" else measure.float32)(self.settings)


class Team:
    """Measures the rows of a model: engines in one process, each of diffusers in its own.

    Args:
        settings: The settings of all rows.
        ahead: Whether rows of engines follow: capture their program while others are measured.
    """

    def __init__(self, settings: Settings, ahead: bool) -> None:
        self.settings = settings
        self._ahead = ahead
        self._engines: Worker | None = None

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def measure(self, row: Row, seconds: float) -> Answer:
        """Return what was measured of a row, or why there is nothing."""
        until = time.monotonic() + seconds
        if self._ahead:
            self._start()
        if row.kind != "eager" and not self.settings.reference.exists():
            failure = self._diffusers(None, seconds)
            if failure:
                why = next(iter(failure.values()))
                return {"failed": f"there is nothing to compare with: {why}"}
        left = until - time.monotonic()
        if row.kind != "engine":
            return self._diffusers(row, left)
        answer = self._start().ask(row, left)
        if answer.pop(_SPOILED, False):
            self._end()
        return answer

    def _diffusers(self, row: Row | None, seconds: float) -> Answer:
        with contextlib.closing(Worker(Diffusers(self.settings))) as worker:
            answer = worker.ask(row, seconds)
        answer.pop(_SPOILED, None)
        return answer

    def _start(self) -> Worker:
        if self._engines is None:
            self._engines = Worker(Engines(self.settings))
        return self._engines

    def _end(self) -> None:
        if self._engines is not None:
            self._engines.close()
        self._engines = None
