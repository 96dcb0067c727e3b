"""Watchers of a pipeline of passes: printing, dumping and bisecting."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffopt.core import Pass, Pipeline, Record

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
        """Keep the text of the program."""
        self._text = str(program).splitlines()

    def after(self, step: Pass, program: Program, record: Record) -> None:
        """Write the difference, or that there is none."""
        if not record.changed:
            self.write(f"# {step} changed nothing\n")
            return
        new = str(program).splitlines()
        lines = difflib.unified_diff(
            self._text, new, f"before {step}", f"after {step}", "", "", 3, ""
        )
        self.write("\n".join(lines) + "\n")


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
    pipeline: Pipeline, program: Program, bound: float, **options: Any
) -> tuple[Record | None, Program]:
    """Find the first pass after which the output is further than `bound` from `program`'s.

    The bound is on the relative error against `program`, which is what a user sees, and not on
    what each pass adds. Returns that pass's record, or None, and the rewritten program. `options`
    are those of `Pipeline.run`.
    """
    begin = len(program.history)
    result = pipeline.run(program, enforce=False, **options)
    for record in map(Record.from_json, result.history[begin:]):
        if record.drift is not None and record.drift > bound:
            return record, result
    return None, result
