"""The base class of passes, and the context that a pass runs in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from diffopt import spec
from diffopt.ir.program import Program
from diffopt.progress import Progress, silent

Needs = Literal["nothing", "one run", "calibration"]
"""What a pass computes beside weights: nothing, the program once, or calls of it that stand for
later ones."""


@dataclass(frozen=True)
class Pass:
    """Rewrite a program in place; subclass it in `passes/<name>.py`.

    A subclass is a frozen dataclass whose fields, declared with `option`, are its options. The
    pipeline runs it on a clone, checks the result, and detects what changed.

    Attributes:
        name: By default that of the module, in kebab-case.
        exact: Whether outputs stay equal, within `atol` and `rtol`.
        atol: Largest allowed absolute difference of an exact pass.
        rtol: The same, relative to the largest value of the outputs.
        tolerance_reason: Why these are not 0.
        wants_reference: Whether it reads `Context.reference`, which keeps weights in memory.
    """

    name: ClassVar[str] = "pass"
    exact: ClassVar[bool] = True
    atol: ClassVar[float] = 0.0
    rtol: ClassVar[float] = 0.0
    tolerance_reason: ClassVar[str] = ""
    wants_reference: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        if "name" not in cls.__dict__:
            cls.name = cls.__module__.rpartition(".")[2].replace("_", "-")
        if (cls.atol or cls.rtol) and not cls.tolerance_reason:
            raise TypeError(f"{cls.__name__} has a tolerance and no tolerance_reason")

    def is_exact(self) -> bool:
        """Tell whether the outputs must be equal before and after; may depend on the options."""
        return self.exact

    def needs(self) -> Needs:
        """Return what the pass computes beside weights, with its options."""
        return "nothing"

    def runs(self, program: Program) -> float:
        """Return in how many runs of `program` that is about; shown before it begins."""
        return 0.0 if self.needs() == "nothing" else float(getattr(self, "samples", 1))

    def run(self, program: Program, ctx: Context) -> None:
        """Rewrite `program` in place."""
        raise NotImplementedError

    def __str__(self) -> str:
        return spec.unparse(self.name, self)


@dataclass
class Context:
    """The settings that a pass runs with, and what it reports.

    Attributes:
        inputs: Flat inputs of the program to calibrate and measure on.
        seed: Seed of all random numbers.
        report: Called with what is being done and the fraction done, if known.
        prompts: To calibrate with, instead of the one seen at capture; see `calibration_inputs`.
        budget: Largest relative error that the pass may add; None: any.
        compare: Whether the program may be run only to see what the pass changes.
        reference: The program before the first approximate pass of the pipeline that changed it;
            None without one, and for passes that do not want it.
        skipped: Reasons for rewrites not done, as "where: reason".
        notes: Facts about this run, as JSON; shown with `--stats`.
    """

    inputs: Sequence[Tensor] = ()
    seed: int = 0
    report: Progress = silent
    prompts: Sequence[str] = ()
    budget: float | None = None
    compare: bool = True
    reference: Program | None = None
    skipped: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    def skip(self, where: fx.Node | str, reason: str) -> None:
        """Record why the rewrite was not done at `where`."""
        self.skipped.append(f"{where}: {reason}")

    def note(self, key: str, value: Any) -> None:
        """Record a fact about this run of the pass."""
        self.notes[key] = value

    def progress(self, what: str, fraction: float | None = None) -> None:
        """Tell the user what is being done and, if known, which fraction of it is done."""
        self.report(what, fraction)

    def generator(self) -> torch.Generator:
        """Return a random generator with the seed of the run."""
        return torch.Generator().manual_seed(self.seed)
