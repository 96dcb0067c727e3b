"""Chooses the units of a program that matter least.

What a unit matters is the sum of what the elements of its members matter (`importance`). Within a
group units are compared as they are; between groups they are divided by the group's mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from diffopt.errors import DiffoptError
from diffopt.pruning.coupling import Group, Unit

Scope = Literal["layer", "global"]

ROUNDED_FROM = 8
"""Groups that have fewer channels than this times `round_to` are not rounded: too much would go."""


def unit_scores(group: Group, importance: Mapping[int, Tensor]) -> Tensor:
    """Return what each unit of a group matters: the sum over all that it is made of."""
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


def least(
    groups: Sequence[Group],
    scores: Sequence[Tensor],
    ratios: Sequence[float | None],
    ratio: float,
    scope: Scope,
    round_to: int,
) -> list[list[Unit]]:
    """Return, of each group, the units to remove.

    Args:
        groups: What can go.
        scores: What each unit of them matters.
        ratios: The share to remove of groups that have one of their own; others: None.
        ratio: The share of all others.
        scope: Whether that is of each group, or of all of them together.
        round_to: What is left of a group is a multiple of this many channels, if it has enough.
    """
    shares = [ratio if own is None else own for own in ratios]
    if scope == "global":
        open_ = [i for i, own in enumerate(ratios) if own is None]
        found = _global([groups[i] for i in open_], [scores[i] for i in open_], ratio)
        for index, share in zip(open_, found, strict=True):
            shares[index] = share
    return [
        _least_of(group, score, share, round_to)
        for group, score, share in zip(groups, scores, shares, strict=True)
    ]


def _least_of(group: Group, scores: Tensor, share: float, round_to: int) -> list[Unit]:
    """Return the units of one group that matter least: about a share of its channels."""
    if share == 0:
        return []
    widths = [group.width(unit) for unit in group.units]
    total = sum(widths)
    stay = _stay(group, scores)
    order = [index for index in scores.argsort(stable=True).tolist() if index not in stay]
    left = [total]
    for index in order:
        left.append(left[-1] - widths[index])
    wanted = total * (1 - share)
    count = min(range(len(left)), key=lambda n: (abs(left[n] - wanted), n))
    whole = [n for n in range(len(left)) if left[n] % round_to == 0 and left[n]]
    if total >= ROUNDED_FROM * round_to and total % round_to == 0 and len(whole) > 1:
        count = min(whole, key=lambda n: (abs(left[n] - wanted), n))
    if not left[count]:
        raise DiffoptError(
            f"{group.name} would vanish: {share:g} of its {len(order)} {_noun(group)} is all of "
            "them; ask for less, or skip it"
        )
    return [group.units[index] for index in order[:count]]


def _stay(group: Group, scores: Tensor) -> set[int]:
    """Return the units that cannot go: of each part the one that matters most."""
    at = {unit.label: index for index, unit in enumerate(group.units)}
    return {
        max((at[label] for label in part), key=lambda i: (scores[i], i)) for part in group.parts
    }


def _global(groups: Sequence[Group], scores: Sequence[Tensor], ratio: float) -> list[float]:
    """Return the share of each group that goes where units of all compete; one always stays."""
    rows = []
    for number, (group, own) in enumerate(zip(groups, scores, strict=True)):
        relative = own / own.mean().clamp_min(torch.finfo(own.dtype).tiny)
        for score, unit in zip(relative.tolist(), group.units, strict=True):
            rows.append((score, number, group.width(unit)))
    budget = ratio * sum(width for *_, width in rows)
    gone = [0] * len(groups)
    units = [len(group.units) for group in groups]
    for _, number, width in sorted(rows):
        if units[number] > 1 and width <= budget + width / 2:
            budget -= width
            gone[number] += width
            units[number] -= 1
    totals = [sum(map(group.width, group.units)) for group in groups]
    return [lost / total for lost, total in zip(gone, totals, strict=True)]


def _noun(group: Group) -> str:
    return "heads" if group.kind == "heads" else "units"
