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
from pathlib import Path

from diffopt.storage import disk_cache
from examples.benchmarks import report
from examples.study.command import finish, known, run
from examples.study.results import Results
from examples.targets import measure
from examples.targets.document import DEVICES, DOCUMENT, section
from examples.targets.programs import FORMATS, MODELS, formats, make


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    about = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m examples.targets", description=about)
    parser.add_argument("--only", choices=MODELS, nargs="+", default=[*MODELS])
    parser.add_argument("--formats", choices=FORMATS, nargs="+", default=[*FORMATS])
    parser.add_argument("--minutes", type=float, help="start nothing later than this")
    parser.add_argument("--again", action="store_true", help="build what is known once more")
    parser.add_argument("--work", type=Path, default=disk_cache.folder() / "targets")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    return parser.parse_args(words)


def build(options: argparse.Namespace, results: Results, until: float) -> None:
    """Build the plans of all components that are not in the results yet."""
    for model in options.only:
        for number in formats(model):
            if number not in options.formats:
                continue
            at = "models", model, number
            known = results.get(*at) or {}
            if "components" in known and not options.again:
                continue  # all of them are there
            if time.monotonic() > until:
                return
            program = make(model, number, options.work)
            refused = measure.refused(program, DEVICES)
            done = {} if options.again else dict(known.get("done", {}))
            for name, gm in program.components.items():
                if name not in done:
                    if time.monotonic() > until:
                        return
                    report(f"{model}, {number}: {name}")
                    devices = [device for device in DEVICES if device not in refused]
                    done[name] = measure.component(name, gm, devices)
                    results.put(done, *at, "done")
            results.put({"refused": refused, "components": done}, *at)


def main(words: Sequence[str] | None = None) -> None:
    """Build what was asked for, and write the section of the document."""
    options = arguments(words)
    results = known(options)
    limit = options.minutes
    build(options, results, float("inf") if limit is None else time.monotonic() + 60 * limit)
    finish(options, results, section(results.read()))


if __name__ == "__main__":
    run("examples.targets", main)
