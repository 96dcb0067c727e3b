"""Builds TensorRT plans of many models for several GPUs; writes the table in docs/tensorrt.md.

    python -m examples.targets                       # about an hour on two cores
    python -m examples.targets --only sdxl --formats fp16 --minutes 3

It needs no GPU. Every component is kept in docs/tensorrt.json as soon as it is built, and what is
there is not built again, so a run that was stopped goes on where it was. Captured programs are kept
in --work. What `--again` names is built anew; after a change of the lowering it is needed.
"""

import argparse
import time
from collections.abc import Sequence

from examples.benchmarks import report
from examples.study.command import base_parser, finish, known, run
from examples.study.results import Results
from examples.targets import measure
from examples.targets.document import DEVICES, DOCUMENT, section
from examples.targets.programs import FORMATS, MODELS, formats, make


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = base_parser("examples.targets", __doc__, MODELS, DOCUMENT)
    parser.add_argument("--formats", choices=FORMATS, nargs="+", default=[*FORMATS])
    parser.add_argument("--minutes", type=float, help="start nothing later than this")
    return parser.parse_args(words)


def build(options: argparse.Namespace, results: Results, until: float) -> None:
    """Build the plans of all components that are not in the results yet."""
    for model in options.only:
        for number in formats(model):
            if number not in options.formats:
                continue
            keys = "models", model, number
            row = results.get(*keys) or {}
            if "components" in row and not options.again:
                continue
            if time.monotonic() > until:
                return
            program = make(model, number, options.work)
            refused = measure.refused(program, DEVICES)
            done = {} if options.again else dict(row.get("done", {}))
            for name, gm in program.components.items():
                if name not in done:
                    if time.monotonic() > until:
                        return
                    report(f"{model}, {number}: {name}")
                    devices = [device for device in DEVICES if device not in refused]
                    done[name] = measure.component(name, gm, devices)
                    results.put(done, *keys, "done")
            results.put({"refused": refused, "components": done}, *keys)


def main(words: Sequence[str] | None = None) -> None:
    """Build what was asked for, and write the section of the document."""
    options = arguments(words)
    results = known(options)
    limit = options.minutes
    build(options, results, float("inf") if limit is None else time.monotonic() + 60 * limit)
    finish(options, results, section(results.read()))


if __name__ == "__main__":
    run("examples.targets", main)
