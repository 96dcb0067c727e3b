"""Compares pruned pipelines; writes the measurements in docs/pruning.md.

    python -m examples.pruning --phase quality --only fashion-sd --threads 1   # both at the
    python -m examples.pruning --phase quality --only fashion-dit --threads 1  # same time
    python -m examples.pruning --phase time large  # by itself, on a machine that is idle
    pip install --target peers --no-deps torch-pruning
    PYTHONPATH=peers python -m examples.pruning --phase quality peers

Every configuration is kept in docs/pruning.json as soon as it is measured, and what is there is not
measured again, so a run that was stopped goes on where it was. Programs, images and features are
kept in --work. What `--again` names is made anew; after a change of a pass it is needed. With
`--phase` alone, only the section is written. Without torch-pruning, its rows are left out.
"""

import argparse
from collections.abc import Sequence
from itertools import product

from examples.benchmarks import report
from examples.pruning import peers
from examples.pruning.configurations import (
    FEWER,
    LARGE,
    TARGET,
    THEIRS,
    configurations,
    is_timed,
    pipeline,
    split,
)
from examples.pruning.document import DOCUMENT, pictured, section
from examples.pruning.programs import make
from examples.study import large
from examples.study.command import add_large, begin, finish, image_parser, measure, parse, run
from examples.study.document import draw
from examples.study.measure import Measurements
from examples.study.results import Results
from examples.study.study import Study


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    phases = ("quality", "time", "large", "peers")
    parser = image_parser("examples.pruning", __doc__, phases, DOCUMENT, 192)
    parser.add_argument("--steps", type=int, nargs="+", default=[*FEWER])
    parser.add_argument("--configs", nargs="+", help="default: all")
    parser.add_argument("--target", default=TARGET, help="of the engines that are timed")
    add_large(parser, 5, [TARGET])
    options = parse(parser, words)
    for config in options.configs or ():
        pipeline([call for call in split(config) if not call.startswith(THEIRS)])
    return options


def trained(name: str, steps: int, options: argparse.Namespace, results: Results) -> None:
    """Measure one of the trained models."""
    study = Study(name, steps, options.work, make)
    keys = "models", f"{name}, {steps} steps"
    configs = _possible(options.configs or configurations(name, steps))
    model = Measurements(study, results, keys, each=True)
    rows = measure(model, options, configs, is_timed)
    version = peers.version()
    if "peers" in options.phase and version is not None and steps == max(options.steps):
        results.put({"version": version, "found": peers.compared(study)}, *keys, "groups")
    draw(study, pictured(rows), options.document.parent / f"pruning-{name}-{steps}.png")


def _possible(configs: Sequence[str]) -> list[str]:
    """Leave out what a missing package would prune."""
    if peers.version() is not None:
        return list(configs)
    report(f"no comparison with {THEIRS}: install it")
    return [config for config in configs if not config.startswith(THEIRS)]


def main(words: Sequence[str] | None = None) -> None:
    """Run what was asked for, and write the section of the document."""
    options = arguments(words)
    results = begin(options, {"images": options.images}, timed=["time", "large"])
    if {"quality", "time", "peers"} & {*options.phase}:
        for name, steps in product(options.only, options.steps):
            trained(name, steps, options, results)
    if "large" in options.phase:
        configs = [pipeline(split(config)) for config in options.configs or LARGE]
        for name in options.large:
            large.measure(name, configs, options, results, passes="")
    finish(options, results, section(results.read(), options.document.parent))


if __name__ == "__main__":
    run("examples.pruning", main)
