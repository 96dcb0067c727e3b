"""Prints tables and JSON to stdout, progress to stderr."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as ProgressBar
from rich.table import Table
from rich.text import Text

from diffopt.caching import step_map
from diffopt.core import Record, Size
from diffopt.progress import Progress

TEXTS = (
    *("kind", "summary", "type", "default", "help", "changed", "promise", "component", "steps"),
    *("description", "devices", "is", "at capture", "needs by default"),
)
WIDTH = 180  # of tables that are not printed to a terminal: a file has no width


def stdout() -> Console:
    """Return the console for results."""
    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)


def stderr() -> Console:
    """Return the console for everything else."""
    return Console(stderr=True, highlight=False)


@contextmanager
def progress(first: str) -> Iterator[Progress]:
    """Show a progress bar on stderr; yields the function that updates it."""
    text, bar = TextColumn("{task.description}"), BarColumn()
    left = TimeRemainingColumn()  # "-:--:--" where it is not known which fraction is done
    columns = (SpinnerColumn(), text, bar, TimeElapsedColumn(), TextColumn("left:"), left)
    console = stderr()
    quiet = not console.is_terminal  # no bars in logs
    with ProgressBar(*columns, console=console, transient=True, disable=quiet) as display:
        task = display.add_task(first, total=None)

        def report(what: str, fraction: float | None = None) -> None:
            total = None if fraction is None else 1.0
            # Square brackets are markup to rich, and common in passes' texts.
            text = what.replace("[", r"\[")
            display.update(task, description=text, total=total, completed=fraction or 0.0)

        yield report


class Phases:
    """The seconds of each phase of a command, and the largest memory it took."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time what is done in the context."""
        started = time.perf_counter()
        yield
        self._seconds[name] = time.perf_counter() - started

    def to_json(self) -> dict[str, Any]:
        """Return the seconds of each phase, and the bytes of the largest resident set."""
        unit = 1 if sys.platform == "darwin" else 1024
        who = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
        peak, compilers = (resource.getrusage(each).ru_maxrss * unit for each in who)
        return {"seconds": self._seconds, "peak memory": peak, "of a compiler": compilers}

    def __str__(self) -> str:
        times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self._seconds.items())
        return f"{times}; at most {self.to_json()['peak memory'] / 1e9:.1f} GB of memory"


def print_json(value: Any) -> None:
    """Print a value as JSON; infinities, which JSON lacks, become null."""
    print(json.dumps(_finite(value), indent=2))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column and those in TEXTS are aligned as text, others as numbers."""
    grid = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        side: Literal["left", "right"] = "left" if index == 0 or column in TEXTS else "right"
        grid.add_column(column, justify=side, no_wrap=index == 0, overflow="fold")
    for row in rows:
        grid.add_row(*(cell.replace("[", r"\[") for cell in row))
    stdout().print(grid)


def count(number: float) -> str:
    """Return a number in three digits with its unit: 950, 17.8 M, 5.92 G."""
    for unit in ("", " k", " M", " G", " T"):
        if abs(number) < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} P"


def records_table(records: Sequence[Record], *, timing: bool, stats: bool) -> None:
    """Print the records of passes as a table."""
    columns = ["pass", "changed", "promise", "max abs", "relative", "since capture"]
    columns += ["seconds"] if timing else []
    columns += ["nodes", "parameters", "FLOPs"] if stats else []
    table("passes", columns, [_record_row(record, timing, stats) for record in records])
    if stats:
        for record in records:
            _print_details(record)
        step_maps(records)


def _record_row(record: Record, timing: bool, stats: bool) -> list[str]:
    exact = "exact, rounding" if record.tolerance else "exact"
    promise = exact if record.exact else "approximate"
    row = [record.text, "yes" if record.changed else "no", promise]
    row += [_number(value) for value in (record.max_abs, record.relative, record.drift)]
    row += [f"{record.seconds:.2f}"] if timing else []
    return row + (_sizes(record.before, record.after) if stats else [])


def _sizes(before: Size, after: Size) -> list[str]:
    pairs = [
        (before.nodes, after.nodes),
        (before.parameters, after.parameters),
        (before.flops, after.flops),
    ]
    return [count(old) if old == new else f"{count(old)} → {count(new)}" for old, new in pairs]


def _print_details(record: Record) -> None:
    console = stdout()
    if record.tolerance:
        console.print(f"{record.text}: allowed {record.tolerance}", markup=False)
    for key, value in record.notes.items():
        if step_map.is_map(value):
            continue  # printed as a map
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            rows = [list(map(_number, row.values())) for row in value]
            table(f"{record.text}: {key}", list(value[0]), rows)
            continue
        console.print(f"{record.text}: {key} = {value}", markup=False)
    reasons = Counter(text.partition(": ")[2] for text in record.skipped)
    for reason, times in reasons.most_common():
        console.print(f"{record.text}: not rewritten {times}×: {reason}", markup=False)


def _number(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def step_maps(records: Sequence[Record]) -> None:
    """Print the step maps of passes that reuse values of earlier steps, and the FLOPs they save."""
    for report in step_map.step_map_reports(records):
        flops = report.note["flops"]
        numbers = [flops["before"], flops["predicted"], flops["measured"]]
        row = [report.component, *map(count, numbers), f"{report.flops_ratio:.3g}×"]
        row += [str(report.note["bodies"]), f"{report.note['peak cache bytes'] / 2**20:.3g}"]
        columns = ["loop", "FLOPs before", "predicted", "measured", "fewer", "bodies"]
        columns += ["peak cache MB", "relative error"]
        table(report.text, columns, [[*row, _number(report.relative)]])
        _print_map(report)


def _print_map(report: step_map.StepMapReport) -> None:
    legend = Text("   ").join(
        Text.assemble(_cell(report, sign), f" {meaning}")
        for sign, meaning in report.note["legend"].items()
    )
    grid = Table()
    grid.add_column("block", no_wrap=True)
    grid.add_column(_ruler(report.steps), overflow="fold")
    for label, signs in report.note["map"].items():
        grid.add_row(Text(label), Text("").join(_cell(report, sign) for sign in signs))
    console = stdout()
    console.print(legend)
    console.print(grid)


def _cell(report: step_map.StepMapReport, sign: str) -> Text:
    return Text(sign, style=f"black on {report.colour(sign)}")


def _ruler(steps: int) -> str:
    """Return the numbers of every fifth or tenth step, each at its column."""
    apart = 5 if steps <= 20 else 10
    # Spaces would be wrapped at other places than the rows.
    numbers = (str(step).ljust(apart, "·") for step in range(0, steps, apart))
    return "".join(numbers)[: max(steps, 1)]
