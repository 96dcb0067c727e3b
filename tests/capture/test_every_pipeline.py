"""Every public pipeline class of diffusers, from its capture to its engine: `make test-capture`.

A program gives the bits of its pipeline, or is refused in one line. A run of all rows writes
docs/capture-all.md.
"""

import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import pytest

from tests.capture.whole_pipeline import PASSES, STEPS
from tests.zoo.every import LEFT_OUT, pipelines

pytestmark = pytest.mark.every

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "capture-all.md"
TOGETHER = 8  # rows in one process: imports take longer than a row
LIMIT = 300  # seconds until a row is given up
REFUSALS = ("CaptureError", "DiffoptError", "Mismatch")
NAMES = [name for name in pipelines() if name not in LEFT_OUT]


@dataclass
class Row:
    """What became of a pipeline: the steps that passed, and why there are no more."""

    steps: list[str] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""
    kind: str = ""

    @property
    def whole(self) -> bool:
        return self.steps == list(STEPS)


def run(names: list[str]) -> dict[str, Row]:
    """Run rows in one process; a crash or a hang is an error of the row that it was at."""
    rows: dict[str, Row] = {}
    command = [sys.executable, "-m", "tests.capture.whole_pipeline", *names]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        assert child.stdout is not None
        timer = limit(child, LIMIT + 30)  # for the imports
        for line in child.stdout:
            if not line.startswith("ROW "):
                continue
            said = json.loads(line.removeprefix("ROW "))
            row = rows.setdefault(said["name"], Row())
            row.seconds = said["seconds"]
            row.steps += [said["step"]] if "step" in said else []
            row.error, row.kind = said.get("error", ""), said.get("kind", "")
            if row.whole or row.error:
                timer.cancel()
                timer = limit(child, LIMIT)
        timer.cancel()
    for name in names:
        row = rows.setdefault(name, Row())
        if not row.whole and not row.error:
            row.kind = "Stopped"
            row.error = f"no result in {LIMIT} seconds" if child.returncode == -9 else "crashed"
            return {n: r for n, r in rows.items() if n in names[: names.index(name) + 1]}
    return rows


def limit(child: subprocess.Popen[str], seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, child.kill)
    timer.start()
    return timer


def run_all(names: list[str]) -> dict[str, Row]:
    """Run rows, in another process from where one has crashed."""
    rows: dict[str, Row] = {}
    while left := [name for name in names if name not in rows]:
        rows |= run(left)
    return rows


@pytest.fixture(scope="module")
def futures(request):
    """Run the rows of the tests that were chosen, with a process for each core."""
    chosen = {
        getattr(item, "callspec", None) and item.callspec.id for item in request.session.items
    }
    names = [name for name in NAMES if name in chosen]
    found: dict[str, Future[dict[str, Row]]] = {}
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    for start in range(0, len(names), TOGETHER):
        part = names[start : start + TOGETHER]
        found |= dict.fromkeys(part, pool.submit(run_all, part))
    yield found
    pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def rows():
    """Collect the rows, and write the document if none was left out."""
    found: dict[str, Row] = {}
    yield found
    if found.keys() == set(NAMES):
        DOCUMENT.write_text(document(found), encoding="utf-8", newline="\n")


def document(rows: dict[str, Row]) -> str:
    """Return the document, in the order of names."""
    whole = sum(row.whole for row in rows.values())
    lines = [
        "# Every pipeline",
        "",
        "`make test-capture` writes this file: a row for each public pipeline class of diffusers",
        "that can be built from tiny configurations. Captured: `trace` compared the program with",
        "the pipeline. New request: a prompt of as many tokens, other pictures, another seed; the",
        f"same bits. Exact passes: `{PASSES}`, each checked. Engine: built for the target",
        "`eager`, loaded, the same bits.",
        "",
        f"{whole} of {len(rows)} are whole.",
        "",
        f"| pipeline | {' | '.join(STEPS)} | seconds | why not |",
        f"| --- |{' --- |' * (len(STEPS) + 2)}",
    ]
    for name in sorted(rows):
        row = rows[name]
        marks = " | ".join("yes" if step in row.steps else "" for step in STEPS)
        lines.append(f"| {name} | {marks} | {row.seconds:.0f} | {cell(row)} |")
    lines += ["", "| pipeline without a row | why |", "| --- | --- |"]
    lines += [f"| {name} | {why} |" for name, why in sorted(LEFT_OUT.items())]
    return "\n".join(lines) + "\n"


def cell(row: Row) -> str:
    """Return the first line of an error as it can stand in a table, without addresses."""
    first = row.error.strip().partition("\n")[0]
    text = first if row.kind in (*REFUSALS, "") else f"{row.kind}: {first}"
    text = re.sub(r"0x[0-9a-f]+", "0x...", text).replace("|", "\\|")
    return text if len(text) <= 300 else text[:300] + "…"


@pytest.mark.parametrize("name", NAMES)
def test_pipeline(name, rows, futures):
    row = rows[name] = futures[name].result()[name]
    assert row.whole or row.kind in REFUSALS, f"{row.kind} after {row.steps}: {row.error}"


def test_most_are_whole(rows):
    assert sum(row.whole for row in rows.values()) >= 0.95 * len(rows)


def test_every_reason_is_of_a_pipeline():
    known = {name for name in diffusers._class_to_module if name.endswith("Pipeline")}
    assert LEFT_OUT.keys() <= known
