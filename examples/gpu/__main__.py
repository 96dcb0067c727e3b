"""Times full-size models on a GPU against diffusers; writes docs/benchmarks-gpu.md.

    python -m examples.gpu --only sdxl --minutes 9      # on the GPU
    python -m examples.gpu --phase weights              # anywhere: what the loop needs of weights
    python -m examples.gpu --tiny --target cpu --document tiny.md   # a document with the markers

Rows are measured in order of worth until the time is over, and kept in the JSON file beside the
document as soon as they are there. What is there is not measured again, so the next run goes on.
`--phase` without a name writes the document from what is known.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from diffopt.errors import DiffoptError
from diffopt.lowering.target import Target, parse_target
from examples.benchmarks import report
from examples.gpu import savings
from examples.gpu.document import DOCUMENT, WHY_NOT, section, show
from examples.gpu.measure import Settings
from examples.gpu.models import MODELS
from examples.gpu.rows import ROWS
from examples.gpu.worker import Answer, Team
from examples.study.command import base_parser, check_setup, finish, run
from examples.study.results import Results

WEIGHTS = "weights"


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = base_parser("examples.gpu", __doc__, MODELS, DOCUMENT)
    parser.add_argument(
        "--phase", choices=[*ROWS, WEIGHTS], nargs="*", default=[*ROWS], help="default: all rows"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="stop whatever runs after this")
    parser.add_argument("--rounds", type=int, default=11, help="runs that are timed")
    parser.add_argument("--steps", type=int, help="of sampling; default: each model's")
    parser.add_argument("--target", default="h100")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try everything")
    parser.add_argument(
        "--out",
        type=Path,
        help="the results, which begin as those beside the document: the default",
    )
    options = parser.parse_args(words)
    if options.minutes <= 0:
        parser.error("--minutes: wants more than 0")
    if options.rounds < 1:
        parser.error("--rounds: wants 1 or more")
    if options.steps is not None and options.steps < 2:
        parser.error("--steps: wants 2 or more, there is no loop in one")
    if options.tiny and options.document == DOCUMENT:
        parser.error("--tiny: give a --document of its own, this one is about full sizes")
    return options


def main(words: Sequence[str] | None = None) -> None:
    """Measure what was asked for, write the section of the document, and print the tables."""
    started = time.monotonic()
    options = arguments(words)
    results = _results(options)
    rows = [name for name in ROWS if name in options.phase]
    if rows:
        device = _device(parse_target(options.target))
        check_setup(results, _setup(options, device))
        _measure(options, results, rows, device, started + 60 * options.minutes)
    if WEIGHTS in options.phase:
        _count(options, results)
    data = results.read()
    finish(options, results, section(data))
    show(data, Console(width=140))


def _results(options: argparse.Namespace) -> Results:
    """Return the known results, in the file to which more are added."""
    options.work.mkdir(parents=True, exist_ok=True)
    beside = options.document.with_suffix(".json")
    path = options.out or beside
    if beside.exists() and not path.exists():
        shutil.copyfile(beside, path)
    return Results(path, options.work / "results.lock")


def _device(target: Target) -> str:
    """Return the device of a target's engines, and of what they are compared with."""
    if "cuda" not in target.kinds:
        return "cpu"
    if not torch.cuda.is_available():
        raise DiffoptError(
            f"target {target} needs a GPU, and torch finds none here; to try the command without"
            " one, write --tiny --target cpu"
        )
    return "cuda"


def _setup(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """Return the setup that all results in a file share."""
    return {
        "target": options.target,
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "tiny": options.tiny,
        "steps": options.steps,
    }


def _measure(
    options: argparse.Namespace, results: Results, rows: Sequence[str], device: str, until: float
) -> None:
    """Measure rows that are not in the results yet, model by model."""
    for name in options.only:
        known = results.get("models", name, "rows") or {}
        wanted = [row for row in rows if options.again or "errors" not in known.get(row, {})]
        with tempfile.TemporaryDirectory(dir=options.work) as work:
            settings = Settings(
                model=name,
                tiny=options.tiny,
                steps=options.steps or MODELS[name].steps,
                target=options.target,
                device=device,
                rounds=options.rounds,
                work=Path(work),
            )
            results.put(settings.steps, "models", name, "steps")
            with Team(settings, any(ROWS[row].kind == "engine" for row in wanted)) as team:
                for row in wanted:
                    answer = _row(team, row, until)
                    if "errors" in answer or "errors" not in known.get(row, {}):
                        results.put(answer, "models", name, "rows", row)


def _row(team: Team, name: str, until: float) -> Answer:
    """Measure one row, if there is time."""
    row, left = ROWS[name], until - time.monotonic()
    if row.needs_gpu and team.settings.device != "cuda":
        return {"left out": "it needs a GPU"}
    if left <= 0:
        return {"stopped": "the time was over before it began"}
    report(f"{team.settings.model}: {row.title}, {left / 60:.1f} min left")
    answer = team.measure(row, min(left, 60 * row.minutes))
    for what in WHY_NOT & answer.keys():
        report(f"{team.settings.model}: {row.title}: {what}: {answer[what]}")
    return answer


def _count(options: argparse.Namespace, results: Results) -> None:
    """Count the weights of the models."""
    for name in options.only:
        report(f"{name}: counting weights")
        steps = options.steps or MODELS[name].steps
        results.put(savings.count(name, options.tiny, steps), WEIGHTS, name)


if __name__ == "__main__":
    run("examples.gpu", main)
