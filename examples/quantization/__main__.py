"""Compares quantized pipelines; writes the measurements in docs/quantization.md.

    python -m examples.quantization --phase quality --only fashion-sd --threads 1   # both at the
    python -m examples.quantization --phase quality --only fashion-dit --threads 1  # same time
    python -m examples.quantization --phase time large    # by itself, on a machine that is idle
    pip install --target peers openvino nncf
    PYTHONPATH=peers python -m examples.quantization --phase peers

Every configuration is kept in docs/quantization.json as soon as it is measured, and what is there
is not measured again, so a run that was stopped goes on where it was. Programs, images and features
are kept in --work. What `--again` names is made anew; after a change of a pass it is needed. With
`--phase` alone, only the section is written.
"""

import argparse
from collections.abc import Sequence
from itertools import product

from examples.benchmarks import report
from examples.quantization import peers
from examples.quantization.configurations import BF16, CONFIGS, EMULATED, LARGE, split
from examples.quantization.document import DOCUMENT, pictured, section
from examples.quantization.measure import looker
from examples.quantization.programs import make
from examples.study import large
from examples.study.command import add_large, begin, finish, image_parser, measure, parse, run
from examples.study.document import draw
from examples.study.measure import Measurements
from examples.study.results import Results
from examples.study.study import REFERENCE, Study


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    phases = ("quality", "time", "large", "peers")
    parser = image_parser("examples.quantization", __doc__, phases, DOCUMENT, 192)
    parser.add_argument("--steps", type=int, choices=CONFIGS, nargs="+", default=[*CONFIGS])
    parser.add_argument("--configs", nargs="+", help="default: all")
    parser.add_argument("--engine-images", type=int, default=64, help="of the engines' own")
    parser.add_argument("--target", default="cpu(pack=true)", help="of the engines that are timed")
    add_large(parser, 25, ["cpu(pack=true)", "cpu(freeze=true)"])
    options = parse(parser, words)
    for config in options.configs or ():
        split(config)
    return options


def trained(name: str, steps: int, options: argparse.Namespace, results: Results) -> None:
    """Measure quality and times of one of the trained models."""
    study = Study(name, steps, options.work, make)
    model = Measurements(study, results, ("models", f"{name}, {steps} steps"), each=True)
    look = looker(study, options.target, min(options.engine_images, options.images))
    configs = options.configs or CONFIGS[steps]
    rows = measure(
        model, options, configs, lambda config: config not in EMULATED, (REFERENCE, BF16), look
    )
    draw(study, pictured(rows), options.document.parent / f"quantization-{name}-{steps}.png")


def main(words: Sequence[str] | None = None) -> None:
    """Run what was asked for, and write the section of the document."""
    options = arguments(words)
    results = begin(options, {"images": options.images}, timed=["time", "large", "peers"])
    if {"quality", "time"} & {*options.phase}:
        for name, steps in product(options.only, options.steps):
            trained(name, steps, options, results)
    for name in options.large:
        if "large" in options.phase:
            large.measure(name, options.configs or LARGE, options, results)
        if "peers" in options.phase and peers.versions() is None:
            report(f"no comparison with {' and '.join(peers.PACKAGES)}: install them")
        elif "peers" in options.phase:
            peers.measure(name, options, results)
    finish(options, results, section(results.read(), options.document.parent))


if __name__ == "__main__":
    run("examples.quantization", main)
