"""What the benchmarks' command lines have in common."""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from diffopt.errors import DiffoptError
from diffopt.storage import disk_cache
from examples.benchmarks import machine, report
from examples.study import large
from examples.study.document import rewrite
from examples.study.models import ARGUMENTS
from examples.study.results import Results
from examples.study.study import OTHER_SEEDS, Study


def parser_of(
    module: str, about: str, phases: Sequence[str], document: Path, images: int
) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    name = module.rpartition(".")[2]
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=about)
    parser.add_argument("--only", choices=ARGUMENTS, nargs="+", default=list(ARGUMENTS))
    parser.add_argument("--phase", choices=phases, nargs="*", default=phases, help="default: all")
    parser.add_argument("--images", type=int, default=images)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="measure what is known once more")
    parser.add_argument("--work", type=Path, default=disk_cache.folder() / name)
    parser.add_argument("--document", type=Path, default=document)
    return parser


def add_large(parser: argparse.ArgumentParser, steps: int, targets: Sequence[str]) -> None:
    """Add the options of the phase that times larger models."""
    parser.add_argument("--large", choices=large.MAKE, nargs="+", default=[*large.MAKE])
    parser.add_argument("--large-steps", type=int, default=steps)
    parser.add_argument("--large-targets", nargs="+", default=targets)


def check_images(parser: argparse.ArgumentParser, count: int) -> None:
    """Stop if so many images would have seeds of others."""
    if not 2 <= count <= OTHER_SEEDS:
        parser.error(f"--images: wants 2 to {OTHER_SEEDS}, other seeds follow")


def check_setup(results: Results, setup: dict[str, Any]) -> None:
    """Check that known results are of the same kind."""
    if results.get("setup") not in (None, setup):
        raise DiffoptError(
            f"{results.path} has results of {results.get('setup')}: remove it, or ask for the same"
        )
    results.put(setup, "setup")


def known(options: argparse.Namespace) -> Results:
    """Return the results that are known, beside the document."""
    options.work.mkdir(parents=True, exist_ok=True)
    return Results(options.document.with_suffix(".json"), options.work / "lock")


def begin(options: argparse.Namespace, setup: dict[str, Any]) -> Results:
    """Set the threads, and return the known results of this setup."""
    torch.set_num_threads(options.threads)
    results = known(options)
    check_setup(results, setup)
    return results


def finish(options: argparse.Namespace, results: Results, section: str) -> None:
    """Write the section of the document."""
    rewrite(options.document, section)
    report(f"wrote {options.document} and {results.path}")


def run(module: str, main: Callable[[], None]) -> None:
    """Run a benchmark's command; what the user can mend is one line."""
    try:
        main()
    except DiffoptError as error:
        sys.exit(f"{module}: error: {error}")


def check_machine(results: Results, threads: int) -> None:
    """Check that known times are of this machine."""
    now = machine(threads)
    if results.get("machine") not in (None, now):
        raise DiffoptError(f"{results.path} has times of another machine, or thread count")
    results.put(now, "machine")


def forget(
    study: Study,
    at: tuple[str, ...],
    configs: Iterable[str],
    phases: Sequence[str],
    results: Results,
) -> None:
    """Forget the results of phases, and the images of the first of all."""
    for config in configs:
        row = results.get(*at, "configs", config) or {}
        gone = {*phases, "left out", "failed"}
        kept = {key: value for key, value in row.items() if key not in gone}
        results.put(kept, *at, "configs", config)
        if "quality" in phases:
            study.forget(config)
