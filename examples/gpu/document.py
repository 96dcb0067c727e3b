"""Makes the tables of docs/benchmarks-gpu.md, and of the terminal, from the results."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from examples.gpu.models import MODELS
from examples.gpu.rows import ALL, BASELINE, REFERENCE, ROWS
from examples.study.document import milliseconds

DOCUMENT = Path(__file__).parents[2] / "docs" / "benchmarks-gpu.md"

COLUMNS = (
    "",
    "ms a run",
    "× eager",
    "× compiled",
    "ms a step",
    "build, s",
    "first run, s",
    "memory, GB",
    "error",
)

WHY_NOT = {"failed", "stopped", "left out"}
"""Keys of rows without measurements: the reason."""

GOALS = {
    "sdxl": (("exact", BASELINE, 1.15), (ALL, REFERENCE, 3.5)),
}
"""By model: a row, the row that it has to be faster than, and the ratio."""

Rows = Mapping[str, Any]


def section(data: Rows) -> str:
    """Return the results as the text between the markers."""
    parts = [*_times(data), *_weights(data.get("weights", {}))]
    return "\n".join(
        ["`python -m examples.gpu` writes this section from the JSON beside it.", *parts]
    )


def show(data: Rows, console: Console) -> None:
    """Print the times."""
    for name, model in data.get("models", {}).items():
        table = Table(title=_title(name, model, data))
        for column in COLUMNS:
            table.add_column(column, justify="right" if column else "left")
        for cells in _cells(model):
            table.add_row(*cells)
        console.print(table)
        for line in [*_missing(model), *_goals(name, model)]:
            console.print(line)


def _times(data: Rows) -> list[str]:
    models = {name: data["models"][name] for name in MODELS if name in data.get("models", {})}
    if not models:
        return ["", "No times have been taken yet: no GPU was at hand."]
    setup = data["setup"]
    lines = ["", f"{setup['device']}, torch {setup['torch']}, target `{setup['target']}`."]
    for name, model in models.items():
        lines += ["", f"### {_title(name, model, data)}", ""]
        lines += [f"| {' | '.join(COLUMNS)} |", "| --- |" + " ---: |" * (len(COLUMNS) - 1)]
        lines += [f"| {' | '.join(cells)} |" for cells in _cells(model)]
        notes = [*_missing(model), *_goals(name, model), *_steps(model)]
        lines += ["", *notes] if notes else []
    return lines


def _title(name: str, model: Rows, data: Rows) -> str:
    about = "tiny" if data["setup"]["tiny"] else MODELS[name].about
    return f"{MODELS[name].title}, {about}, {model['steps']} steps"


def _cells(model: Rows) -> list[list[str]]:
    """Return the cells of a model's rows that were measured."""
    rows = model["rows"]
    medians = {n: statistics.median(row["seconds"]) for n, row in rows.items() if "seconds" in row}
    table = []
    for name, about in ROWS.items():
        row = rows.get(name, {})
        if "errors" not in row:
            continue
        error = f"{statistics.mean(row['errors']):.1e}"
        if name not in medians:
            table.append([about.title, *["-"] * (len(COLUMNS) - 2), error])
            continue
        table.append(
            [
                about.title,
                milliseconds(row["seconds"]),
                _ratio(medians, REFERENCE, name),
                _ratio(medians, BASELINE, name),
                f"{1e3 * medians[name] / model['steps']:.1f}",
                f"{sum(row['build'].values()):.0f}",
                f"{row['first']:.1f}",
                "-" if row["memory"] is None else f"{row['memory'] / 1e9:.1f}",
                error,
            ]
        )
    return table


def _ratio(medians: Mapping[str, float], slow: str, name: str) -> str:
    return f"{medians[slow] / medians[name]:.2f}" if slow in medians else "-"


def _missing(model: Rows) -> list[str]:
    """Return what was not measured, and why."""
    lines = []
    for name, row in model["rows"].items():
        for what in WHY_NOT & row.keys():
            lines.append(f"- {ROWS[name].title}: {what}: {row[what]}")
    return lines


def _goals(name: str, model: Rows) -> list[str]:
    """Return how rows compare with their goals."""
    rows, lines = model["rows"], []
    for row, other, goal in GOALS.get(name, ()):
        if all("seconds" in rows.get(each, {}) for each in (row, other)):
            slow, fast = (statistics.median(rows[each]["seconds"]) for each in (other, row))
            lines.append(
                f"- {ROWS[row].title} against {ROWS[other].title}: {slow / fast:.2f}×, the goal"
                f" is {goal}×."
            )
    return lines


def _steps(model: Rows) -> list[str]:
    """Return the cost of single steps: seconds in diffusers, FLOPs in engines."""
    lines = []
    for name, row in model["rows"].items():
        if "seconds of steps" in row:
            each = [1e3 * seconds for seconds in row["seconds of steps"]]
            lines.append(
                f"- {ROWS[name].title}: steps take {min(each):.1f} to {max(each):.1f} ms, the"
                " device waiting after each."
            )
        if "flops of steps" in row:
            limit = f", at best {1e3 * row['limit']:.0f} ms a run" if "limit" in row else ""
            lines.append(
                f"- {ROWS[name].title}: {_runs(row['flops of steps'])} TFLOP a step, and"
                f" {row['flops before'] / 1e12:.3g} before the first{limit}."
            )
    return lines


def _runs(flops: list[int]) -> str:
    """Return the operations of steps, those of equal cost counted together."""
    kinds = [f"{value / 1e12:.3g}" for value in flops]
    counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    return " and ".join(f"{count} × {kind}" for kind, count in counts.items())


def _weights(rows: Rows) -> list[str]:
    if not rows:
        return []
    columns = (
        "model, steps",
        "parameters",
        "weights, GB",
        "read in the loop, GB",
        "",
        "kept for all steps, GB",
        "all together",
        "TFLOP a run",
    )
    lines = ["", "### Weights that the loop needs", ""]
    lines += [f"| {' | '.join(columns)} |", "| --- |" + " ---: |" * (len(columns) - 1)]
    for name in MODELS:
        if name in rows:
            row = rows[name]
            before, after, kept = row["before"], row["after"], row["values"]
            cells = (
                f"{MODELS[name].title}, {row['steps']}",
                f"{row['parameters'] / 1e9:.2f} B",
                f"{before / 1e9:.2f}",
                f"{after / 1e9:.2f}",
                _change(before, after),
                f"{kept / 1e9:.2f}",
                _change(before, after + kept),
                " to ".join(f"{row['flops'][key] / 1e12:.1f}" for key in ("before", "after")),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _change(before: int, after: int) -> str:
    return f"{100 * (after - before) / before:+.1f} %"
