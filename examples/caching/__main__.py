"""Compares cache policies with each other and with fewer steps; writes docs/caching.md's section.

    python -m examples.caching --phase quality --only fashion-sd --threads 1   # at the same time as
    python -m examples.caching --phase quality --only fashion-dit --threads 1  # this, and then
    python -m examples.caching --phase time            # by itself, on a machine that is idle

Every configuration is kept in docs/caching.json as soon as it is measured, and what is there is not
measured again, so a run that was stopped goes on where it was. Two processes share the work on one
model if the second gets `--configs` in another order. Programs, images and features are kept in
--work. What `--again` names is made anew; after a change of a policy it is needed. With `--phase`
alone, only the section is written.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from diffopt import cachedir
from diffopt.core import Pipeline
from diffopt.errors import DiffoptError
from examples.benchmarks import machine, report
from examples.caching.configurations import CONFIGS, REFERENCE, shown
from examples.caching.document import DOCUMENT, draw, rewrite
from examples.caching.measure import quality, times
from examples.caching.models import ARGUMENTS
from examples.caching.results import Results
from examples.caching.study import OTHER_SEEDS, Study


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.caching", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--only", choices=ARGUMENTS, nargs="+", default=list(ARGUMENTS))
    phases = ("quality", "time")
    parser.add_argument("--phase", choices=phases, nargs="*", default=phases, help="default: both")
    parser.add_argument("--configs", nargs="+", default=CONFIGS, help="default: all")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--target", default="cpu", help="of the engines that are timed")
    parser.add_argument("--again", action="store_true", help="measure what is known once more")
    parser.add_argument("--work", type=Path, default=cachedir.folder() / "caching")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    options = parser.parse_args(words)
    for config in options.configs:
        if config != REFERENCE:
            Pipeline.parse(shown(config))
    if not 2 <= options.images <= OTHER_SEEDS:
        parser.error(f"--images: wants 2 to {OTHER_SEEDS}, other seeds follow")
    return options


def prepare(options: argparse.Namespace, results: Results) -> None:
    """Check that known results are of the same kind, and forget those that are made again."""
    setup = {"images": options.images, "steps": options.steps}
    if results.get("setup") not in (None, setup):
        raise DiffoptError(
            f"{results.path} has results of {results.get('setup')}: remove it, or ask for the same"
        )
    results.put(setup, "setup")
    if "time" in options.phase:
        now = machine(options.threads)
        if results.get("machine") not in (None, now):
            raise DiffoptError(f"{results.path} has times of another machine, or thread count")
        results.put(now, "machine")
    if not options.again:
        return
    for name in options.only:
        for config in options.configs:
            row = results.get("models", name, "configs", config) or {}
            for phase in options.phase:
                row.pop(phase, None)
            row = {key: value for key, value in row.items() if key not in ("left out", "failed")}
            results.put(row, "models", name, "configs", config)
            if "quality" in options.phase:
                Study(name, options.steps, options.work).forget(config)


def main(words: Sequence[str] | None = None) -> None:
    """Run what was asked for, and write the section of the document."""
    options = arguments(words)
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    results = Results(options.document.with_suffix(".json"), options.work / "lock")
    prepare(options, results)
    for name in options.only:
        study = Study(name, options.steps, options.work)
        if "quality" in options.phase:
            quality(study, options.configs, results, options.images)
        if "time" in options.phase:
            times(study, options.configs, results, options.rounds, options.target)
        rows = results.get("models", name, "configs") or {}
        rows = {c: r for c, r in rows.items() if "quality" in r}
        draw(study, rows, options.document.parent / f"caching-{name}.png")
    rewrite(options.document, results.read())
    report(f"wrote {options.document} and {results.path}")


if __name__ == "__main__":
    try:
        main()
    except DiffoptError as error:
        sys.exit(f"examples.caching: error: {error}")
