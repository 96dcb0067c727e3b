"""The command line of all benchmarks: options, checks of known results, phases, the document."""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diffopt.errors import DiffoptError
from diffopt.storage import disk_cache
from examples.benchmarks import machine, report
from examples.study import large
from examples.study.document import rewrite
from examples.study.measure import Look, Measurements
from examples.study.models import ARGUMENTS
from examples.study.results import Results
from examples.study.study import OTHER_SEEDS, REFERENCE


def base_parser(
    module: str, doc: str, models: Iterable[str], document: Path
) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark; `doc` is its module's docstring."""
    name, about = module.rpartition(".")[2], doc.partition("\n")[0]
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=about)
    parser.add_argument("--only", choices=[*models], nargs="+", default=[*models])
    parser.add_argument("--again", action="store_true", help="measure what is known once more")
    parser.add_argument("--work", type=Path, default=disk_cache.folder() / name)
    parser.add_argument("--document", type=Path, default=document)
    return parser


def image_parser(
    module: str, doc: str, phases: Sequence[str], document: Path, images: int
) -> argparse.ArgumentParser:
    """Return a parser with the options of benchmarks that compare images of the trained models."""
    parser = base_parser(module, doc, ARGUMENTS, document)
    parser.add_argument("--phase", choices=phases, nargs="*", default=phases, help="default: all")
    parser.add_argument("--images", type=int, default=images)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    return parser


def add_large(parser: argparse.ArgumentParser, steps: int, targets: Sequence[str]) -> None:
    """Add the options of the phase that times larger models."""
    parser.add_argument("--large", choices=large.MAKE, nargs="+", default=[*large.MAKE])
    parser.add_argument("--large-steps", type=int, default=steps)
    parser.add_argument("--large-targets", nargs="+", default=targets)


def parse(parser: argparse.ArgumentParser, words: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, whose images have to have seeds of their own."""
    options = parser.parse_args(words)
    if not 2 <= options.images <= OTHER_SEEDS:
        parser.error(f"--images: wants 2 to {OTHER_SEEDS}, other seeds follow")
    return options


def known(options: argparse.Namespace) -> Results:
    """Return the results that are known, beside the document."""
    options.work.mkdir(parents=True, exist_ok=True)
    return Results(options.document.with_suffix(".json"), options.work / "lock")


def check_setup(results: Results, setup: dict[str, Any]) -> None:
    """Check that known results are of the same kind."""
    if results.get("setup") not in (None, setup):
        raise DiffoptError(
            f"{results.path} has results of {results.get('setup')}: remove it, or ask for the same"
        )
    results.put(setup, "setup")


def begin(options: argparse.Namespace, setup: dict[str, Any], timed: Iterable[str]) -> Results:
    """Set the threads, and return the known results, of this setup and (if timed) machine."""
    torch.set_num_threads(options.threads)
    results = known(options)
    check_setup(results, setup)
    if {*timed} & {*options.phase}:
        now = machine(options.threads)
        if results.get("machine") not in (None, now):
            raise DiffoptError(f"{results.path} has times of another machine, or thread count")
        results.put(now, "machine")
    return results


def measure(
    model: Measurements,
    options: argparse.Namespace,
    configs: Sequence[str],
    is_timed: Callable[[str], bool] = lambda config: True,
    beside: Sequence[str] = (REFERENCE,),
    look: Look = lambda config, engine: {},
) -> Mapping[str, Any]:
    """Run the phases "quality" and "time" of a model, and return all that is known of it."""
    if options.again:
        model.forget(configs, options.phase)
    if "quality" in options.phase:
        model.quality(configs, options.images)
    if "time" in options.phase:
        timed = [*filter(is_timed, configs)]
        model.times(timed, options.rounds, options.target, beside, look)
    return model.rows()


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
