"""`diffopt optimize`: runs passes with their instruments, then builds for a target."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from diffopt.cli import output as show
from diffopt.cli.flags import OptimizeFlags
from diffopt.core import Instrument, Pipeline, Record, RunOptions
from diffopt.core.instruments import Dump, Estimate, PrintAfter, PrintChanged, bisect
from diffopt.engine import engine
from diffopt.errors import DiffoptError
from diffopt.ir.program import Program
from diffopt.lowering.target import Target, parse_target
from diffopt.spec import suggest


@dataclass(frozen=True)
class Job:
    """The flags, parsed before the program is traced, so that a typing error costs nothing.

    Attributes:
        pipeline: The passes.
        target: The target to build for; None for a .program.
        batch: The number of images of a traced call.
        compress: The level of zstandard for members that shrink; None: none.
    """

    pipeline: Pipeline
    target: Target | None
    batch: int
    compress: int | None

    @classmethod
    def parse(cls, flags: OptimizeFlags) -> Job:
        """Parse the passes, those that `--batch` and `--tokens` add, and the target."""
        count, batch = _parse_batch(flags.batch)
        if flags.tokens is not None and batch:
            raise DiffoptError(
                f"--tokens {flags.tokens} --batch {flags.batch}: requests of different lengths do"
                " not fit into one run; leave one of the two out"
            )
        lengths = "" if flags.tokens is None else f"lengths(max={flags.tokens})"
        passes = ",".join(filter(None, (flags.passes, lengths, batch)))
        target = parse_target(flags.target) if flags.output.suffix == ".engine" else None
        if flags.dtype == "fp16" and target is not None and target.hardware_kind() == "cpu":
            raise DiffoptError(
                f"--dtype fp16 --target {target}: CPUs compute float16 slowly; write --dtype bf16"
            )
        return cls(Pipeline.parse(passes), target, count, flags.compress)


def _parse_batch(text: str) -> tuple[int, str]:
    """Return the number of images of a call, and the pass that a range `N..M` adds."""
    match = re.fullmatch(r"([1-9]\d*)(?:\.\.([1-9]\d*))?", text)
    if not match or (match[2] and int(match[1]) > int(match[2])):
        raise DiffoptError(f"--batch {text}: wants a number such as 4, or a range such as 1..8")
    if not match[2]:
        return int(match[1]), ""
    return 1, f"batch(max={match[2]},min={match[1]})"


def _instruments(pipeline: Pipeline, flags: OptimizeFlags) -> list[Instrument]:
    """Return the instruments of the flags; they write to stderr."""

    def write(text: str) -> None:
        # Wrapped or coloured, the text could not be compared with another run's.
        show.stderr().print(text, markup=False, soft_wrap=True)

    instruments: list[Instrument] = [Estimate(write)]
    names = {step.name for step in pipeline.passes}
    printed = set(filter(None, flags.print_after.split(",")))
    for name in sorted(printed - names - {"all"}):
        raise DiffoptError(f"--print-after: no pass '{name}' is run{suggest(name, names)}")
    if printed:
        every = frozenset() if "all" in printed else frozenset(printed)
        instruments.append(PrintAfter(write, every))
    if flags.print_changed:
        instruments.append(PrintChanged(write))
    if flags.dump is not None:
        instruments.append(Dump(flags.dump))
    return instruments


def rewrite(
    pipeline: Pipeline, program: Program, flags: OptimizeFlags, prompts: Sequence[str]
) -> tuple[Program, list[Record]]:
    """Run the passes; return the new program and the records of these passes alone."""
    begin = len(program.history)
    instruments = _instruments(pipeline, flags)
    with show.progress("passes") as progress:
        result = pipeline.run(
            program,
            instruments=instruments,
            budget=flags.budget,
            verify=flags.verify_each,
            compare=flags.compare,
            reproducer=Path(),
            progress=progress,
            seed=flags.seed,
            prompts=prompts,
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
    pipeline: Pipeline, program: Program, flags: OptimizeFlags, prompts: Sequence[str]
) -> int:
    """Print the first pass after which the error exceeds `--bisect`; return 1 if there is one."""
    bound = flags.bisect
    assert bound is not None
    with show.progress("bisecting") as progress:
        options = RunOptions(progress=progress, seed=flags.seed, prompts=prompts)
        culprit, _ = bisect(pipeline, program, bound, **options)
    if flags.as_json:
        show.print_json({"bound": bound, "pass": None if culprit is None else asdict(culprit)})
    elif culprit is None:
        print(f"no pass brings the output further than {bound:g} from the captured program's")
    else:
        print(f"{culprit.text}: relative error {culprit.drift:.3g}, first above {bound:g}")
    return 0 if culprit is None else 1
