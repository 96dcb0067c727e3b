"""Chooses the share that each group of units loses, so that a part of the FLOPs is left.

Each group alone loses the units that matter least, in a few shares, and some calls of the
components run again on what they read in the whole program: what their results differ by is the
error of that share. Groups then lose units step by step, each time where that adds least squared
error for the FLOPs that it saves. How many steps it takes is found by counting FLOPs without all
that they remove: what is saved does not add up, since a layer between two groups costs what is left
of one times what is left of the other.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffopt.errors import DiffoptError
from diffopt.execution import trajectories
from diffopt.ir.program import Program
from diffopt.progress import Progress, silent
from diffopt.pruning import selection
from diffopt.pruning.ablation import Ablation
from diffopt.pruning.coupling import Group, Unit

SHARES = (0.125, 0.25, 0.375, 0.5, 0.75)
"""What is tried of each group."""


@dataclass(frozen=True, eq=False)
class Trial:
    """What a share of one group costs.

    Attributes:
        units: That share.
        error: Squared relative error of what calls return without it.
        saved: FLOPs that a run of the components does not need then.
    """

    units: list[Unit]
    error: float
    saved: int


@dataclass(frozen=True, eq=False)
class Found:
    """What was chosen.

    Attributes:
        groups: What there was to choose of.
        trials: Of each group.
        choice: The trial of each group; None: it stays whole.
        before: FLOPs of a run of the components.
        after: The same without what was chosen.
        measured: Squared relative error without all that was chosen.
    """

    groups: Sequence[Group]
    trials: list[list[Trial]]
    choice: list[int | None]
    before: int
    after: int
    measured: float

    @property
    def units(self) -> list[list[Unit]]:
        """The units to remove of each group."""
        return [own.units if own else [] for own in self._chosen()]

    def _chosen(self) -> list[Trial | None]:
        pairs = zip(self.trials, self.choice, strict=True)
        return [None if at is None else own[at] for own, at in pairs]

    def notes(self) -> dict[str, Any]:
        """Return what is worth knowing: of all, of each group, and of all that was tried."""
        chosen = self._chosen()
        predicted = sum(own.error for own in chosen if own)
        whole = Trial([], 0.0, 0)
        pairs = zip(self.groups, chosen, strict=True)
        return {
            "auto": {
                "flops": {"before": self.before, "after": self.after},
                "predicted error": predicted**0.5,
                "measured error": self.measured**0.5,
            },
            "groups": [self._row(group, own or whole) for group, own in pairs],
            "sensitivity": [
                self._row(group, own)
                for group, tried in zip(self.groups, self.trials, strict=True)
                for own in tried
            ],
        }

    def _row(self, group: Group, trial: Trial) -> dict[str, Any]:
        return {
            "group": group.name,
            "kind": group.kind,
            "units": len(group.units),
            "removed": len(trial.units),
            "flops saved": trial.saved / max(1, self.before),
            "error": trial.error**0.5,
        }


def choose(
    bench: Ablation,
    groups: Sequence[Group],
    scores: Sequence[Tensor],
    part: float,
    most: float,
    round_to: int,
    progress: Progress = silent,
) -> Found:
    """Return what each group loses, so that at most a part of the FLOPs is left.

    Args:
        bench: Measures what components cost and return without units.
        groups: What can go.
        scores: What each unit of them matters: those go first that matter least.
        part: Of the FLOPs of a run of the bench's components.
        most: The largest share that one group may lose.
        round_to: See `pruning.least`.
        progress: Called with what is being done and the fraction done.
    """
    tried = [own for own in SHARES if own <= most]
    trials = _trials(bench, groups, scores, tried, round_to, progress)
    order = ladder(trials)
    before = bench.cost(bench.program)

    def chosen(count: int) -> list[int | None]:
        made: list[int | None] = [None] * len(groups)
        for number, at in order[:count]:
            made[number] = at
        return made

    def without(count: int) -> Program:
        pairs = zip(trials, chosen(count), strict=True)
        return bench.without([u for own, at in pairs if at is not None for u in own[at].units])

    least = bench.cost(without(len(order)))
    if least > part * before:
        raise DiffoptError(
            f"flops={part:g} cannot be reached in {', '.join(bench.components)}: with up to"
            f" {tried[-1]:g} of each group gone, {math.ceil(100 * least / before) / 100:g} of"
            " their FLOPs are left; ask for that or more"
        )
    # Each step removes more, so a number of steps is enough where a smaller one is.
    count = bisect.bisect_left(
        range(len(order)), True, key=lambda n: bench.cost(without(n)) <= part * before
    )
    smaller = without(count)
    after, error = bench.cost(smaller), bench.error(smaller)
    return Found(groups, trials, chosen(count), before, after, error)


def _trials(
    bench: Ablation,
    groups: Sequence[Group],
    scores: Sequence[Tensor],
    shares: Sequence[float],
    round_to: int,
    progress: Progress,
) -> list[list[Trial]]:
    """Return what each share of each group costs, by itself."""
    pairs = zip(groups, scores, strict=True)
    tried = [_shares(group, own, shares, round_to) for group, own in pairs]
    flat = [units for own in tried for units in own]

    def measure() -> dict[str, Tensor]:
        rows, before = [], bench.cost(bench.program)
        for done, units in enumerate(flat):
            progress(f"trying shares, {done + 1} of {len(flat)}", done / len(flat))
            smaller = bench.without(units)
            rows.append((bench.error(smaller), before - bench.cost(smaller)))
        return {"trials": torch.tensor(rows, dtype=torch.float64).reshape(-1, 2)}

    key = {**bench.key(), "units": [[unit.label for unit in units] for units in flat]}
    rows = iter(trajectories.cached(key, measure)["trials"].tolist())
    made = []
    for own in tried:
        found = [(units, next(rows)) for units in own]
        made.append([Trial(units, error, int(saved)) for units, (error, saved) in found])
    return made


def _shares(
    group: Group, scores: Tensor, shares: Sequence[float], round_to: int
) -> list[list[Unit]]:
    """Return the units of a group that go in each share; none twice."""
    found: list[list[Unit]] = []
    for share in shares:
        try:
            (units,) = selection.least([group], [scores], [share], share, "layer", round_to)
        except DiffoptError:  # of a few units of unequal width nothing would be left
            break
        if len(units) > (len(found[-1]) if found else 0):
            found.append(units)
    return found


def ladder(trials: Sequence[Sequence[Trial]]) -> list[tuple[int, int]]:
    """Return steps of single groups, as group and trial, those first that cost least.

    What a step costs is the error that it adds for each FLOP that it saves. In a group these are
    the edges of the lower convex hull of its trials, so that each costs as much as the one before
    or more.
    """
    steps = []
    for number, tried in enumerate(trials):
        error, saved = 0.0, 0
        while True:
            slopes = [
                ((own.error - error) / (own.saved - saved), own.saved, at)
                for at, own in enumerate(tried)
                if own.saved > saved and math.isfinite(own.error)
            ]
            if not slopes:
                break
            slope, _, at = min(slopes)
            steps.append((slope, number, at))
            error, saved = tried[at].error, tried[at].saved
    return [(number, at) for _, number, at in sorted(steps, key=lambda step: step[0])]
