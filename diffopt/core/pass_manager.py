"""Pipelines of passes: parse them, run them, and check the program after each pass."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypedDict, Unpack

from diffopt import plugins, spec
from diffopt.core.equivalence import Snapshot, difference, enforce_bounds
from diffopt.core.pass_base import Context, Pass
from diffopt.core.record import Record, Size
from diffopt.errors import DiffoptError, ToleranceError, expect_type
from diffopt.ir import weight_origins
from diffopt.ir.nodes import weight_uses
from diffopt.ir.program import Program
from diffopt.progress import Progress, silent


class Instrument(Protocol):
    """Observe the passes of a pipeline; both methods must not change the program."""

    def before(self, step: Pass, program: Program) -> None:
        """Observe the program before `step` runs."""

    def after(self, step: Pass, program: Program, record: Record) -> None:
        """Observe the checked program after `step`."""


class RunOptions(TypedDict, total=False):
    """The options of `Pipeline.run`.

    Attributes:
        instruments: Called before and after every pass.
        budget: Largest relative error that one approximate pass may add.
        verify: Check the invariants of the IR after every pass; by default true.
        enforce: Raise when a pass adds more error than it may, which is the default; otherwise
            only record it.
        compare: Run the program before and after every pass to measure the error that it adds,
            which is the default. A large model may take hours for that where there is no GPU;
            without, no error is known, and none is enforced.
        reproducer: A folder for the program and the command that reproduce a crash.
        progress: Called with what is being done and the fraction done, if known.
        seed: Seed of all random numbers; by default 0.
        prompts: Prompts to calibrate with instead of the one seen at capture.
    """

    instruments: Sequence[Instrument]
    budget: float | None
    verify: bool
    enforce: bool
    compare: bool
    reproducer: Path | None
    progress: Progress | None
    seed: int
    prompts: Sequence[str]


@dataclass(frozen=True)
class Pipeline:
    """Passes that run one after the other, each on a clone of the program, and each checked."""

    passes: tuple[Pass, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Read pipeline text such as `unroll(steps=20),hoist,fuse`."""
        expect_type("passes", text, str, wanted="a text such as 'unroll,hoist'")
        return cls(tuple(_bind(call, text) for call in spec.parse(text)))

    def __post_init__(self) -> None:
        wanted = "a sequence of passes; Pipeline.parse reads a text"
        expect_type("passes", self.passes, tuple, list, wanted=wanted)
        for step in self.passes:
            expect_type("each of the passes", step, Pass, wanted="a pass")

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))

    def run(self, program: Program, **options: Unpack[RunOptions]) -> Program:
        """Return the rewritten program, and leave `program` unchanged; see `RunOptions`."""
        expect_type("program", program, Program, wanted="a Program, as diffopt.trace returns")
        if unknown := options.keys() - RunOptions.__annotations__.keys():
            raise TypeError(f"Pipeline.run() got an unexpected keyword argument '{min(unknown)}'")
        self._check_budgets(options)
        progress = options.get("progress") or silent
        instruments = options.get("instruments", ())
        program.expect_weights()
        program = program.clone()
        program.refresh()  # so that nodes dead before do not count as a change
        first = current = Snapshot(program, Size.of(program))
        reference: Program | None = None
        for number, step in enumerate(self.passes):
            progress(str(step), number / len(self.passes))
            for instrument in instruments:
                instrument.before(step, current.program)
            try:
                after, record = _apply(step, current, first, reference, options)
            except Exception as error:
                error.add_note(f"in pass {step.name} (number {number + 1} of {self})")
                is_expected = isinstance(error, DiffoptError)
                if not is_expected or isinstance(error, ToleranceError):
                    rest = Pipeline(self.passes[number:])
                    _add_reproducer(error, current.program, rest, options)
                raise
            for instrument in instruments:
                instrument.after(step, after.program, record)
            # A program with other steps of sampling is no approximation of the one before.
            is_same = after.program.retrace is current.program.retrace
            is_wanted = any(later.wants_reference for later in self.passes[number + 1 :])
            if reference is None and record.changed and not record.exact and is_same and is_wanted:
                reference = current.program
            current = after
            if not options.get("compare", True):
                first = after  # so that weights which no program has any more are freed
        return current.program

    def _check_budgets(self, options: RunOptions) -> None:
        budget = options.get("budget")
        _check_budget("the pipeline", budget)
        for step in self.passes:
            _check_budget(step.name, _budget(step, None))
        limited = [step for step in self.passes if _budget(step, budget) is not None]
        if limited and not options.get("compare", True):
            raise DiffoptError(
                f"{limited[0]} has a budget, and outputs are not compared: leave one of both out"
            )


def _budget(step: Pass, budget: float | None) -> float | None:
    """Return the largest relative error that a pass may add: its option `budget`, or `budget`."""
    limit: float | None = getattr(step, "budget", None)
    return budget if limit is None else limit


def _check_budget(name: str, limit: float | None, **where: Any) -> None:
    """Raise a `DiffoptError` for a negative or nan budget; `where` is its text and span."""
    if limit is not None and not limit >= 0:
        raise DiffoptError(
            f"{name} has budget={limit:g}; write the largest relative error, as 0.02", **where
        )


def _apply(
    step: Pass, before: Snapshot, first: Snapshot, reference: Program | None, options: RunOptions
) -> tuple[Snapshot, Record]:
    """Run a pass on a clone and check it; return the program after it and the record."""
    if last := _last(before.program):
        raise DiffoptError(f"{step} cannot follow {last}, which has to be the last pass")
    ctx = Context(
        before.program.sample_inputs(),
        options.get("seed", 0),
        options.get("progress") or silent,
        options.get("prompts", ()),
        _budget(step, options.get("budget")),
        options.get("compare", True),
        reference,
    )
    program = before.program.clone()
    started = time.perf_counter()
    step.run(program, ctx)
    program.refresh()
    _close_weights(before.program, program, str(step))
    seconds = time.perf_counter() - started
    verify = options.get("verify", True)
    if verify:
        program.verify()
    after = Snapshot(program, Size.of(program))
    changed = after.fingerprint != before.fingerprint
    max_abs = relative = drift = None
    if options.get("compare", True):
        if changed and verify:
            after.verify_aliases(before)
        if not changed:
            after.share_outputs(before)
        max_abs, relative = difference(after.outputs(), before.outputs())
        drift = difference(after.outputs(), first.outputs())[1]
    tolerance = f"atol {step.atol:g}, rtol {step.rtol:g}: {step.tolerance_reason}"
    record = Record(
        text=str(step),
        changed=changed,
        exact=step.is_exact(),
        seconds=seconds,
        max_abs=max_abs,
        relative=relative,
        drift=drift,
        skipped=ctx.skipped,
        notes=ctx.notes,
        before=before.size,
        after=after.size,
        tolerance=tolerance if step.is_exact() and step.tolerance_reason else "",
    )
    if options.get("enforce", True):
        enforce_bounds(step, record, before, ctx.budget)
    program.history.append(asdict(record))
    return after, record


def _close_weights(before: Program, after: Program, by: str) -> None:
    """Note of which of the pipeline's weights a pass has computed tensors, and did not say how.

    That is what the tensors' origins say. Of those without one nobody knows what they were made of:
    of weights which are used less often than before, if of any.
    """
    known, now = before.weights(), after.weights()
    closed = {
        n for t in now.values() for n in weight_origins.unknown_names(weight_origins.origin_of(t))
    }
    if any(i not in known and not weight_origins.is_recorded(t) for i, t in now.items()):
        uses = _uses(after)
        closed |= {name for name, count in _uses(before).items() if uses[name] < count}
    for name in sorted(closed):
        after.closed.setdefault(name, by)


def _uses(program: Program) -> Counter[str]:
    """Return how often each of the pipeline's weights is used, itself or what was made of it."""
    counts, stored = Counter[str](), program.weights()
    for identity, count in weight_uses(program).items():
        for name in weight_origins.every_name(weight_origins.origin_of(stored[identity])):
            counts[name] += count
    return counts


def _last(program: Program) -> str | None:
    """Return the pass that made sizes dynamic, if any: passes after it would read fixed sizes."""
    return "batch" if program.batch else "lengths" if program.lengths else None


def _add_reproducer(
    error: Exception, program: Program, rest: Pipeline, options: RunOptions
) -> None:
    """Save the program and the command that reproduce the error of the first pass of `rest`."""
    folder, prompts, seed = options.get("reproducer"), options.get("prompts"), options.get("seed")
    if folder is None:
        return
    stem = folder / f"reproduce-{rest.passes[0].name}"
    saved, script = stem.with_suffix(".program"), stem.with_suffix(".sh")
    texts = stem.with_suffix(".txt")
    flags = (f" --seed {seed}" if seed else "") + (f" --calibrate {texts}" if prompts else "")
    command = f"diffopt optimize {saved} --passes '{rest}'{flags} -o {stem}-out.program"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if prompts:
            texts.write_text("\n".join(prompts), encoding="utf-8")
        program.save(saved)
        script.write_text(f"{command}\n")
    except Exception as failure:  # the error of the pass is what the user has to see
        error.add_note(f"no reproducer could be written: {failure}")
    else:
        error.add_note(f"to see it again: {command}  (also in {script})")


def pass_names() -> list[str]:
    """Return the names of all passes, without importing any."""
    return sorted(_sources())


def find_pass(name: str) -> type[Pass]:
    """Return the pass called `name`."""
    cls: type[Pass] = plugins.find_class(name, _sources(), Pass, "pass")
    return cls


@cache
def _sources() -> dict[str, str]:
    """Return the "module:class" of each pass by name."""
    return plugins.sources("diffopt.passes", "passes")


def _bind(call: spec.Call, text: str) -> Pass:
    try:
        cls = find_pass(call.name)
    except DiffoptError as error:
        raise DiffoptError(error.message, text=text, span=call.span) from None
    step: Pass = spec.bind(call, cls, text)
    _check_budget(step.name, _budget(step, None), text=text, span=call.span)
    return step
