"""Choose a pruning ratio for each group of units, such that a fraction of the FLOPs is left.

Each group alone is pruned in a few ratios, and some calls of the components run again on their
recorded arguments: the error of their results is the error of that ratio. Then groups are pruned
greedily, step by step, where that adds the least squared error for the FLOPs that it saves. The
number of steps is found by bisection, counting the FLOPs of the pruned program: savings do not add
up, since the FLOPs of a layer between two groups are a product of the channels left of both.
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

RATIOS = (0.125, 0.25, 0.375, 0.5, 0.75)
"""The ratios to try of each group."""


@dataclass(frozen=True, eq=False)
class RatioTrial:
    """A pruning ratio of one group.

    Attributes:
        units: The units to remove.
        error: Squared relative error of calls' results without them.
        saved: FLOPs saved in a run of the components.
    """

    units: list[Unit]
    error: float
    saved: int


@dataclass(frozen=True, eq=False)
class RatioChoice:
    """The result of a search.

    Attributes:
        groups: The prunable groups.
        trials: Of each group.
        choice: The index of each group's trial; None: it is not pruned.
        before: FLOPs of a run of the components.
        after: The same of the pruned components.
        measured: Squared relative error of the pruned components' results.
    """

    groups: Sequence[Group]
    trials: list[list[RatioTrial]]
    choice: list[int | None]
    before: int
    after: int
    measured: float

    @property
    def units(self) -> list[list[Unit]]:
        """The units to remove of each group."""
        return [trial.units if trial else [] for trial in self._chosen()]

    def _chosen(self) -> list[RatioTrial | None]:
        pairs = zip(self.trials, self.choice, strict=True)
        return [None if at is None else trial[at] for trial, at in pairs]

    def notes(self) -> dict[str, Any]:
        """Return the notes of the pass: totals, a row for each group, and one for each trial."""
        chosen = self._chosen()
        predicted = sum(trial.error for trial in chosen if trial)
        whole = RatioTrial([], 0.0, 0)
        pairs = zip(self.groups, chosen, strict=True)
        return {
            "auto": {
                "flops": {"before": self.before, "after": self.after},
                "predicted error": predicted**0.5,
                "measured error": self.measured**0.5,
            },
            "groups": [self._row(group, trial or whole) for group, trial in pairs],
            "sensitivity": [
                self._row(group, trial)
                for group, trials in zip(self.groups, self.trials, strict=True)
                for trial in trials
            ],
        }

    def _row(self, group: Group, trial: RatioTrial) -> dict[str, Any]:
        return {
            "group": group.name,
            "kind": group.kind,
            "units": len(group.units),
            "removed": len(trial.units),
            "flops saved": trial.saved / max(1, self.before),
            "error": trial.error**0.5,
        }


def search_ratios(
    ablation: Ablation,
    groups: Sequence[Group],
    scores: Sequence[Tensor],
    flops: float,
    max_ratio: float,
    round_to: int,
    progress: Progress = silent,
) -> RatioChoice:
    """Return the trial of each group, such that at most a fraction of the FLOPs is left.

    Args:
        ablation: Measures components without some units.
        groups: The prunable groups.
        scores: The importance of each unit of them.
        flops: The fraction of the FLOPs of a run of the components.
        max_ratio: The largest ratio of a group.
        round_to: See `select_units`.
        progress: Called with what is being done and the fraction done.
    """
    ratios = [ratio for ratio in RATIOS if ratio <= max_ratio]
    trials = _measure_trials(ablation, groups, scores, ratios, round_to, progress)
    order = hull_steps(trials)
    before = ablation.cost(ablation.program)

    def chosen(count: int) -> list[int | None]:
        choice: list[int | None] = [None] * len(groups)
        for number, at in order[:count]:
            choice[number] = at
        return choice

    def without(count: int) -> Program:
        pairs = zip(trials, chosen(count), strict=True)
        return ablation.without(
            [u for tried, at in pairs if at is not None for u in tried[at].units]
        )

    least = ablation.cost(without(len(order)))
    if least > flops * before:
        raise DiffoptError(
            f"flops={flops:g} cannot be reached in {', '.join(ablation.components)}: with up to"
            f" {ratios[-1]:g} of each group gone, {math.ceil(100 * least / before) / 100:g} of"
            " their FLOPs are left; ask for that or more"
        )
    # Each step removes more, so the FLOPs fall monotonically: bisect.
    count = bisect.bisect_left(
        range(len(order)), True, key=lambda n: ablation.cost(without(n)) <= flops * before
    )
    smaller = without(count)
    after, error = ablation.cost(smaller), ablation.error(smaller)
    return RatioChoice(groups, trials, chosen(count), before, after, error)


def _measure_trials(
    ablation: Ablation,
    groups: Sequence[Group],
    scores: Sequence[Tensor],
    ratios: Sequence[float],
    round_to: int,
    progress: Progress,
) -> list[list[RatioTrial]]:
    """Measure each ratio of each group alone."""
    pairs = zip(groups, scores, strict=True)
    tried = [_units_by_ratio(group, selections, ratios, round_to) for group, selections in pairs]
    flat = [units for selections in tried for units in selections]

    def measure() -> dict[str, Tensor]:
        rows, before = [], ablation.cost(ablation.program)
        for index, units in enumerate(flat):
            progress(f"trying shares, {index + 1} of {len(flat)}", index / len(flat))
            smaller = ablation.without(units)
            rows.append((ablation.error(smaller), before - ablation.cost(smaller)))
        return {"trials": torch.tensor(rows, dtype=torch.float64).reshape(-1, 2)}

    key = {**ablation.key(), "units": [[unit.label for unit in units] for units in flat]}
    rows = iter(trajectories.cached(key, measure)["trials"].tolist())
    trials = []
    for selections in tried:
        measured = [(units, next(rows)) for units in selections]
        trials.append([RatioTrial(units, error, int(saved)) for units, (error, saved) in measured])
    return trials


def _units_by_ratio(
    group: Group, scores: Tensor, ratios: Sequence[float], round_to: int
) -> list[list[Unit]]:
    """Return the distinct selections of units of a group, by increasing ratio."""
    selected: list[list[Unit]] = []
    for ratio in ratios:
        try:
            (units,) = selection.select_units([group], [scores], [ratio], ratio, "layer", round_to)
        except DiffoptError:  # the ratio would remove the whole group
            break
        if len(units) > (len(selected[-1]) if selected else 0):
            selected.append(units)
    return selected


def hull_steps(trials: Sequence[Sequence[RatioTrial]]) -> list[tuple[int, int]]:
    """Return greedy steps as (group, trial), in the order of added error per saved FLOP.

    In each group they are the edges of the lower convex hull of (saved, error) of its trials, so
    that slopes increase and a group's steps remain in order.
    """
    steps = []
    for number, tried in enumerate(trials):
        error, saved = 0.0, 0
        while True:
            slopes = [
                ((trial.error - error) / (trial.saved - saved), trial.saved, at)
                for at, trial in enumerate(tried)
                if trial.saved > saved and math.isfinite(trial.error)
            ]
            if not slopes:
                break
            slope, _, at = min(slopes)
            steps.append((slope, number, at))
            error, saved = tried[at].error, tried[at].saved
    return [(number, at) for _, number, at in sorted(steps, key=lambda step: step[0])]
