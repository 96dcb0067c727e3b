"""Passes, and pipelines of them that are checked with numbers after every step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from diffopt import plugins, spec
from diffopt.core.equivalence import State, difference, enforce_bounds
from diffopt.core.pass_base import Context, Pass
from diffopt.core.record import Record, Size
from diffopt.errors import DiffoptError, ToleranceError
from diffopt.ir.program import Program
from diffopt.progress import Progress, silent


class Instrument(Protocol):
    """Watch a pipeline at work; both methods may read the program and must not change it."""

    def before(self, step: Pass, program: Program) -> None:
        """Look at the program that `step` is about to get."""

    def after(self, step: Pass, program: Program, record: Record) -> None:
        """Look at the checked program that `step` made."""


@dataclass(frozen=True)
class Pipeline:
    """Run passes one after the other, each on a clone and each checked."""

    passes: tuple[Pass, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Read pipeline text such as `unroll(steps=20),hoist,fuse`."""
        return cls(tuple(_bind(call, text) for call in spec.parse(text)))

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))

    def run(
        self,
        program: Program,
        *,
        instruments: Sequence[Instrument] = (),
        budget: float | None = None,
        verify: bool = True,
        enforce: bool = True,
        compare: bool = True,
        reproducer: Path | None = None,
        progress: Progress = silent,
        seed: int = 0,
        prompts: Sequence[str] = (),
    ) -> Program:
        """Return the rewritten program; `program` itself is never changed.

        Args:
            program: Where to begin.
            instruments: Watchers, called before and after every pass.
            budget: Largest relative error that one approximate pass may add.
            verify: Check the invariants of the IR after every pass.
            enforce: Raise when a pass adds more error than it may; otherwise only record it.
            compare: Run the program before and after every pass, to know what error it adds. A
                large model may take hours for that where there is no GPU: without, no error is
                known, and none is enforced.
            reproducer: A folder for the program and the command that show a crash again.
            progress: Called with what is being done and the fraction done, if known.
            seed: Seed of everything random that the passes do.
            prompts: What passes that measure values calibrate with.
        """
        _check_budget("the pipeline", budget)
        for step in self.passes:
            _check_budget(step.name, _budget(step, None))
        limited = [step for step in self.passes if _budget(step, budget) is not None]
        if limited and not compare:
            raise DiffoptError(
                f"{limited[0]} has a budget, and outputs are not compared: leave one of both out"
            )
        program = program.clone()
        program.refresh()  # so that what was dead before does not count as a change
        first = current = State(program, Size.of(program))
        reference: Program | None = None
        for number, step in enumerate(self.passes):
            progress(str(step), number / len(self.passes))
            for instrument in instruments:
                instrument.before(step, current.program)
            try:
                if last := _last(current.program):
                    raise DiffoptError(
                        f"{step} cannot follow {last}, which has to be the last pass"
                    )
                ctx = Context(
                    current.program.sample_inputs(),
                    seed,
                    progress,
                    prompts,
                    _budget(step, budget),
                    reference,
                )
                after, record = _apply(step, current, first, ctx, verify, compare)
                if enforce:
                    enforce_bounds(step, record, current, ctx.budget)
            except Exception as error:
                error.add_note(f"in pass {step.name} (number {number + 1} of {self})")
                known = isinstance(error, DiffoptError) and not isinstance(error, ToleranceError)
                if reproducer and not known:
                    rest = Pipeline(self.passes[number:])
                    error.add_note(
                        _write_reproducer(reproducer, current.program, rest, seed, prompts)
                    )
                raise
            for instrument in instruments:
                instrument.after(step, after.program, record)
            # What was sampled again is another program, not an approximation of the one before.
            is_same = after.program.retrace is current.program.retrace
            if reference is None and record.changed and not record.exact and is_same:
                reference = current.program
            current = after
        return current.program


def _budget(step: Pass, budget: float | None) -> float | None:
    """Return the largest relative error that a pass may add: its own limit, or that of all."""
    own: float | None = getattr(step, "budget", None)
    return budget if own is None else own


def _check_budget(name: str, limit: float | None, **where: Any) -> None:
    """Stop if no error can be within a budget; `where` is what an error says of the text."""
    if limit is not None and not limit >= 0:
        raise DiffoptError(
            f"{name} has budget={limit:g}; write the largest relative error, as 0.02", **where
        )


def _apply(
    step: Pass, before: State, first: State, ctx: Context, verify: bool, compare: bool
) -> tuple[State, Record]:
    program = before.program.clone()
    started = time.perf_counter()
    step.run(program, ctx)
    program.refresh()
    seconds = time.perf_counter() - started
    if verify:
        program.verify()
    after = State(program, Size.of(program))
    changed = after.fingerprint != before.fingerprint
    max_abs = relative = drift = None
    if compare:
        if changed and verify:
            after.verify_aliases(before)
        if not changed:
            after.same_as(before)
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
    program.history.append(asdict(record))
    return after, record


def _last(program: Program) -> str | None:
    """Return the pass that has left sizes open, if one has: others read sizes as they are."""
    return "batch" if program.batch else "lengths" if program.lengths else None


def _write_reproducer(
    folder: Path, program: Program, rest: Pipeline, seed: int, prompts: Sequence[str]
) -> str:
    """Save what shows the failure of the first pass of `rest` again; return how to run it."""
    stem = folder / f"reproduce-{rest.passes[0].name}"
    saved, script = stem.with_suffix(".program"), stem.with_suffix(".sh")
    texts = stem.with_suffix(".txt")
    more = (f" --seed {seed}" if seed else "") + (f" --calibrate {texts}" if prompts else "")
    command = f"diffopt optimize {saved} --passes '{rest}'{more} -o {stem}-out.program"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if prompts:
            texts.write_text("\n".join(prompts), encoding="utf-8")
        program.save(saved)
        script.write_text(f"{command}\n")
    except Exception as error:  # the failure of the pass is what the user has to see
        return f"no reproducer could be written: {error}"
    return f"to see it again: {command}  (also in {script})"


def pass_names() -> list[str]:
    """Return the names of all passes, without importing any."""
    return sorted(_sources())


def find_pass(name: str) -> type[Pass]:
    """Return the pass called `name`."""
    found: type[Pass] = plugins.find(name, _sources(), Pass, "pass")
    return found


@cache
def _sources() -> dict[str, str]:
    """Map the name of each pass to where it is, as "module:class"."""
    return plugins.sources("diffopt.passes", "passes")


def _bind(call: spec.Call, text: str) -> Pass:
    try:
        cls = find_pass(call.name)
    except DiffoptError as error:
        raise DiffoptError(error.message, text=text, span=call.span) from None
    step: Pass = spec.bind(call, cls, text)
    _check_budget(step.name, _budget(step, None), text=text, span=call.span)
    return step
