"""`diffopt optimize`: passes with their instruments, then the target."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffopt.cli import output as show
from diffopt.core import Instrument, Pipeline, Record
from diffopt.core.instruments import Dump, PrintAfter, PrintChanged, bisect
from diffopt.engine import engine
from diffopt.errors import DiffoptError
from diffopt.ir.program import Program
from diffopt.lowering.target import Target, parse_target
from diffopt.spec import suggest


@dataclass(frozen=True)
class Job:
    """What to do to a program; made before it is traced, so that a typing error costs nothing."""

    pipeline: Pipeline
    target: Target | None
    compress: int | None

    @classmethod
    def parse(cls, passes: str, target: str | None, compress: int | None) -> Job:
        """Read the texts of the command line."""
        made = None if target is None else parse_target(target)
        return cls(Pipeline.parse(passes), made, compress)


def parse_batch(text: str) -> tuple[int, str]:
    """Return how many images a call makes, and the pass that `N..M` asks for, if it does."""
    found = re.fullmatch(r"([1-9]\d*)(?:\.\.([1-9]\d*))?", text)
    if not found or (found[2] and int(found[1]) > int(found[2])):
        raise DiffoptError(f"--batch {text}: wants a number such as 4, or a range such as 1..8")
    if not found[2]:
        return int(found[1]), ""
    return 1, f"batch(max={found[2]},min={found[1]})"


def parse_tokens(most: int | None, batch: str) -> str:
    """Return the pass that `--tokens` asks for, if it is given; `batch` is a range of `--batch`."""
    if most is not None and batch:
        raise DiffoptError(
            f"--tokens {most} --batch {batch}: requests of different lengths do not fit into one "
            "run; leave one of the two out"
        )
    return "" if most is None else f"lengths(max={most})"


def watchers(
    pipeline: Pipeline, print_after: str, print_changed: bool, dump: Path | None
) -> list[Instrument]:
    """Return the instruments that the options ask for; they write to stderr."""

    def write(text: str) -> None:
        # Wrapped or coloured, the text could not be compared with another run's.
        show.stderr().print(text, markup=False, soft_wrap=True)

    chosen: list[Instrument] = []
    names = {step.name for step in pipeline.passes}
    wanted = set(filter(None, print_after.split(",")))
    for name in sorted(wanted - names - {"all"}):
        raise DiffoptError(f"--print-after: no pass '{name}' is run{suggest(name, names)}")
    if wanted:
        chosen.append(PrintAfter(write, frozenset() if "all" in wanted else frozenset(wanted)))
    if print_changed:
        chosen.append(PrintChanged(write))
    if dump is not None:
        chosen.append(Dump(dump))
    return chosen


def rewrite(
    pipeline: Pipeline, program: Program, instruments: Sequence[Instrument], **options: Any
) -> tuple[Program, list[Record]]:
    """Run the passes; return the new program and the records of these passes alone."""
    begin = len(program.history)
    with show.progress("passes") as progress:
        result = pipeline.run(
            program, instruments=instruments, reproducer=Path(), progress=progress, **options
        )
    return result, [Record.from_json(row) for row in result.history[begin:]]


def write(job: Job, program: Program, output: Path) -> None:
    """Build the target's engine, or save the program where there is no target."""
    if job.target is None:
        program.save(output, job.compress)
        return
    with show.progress(f"building for {job.target}") as progress:
        engine.write(program, job.target, output, compress=job.compress, progress=progress)


def find_culprit(
    pipeline: Pipeline, program: Program, bound: float, as_json: bool, **options: Any
) -> int:
    """Print the first pass whose output is too far from the captured program's; 1 if any is."""
    with show.progress("bisecting") as progress:
        culprit, _ = bisect(pipeline, program, bound, progress=progress, **options)
    if as_json:
        show.print_json({"bound": bound, "pass": None if culprit is None else asdict(culprit)})
    elif culprit is None:
        print(f"no pass brings the output further than {bound:g} from the captured program's")
    else:
        print(f"{culprit.text}: relative error {culprit.drift:.3g}, first above {bound:g}")
    return 0 if culprit is None else 1
