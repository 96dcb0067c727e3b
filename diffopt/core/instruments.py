"""Instruments of a pipeline of passes (print, dump), and bisection for the pass of an error."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from diffopt.core import Pass, Pipeline, Record, RunOptions
from diffopt.core.estimate import duration, seconds_a_run
from diffopt.errors import DiffoptError

if TYPE_CHECKING:
    from diffopt.ir.program import Program

Writer = Callable[[str], object]


@dataclass
class PrintAfter:
    """Write the program after each pass, or after the passes with the given names."""

    write: Writer
    names: frozenset[str] = frozenset()

    def before(self, step: Pass, program: Program) -> None:
        """Do nothing."""

    def after(self, step: Pass, program: Program, record: Record) -> None:
        """Write the program."""
        if not self.names or step.name in self.names:
            self.write(f"# after {step}\n{program}\n")


@dataclass
class PrintChanged:
    """Write what each pass changed, as a unified diff of the program's text."""

    write: Writer
    _text: list[str] = field(default_factory=list)

    def before(self, step: Pass, program: Program) -> None:
        """Store the text of the program."""
        self._text = str(program).splitlines()

    def after(self, step: Pass, program: Program, record: Record) -> None:
        """Write the diff, or a line that says that nothing changed."""
        if not record.changed:
            self.write(f"# {step} changed nothing\n")
            return
        new = str(program).splitlines()
        lines = difflib.unified_diff(
            self._text, new, f"before {step}", f"after {step}", "", "", 3, ""
        )
        self.write("\n".join(lines) + "\n")


@dataclass(frozen=True)
class Estimate:
    """Write about how long a pass will run the program, where that is long."""

    write: Writer
    least: float = 10.0

    def before(self, step: Pass, program: Program) -> None:
        """Write the pass, what it needs, and about how long that takes."""
        if not (runs := step.runs(program)):
            return
        seconds = runs * seconds_a_run(program)
        if seconds >= self.least:
            many = f"{runs:.0f} run{'' if round(runs) == 1 else 's'} of the program"
            self.write(f"{step}: {step.needs()}, {many}, {duration(seconds)} on this machine")

    def after(self, step: Pass, program: Program, record: Record) -> None:
        """Do nothing."""


@dataclass
class Dump:
    """Save the program after each pass as `01-unroll.program`, `02-hoist.program` and so on."""

    folder: Path
    _number: int = 0

    def before(self, step: Pass, program: Program) -> None:
        """Make the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def after(self, step: Pass, program: Program, record: Record) -> None:
        """Save the program."""
        self._number += 1
        program.save(self.folder / f"{self._number:02}-{step.name}.program")


def bisect(
    pipeline: Pipeline, program: Program, bound: float, **options: Unpack[RunOptions]
) -> tuple[Record | None, Program]:
    """Return the record of the first pass after which the error exceeds `bound`, and the result.

    The relative error is that against `program`, which is what a user sees, and not what each pass
    adds. The record is None where no pass exceeds it; the result is the rewritten program.
    """
    if not bound >= 0:  # NaN, too
        raise DiffoptError(f"bisect={bound}: wants a relative error from 0 on")
    begin = len(program.history)
    options["enforce"] = False
    result = pipeline.run(program, **options)
    for record in map(Record.from_json, result.history[begin:]):
        if record.drift is not None and record.drift > bound:
            return record, result
    return None, result
