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
from collections.abc import Sequence

from diffopt.core import Pipeline
from examples.caching.configurations import CONFIGS, shown
from examples.caching.document import DOCUMENT, picture_rows, section
from examples.caching.programs import make, relative_cost
from examples.study.command import begin, finish, image_parser, measure, parse, run
from examples.study.document import draw
from examples.study.measure import Measurements
from examples.study.study import REFERENCE, Study


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = image_parser("examples.caching", __doc__, ("quality", "time"), DOCUMENT, 512)
    parser.add_argument("--configs", nargs="+", default=CONFIGS, help="default: all")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--target", default="cpu", help="of the engines that are timed")
    options = parse(parser, words)
    for config in options.configs:
        if config != REFERENCE:
            Pipeline.parse(shown(config))
    return options


def main(words: Sequence[str] | None = None) -> None:
    """Run what was asked for, and write the section of the document."""
    options = arguments(words)
    setup = {"images": options.images, "steps": options.steps}
    results = begin(options, setup, timed=["time"])
    folder = options.document.parent
    for name in options.only:
        study = Study(name, options.steps, options.work, make)
        model = Measurements(study, results, ("models", name), relative_cost)
        rows = measure(model, options, options.configs)
        rows = {config: row for config, row in rows.items() if "quality" in row}
        draw(study, picture_rows(rows), folder / f"caching-{name}.png")
    finish(options, results, section(results.read(), folder))


if __name__ == "__main__":
    run("examples.caching", main)
