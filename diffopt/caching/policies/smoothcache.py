"""SmoothCache: reuse each kind of layer's outputs while their measured error is small.

Joseph Liu et al., SmoothCache: A Universal Inference Acceleration Technique for Diffusion
Transformers, 2024 (2411.10510).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from diffopt.analysis.denoiser_structure import DenoiserStructure
from diffopt.caching.apply_plan import Loop, Plan
from diffopt.caching.policy import (
    ATTENTION_AND_MLP,
    Needs,
    Policy,
    branch_values,
    hold,
    merge,
    option,
)
from diffopt.core import Context
from diffopt.errors import DiffoptError
from diffopt.execution import trajectories
from diffopt.execution.calibration_inputs import representative

Rows = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Smoothcache(Policy):
    """Take each kind of layer's outputs as far as their measured error stays small."""

    needs: ClassVar[Needs] = "branches"

    alpha: float = option(0.18, "largest relative error of a value that is taken")
    max_interval: int = option(3, "most steps in a row that take it (k)")
    calls: int = option(4, "calibration calls to measure errors on")
    errors: str = option(
        "", "JSON file of errors instead: for each kind of layer a row for each k = 1, 2, …"
    )

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.max_interval < 1 or self.calls < 1:
            raise DiffoptError("smoothcache wants alpha >= 0, max-interval >= 1 and calls >= 1")

    def runs(self) -> float:
        """Return a run for each call, unless errors are given."""
        return 0.0 if self.errors else float(self.calls)

    def plan(self, loop: Loop, structure: DenoiserStructure, ctx: Context) -> Plan:
        """Reuse the outputs of each kind of branch by its own schedule."""
        present = {branch.kind for branch in structure.branches}
        kinds = [kind for kind in ATTENTION_AND_MLP if kind in present]
        if self.errors:
            errors = read_errors(self.errors, kinds, loop.steps)
        else:
            errors = self._measure(loop, structure, kinds, ctx)
        schedules = {k: schedule(errors[k], self.alpha, self.max_interval) for k in kinds}
        return merge(
            hold(branch_values(structure, [kind]), computed, loop.steps)
            for kind, computed in schedules.items()
        )

    def _measure(
        self, loop: Loop, structure: DenoiserStructure, kinds: Sequence[str], ctx: Context
    ) -> Mapping[str, Rows]:
        groups = {kind: [value for value, _ in branch_values(structure, [kind])] for kind in kinds}
        inputs = representative(
            f"cache({self.name})", loop.program, ctx.prompts, self.calls, ctx.seed
        )
        tables = trajectories.step_errors(
            loop.program,
            loop.calls,
            groups,
            inputs,
            max_gap=self.max_interval,
            progress=ctx.progress,
        )
        reach = range(1, min(self.max_interval, loop.steps - 1) + 1)
        return {kind: [table[k:, k].tolist() for k in reach] for kind, table in tables.items()}


def schedule(rows: Rows, alpha: float, max_interval: int) -> list[int]:
    """Return the steps that compute; `rows[k - 1][i]` is the error of step i's value at i + k."""
    steps, computed, step = len(rows[0]) + 1 if rows else 1, list[int](), 0
    while step < steps:
        computed.append(step)
        small = [
            k
            for k, row in enumerate(rows[:max_interval], start=1)
            if step < len(row) and row[step] <= alpha
        ]
        step += max(small, default=0) + 1
    return sorted({*computed, steps - 1})


def read_errors(path: str, kinds: Sequence[str], steps: int) -> Mapping[str, Rows]:
    """Return the measured errors in a file, one table of rows for each kind of layer."""
    try:
        tables = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DiffoptError(f"errors={path} can't be read: {error}") from None
    for kind in kinds:
        if not _is_table(tables, kind, steps):
            raise DiffoptError(
                f"errors={path} wants for '{kind}' a list of rows of numbers, row k of at least "
                f"{steps} - k: the relative errors between steps i and i + k"
            )
    return {kind: [r[: steps - k] for k, r in enumerate(tables[kind], 1)] for kind in kinds}


def _is_table(tables: Any, kind: str, steps: int) -> bool:
    rows = tables.get(kind) if isinstance(tables, dict) else None
    if not rows or not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        return False
    numbers = all(isinstance(x, int | float) for row in rows for x in row)
    return numbers and all(len(row) >= steps - k for k, row in enumerate(rows, 1))
