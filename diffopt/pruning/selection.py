"""Select the units of a program with the least importance.

A unit's importance is the sum of that of the elements of its members (`importance`). Within a group
units are compared as they are; between groups each is divided by its group's mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from diffopt.errors import DiffoptError
from diffopt.pruning.coupling import Group, Unit

RatioScope = Literal["layer", "global"]

ROUNDED_FROM = 8
"""Groups with fewer channels than this times `round_to` are not rounded."""


def unit_scores(group: Group, importance: Mapping[int, Tensor]) -> Tensor:
    """Return the importance of each unit of a group: the sum over its members, [units]."""
    scores = torch.zeros(len(group.units))
    for key, axis in group.units[0].members:
        if key not in importance:
            continue
        values = importance[key]
        rest = [a for a in range(values.dim()) if a != axis]
        along = values.float().sum(rest) if rest else values.float()
        for index, unit in enumerate(group.units):
            scores[index] += along[unit.members[key, axis]].sum()
    return scores


def select_units(
    groups: Sequence[Group],
    scores: Sequence[Tensor],
    ratios: Sequence[float | None],
    ratio: float,
    scope: RatioScope,
    round_to: int,
) -> list[list[Unit]]:
    """Return, of each group, the units to remove.

    Args:
        groups: The prunable groups.
        scores: The importance of each unit of them.
        ratios: The ratio of each group that has one of its own; else None.
        ratio: The ratio of all others.
        scope: Whether that is of each group, or of all of them together.
        round_to: Groups with enough channels keep a multiple of this many.

    Raises:
        DiffoptError: A ratio would remove a whole group.
    """
    removed = [ratio if local is None else local for local in ratios]
    if scope == "global":
        competing = [i for i, local in enumerate(ratios) if local is None]
        pairs = [groups[i] for i in competing], [scores[i] for i in competing]
        for index, fraction in zip(competing, _global_ratios(*pairs, ratio), strict=True):
            removed[index] = fraction
    return [
        _select_from(group, score, fraction, round_to)
        for group, score, fraction in zip(groups, scores, removed, strict=True)
    ]


def _select_from(group: Group, scores: Tensor, ratio: float, round_to: int) -> list[Unit]:
    """Return the least important units of a group, with about `ratio` of its channels."""
    if ratio == 0:
        return []
    widths = [group.width(unit) for unit in group.units]
    total = sum(widths)
    kept = _kept_units(group, scores)
    order = [index for index in scores.argsort(stable=True).tolist() if index not in kept]
    left = [total]
    for index in order:
        left.append(left[-1] - widths[index])
    wanted = total * (1 - ratio)
    count = min(range(len(left)), key=lambda n: (abs(left[n] - wanted), n))
    whole = [n for n in range(len(left)) if left[n] % round_to == 0 and left[n]]
    if total >= ROUNDED_FROM * round_to and total % round_to == 0 and len(whole) > 1:
        count = min(whole, key=lambda n: (abs(left[n] - wanted), n))
    if not left[count]:
        raise DiffoptError(
            f"{group.name} would vanish: {ratio:g} of its {len(order)} {_noun(group)} is all of "
            "them; ask for less, or skip it"
        )
    return [group.units[index] for index in order[:count]]


def _kept_units(group: Group, scores: Tensor) -> set[int]:
    """Return the units that are always kept: the most important one of each part."""
    at = {unit.label: index for index, unit in enumerate(group.units)}
    return {
        max((at[label] for label in part), key=lambda i: (scores[i], i))
        for part in group.keep_one_of
    }


def _global_ratios(groups: Sequence[Group], scores: Sequence[Tensor], ratio: float) -> list[float]:
    """Return the ratio of each group where units of all compete; one unit of each is kept."""
    rows = []
    for number, (group, score) in enumerate(zip(groups, scores, strict=True)):
        relative = score / score.mean().clamp_min(torch.finfo(score.dtype).tiny)
        for value, unit in zip(relative.tolist(), group.units, strict=True):
            rows.append((value, number, group.width(unit)))
    budget = ratio * sum(width for *_, width in rows)
    removed = [0] * len(groups)
    units = [len(group.units) for group in groups]
    for _, number, width in sorted(rows):
        if units[number] > 1 and width <= budget + width / 2:
            budget -= width
            removed[number] += width
            units[number] -= 1
    totals = [sum(map(group.width, group.units)) for group in groups]
    return [width / total for width, total in zip(removed, totals, strict=True)]


def _noun(group: Group) -> str:
    return "heads" if group.kind == "heads" else "units"
