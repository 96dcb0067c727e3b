"""Draws conclusions from the measurements, in sentences."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from diffopt.pruning.importance import METHODS
from examples.pruning.configurations import (
    AUTO,
    BY_IMPORTANCE,
    COMPOSED,
    GOAL,
    LONG,
    LOW_RANK,
    PARTS,
    PEERS,
    UNIFORM,
    recovered,
    recovered_longer,
    untrained,
)
from examples.study.document import number
from examples.study.rows import Rows, ahead, distance, has_quality, median, verdict
from examples.study.study import REFERENCE

KID_SLACK = 1.1
PROMISE = 0.8  # the part of the FLOPs' reduction that the time has to be reduced by
SLACK = 0.98  # a rival may have this part of the FLOPs


def share(rows: Rows, config: str, key: str = "flops") -> float:
    """Return the ratio of a configuration's FLOPs, or another cost, to the reference's."""
    return float(rows[config]["cost"][key] / rows[REFERENCE]["cost"][key])


def kept_promise(rows: Rows, config: str) -> float | None:
    """Return the reduction of the time over that of the FLOPs, None if it is not known."""
    timed = untrained(config)
    if "time" not in rows.get(timed, {}):
        return None
    return _kept(median(rows, timed) / median(rows, timed, REFERENCE), share(rows, config))


def _kept(time: float, flops: float) -> float | None:
    """Return the reduction of the time over that of the FLOPs, given what remains of both."""
    return (1 - time) / (1 - flops) if flops < 1 else None


def large_share(times: Rows, key: str) -> float:
    """Return the ratio of an engine's FLOPs to those of the model's first engine."""
    return float(times[key]["flops"] / times[next(iter(times))]["flops"])


def kept_promise_of(times: Rows, key: str) -> float | None:
    """Return the reduction of an engine's time over that of its FLOPs."""
    pruned, whole = (statistics.median(times[k]["seconds"]) for k in (key, next(iter(times))))
    return _kept(pruned / whole, large_share(times, key))


def large_goals(data: Mapping[str, Any]) -> list[str]:
    """Return how the times of larger models meet the goals."""
    lines = []
    for title, model in data.items():
        times = model.get("times", {})
        kept = {key: part for key in times if (part := kept_promise_of(times, key)) is not None}
        lines += [
            f"- {verdict(part >= PROMISE)}: {title}, `{key.partition(' on ')[0]}`:"
            f" {large_share(times, key):.0%} of the FLOPs, {part:.0%} of what that promises."
            for key, part in kept.items()
        ]
    return lines


def rival(rows: Rows, config: str) -> str | None:
    """Return the fewest steps of the whole model that cost at least what a configuration does."""
    flops = share(rows, config)
    known = [c for c in rows if c.startswith("unroll(") and has_quality(rows, c)]
    enough = [c for c in known if share(rows, c) >= SLACK * flops]
    return min(enough, key=lambda c: share(rows, c), default=None)


# Goals


def goals(rows: Rows) -> list[str]:
    """Return how a model meets the goals."""
    lines = [*_kid(rows), *_time(rows), *_ahead(rows)]
    return [f"- {line}" for line in lines]


def _kid(rows: Rows) -> list[str]:
    lines = []
    wanted = map(recovered, BY_IMPORTANCE[GOAL].values())
    for config in (*wanted, *map(recovered_longer, LONG)):
        if not has_quality(rows, config, REFERENCE):
            continue
        kid, floor = (rows[c]["quality"].get("kid held-out") for c in (config, REFERENCE))
        if kid is None:
            continue
        limit = KID_SLACK * floor[0]
        gain = rows[config]["quality"].get("kid above reference")
        paired = (
            f" Over the same subsets of seeds it is {number(gain, 1000, 2)} above, which is"
            f" {(limit - floor[0] - gain[0]) / gain[1]:+.1f} standard errors within that."
            if gain
            else ""
        )
        lines.append(
            f"{verdict(kid[0] <= limit)}: KID to held-out images of `{config}`"
            f" is {number(kid, 1000, 2)}, the reference's {number(floor, 1000, 2)}; asked is at"
            f" most {KID_SLACK - 1:.0%} more, {limit * 1000:.2f}.{paired}"
        )
    return lines


def _time(rows: Rows) -> list[str]:
    wanted = [*(by_method["magnitude"] for by_method in BY_IMPORTANCE.values()), AUTO, UNIFORM]
    kept = {c: p for c in wanted if c in rows and (p := kept_promise(rows, c)) is not None}
    return [
        f"{verdict(part >= PROMISE)}: `{config}` leaves {share(rows, config):.0%} of the FLOPs and"
        f" {median(rows, config) / median(rows, config, REFERENCE):.0%} of the time, {part:.0%} of"
        f" what that promises; asked is {PROMISE:.0%}."
        for config, part in kept.items()
    ]


def _ahead(rows: Rows) -> list[str]:
    pairs = [
        ("Diff-Pruning's importance is ahead of magnitude", by["diff-pruning"], by["magnitude"])
        for by in BY_IMPORTANCE.values()
    ]
    pairs.append(("`auto` is ahead of a uniform share", AUTO, UNIFORM))
    lines = []
    for what, having, lacking in pairs:
        for state, change in (("before training", str), ("trained", recovered)):
            one, two = change(having), change(lacking)
            if has_quality(rows, one, two):
                ratio, errors = ahead(rows, one, two)
                lines.append(
                    f"{verdict(errors >= 2)}: {what} ({_short(having)}, {state}): the distance is"
                    f" {ratio:.2f} times the other's, {errors:+.1f} standard errors ahead."
                )
    return lines


def _short(config: str) -> str:
    return config.partition("(")[2].partition(",importance")[0].rstrip(")").replace(",", ", ")


# Tables


def importances(rows: Rows) -> list[str]:
    """Return the table of importances next to magnitude."""
    lines = []
    for ratio, by_method in BY_IMPORTANCE.items():
        for method in METHODS:
            cells = [
                _next_to(rows, change(by_method[method]), change(by_method["magnitude"]))
                for change in (str, recovered)
            ]
            if method != "magnitude" and any(cells):
                lines.append(f"| {method}, {ratio:.0%} | {' | '.join(c or '-' for c in cells)} |")
    if not lines:
        return []
    return [
        "Distance next to `importance=magnitude`'s at the same ratio; in parentheses, how many"
        " standard errors it is ahead, over pairs of images of the same seed:",
        "",
        "| importance | before training | trained |",
        "| --- | ---: | ---: |",
        *lines,
    ]


def _next_to(rows: Rows, config: str, other: str) -> str:
    if not has_quality(rows, config, other):
        return ""
    ratio, errors = ahead(rows, config, other)
    return f"{ratio:.2f} ({errors:+.1f})"


def rivals(rows: Rows, model: str) -> list[str]:
    """Return the table of what was trained next to fewer steps of the whole model."""
    ours, theirs = PEERS[model]
    smalls = dict.fromkeys([AUTO, UNIFORM, *BY_IMPORTANCE[GOAL].values(), LOW_RANK, *ours, theirs])
    lines = []
    for config in (*map(recovered, smalls), *map(recovered_longer, LONG)):
        other = rival(rows, config) if has_quality(rows, config) else None
        if other is None:
            continue
        qualities = [rows[c]["quality"] for c in (config, other)]
        more = share(rows, other) / share(rows, config)
        cells = [
            f"`{config}`",
            f"`{other}`",
            f"{more:.2f}",
            *(number(row["distance"], 1, 4) for row in qualities),
            *(number(row.get("kid held-out"), 1000, 2) for row in qualities),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if not lines:
        return []
    return [
        "Next to the fewest steps of the whole model that cost as much:",
        "",
        "| trained | fewer steps | of its FLOPs | distance | theirs | KID | theirs |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        *lines,
    ]


def composed(rows: Rows) -> list[str]:
    """Compare pruning, caching and quantization together with each alone."""
    if not has_quality(rows, COMPOSED, *PARTS):
        return []
    distances = [distance(rows[part])[0] for part in PARTS]
    names = ", ".join(f"`{part}` {d:.4f}" for part, d in zip(PARTS, distances, strict=True))
    speed = ""
    if "time" in rows[COMPOSED]:
        parts = [COMPOSED, *PARTS]
        timed = [untrained(c) for c in parts]
        ratios = [
            f"{median(rows, c, REFERENCE) / median(rows, c):.2f}×" if "time" in rows[c] else "-"
            for c in timed
        ]
        speed = (
            f" Speed next to the reference: together {ratios[0]}, alone {', '.join(ratios[1:])}."
        )
    return [
        f"Together, `{COMPOSED}`: distance {number(rows[COMPOSED]['quality']['distance'], 1, 4)};"
        f" alone {names}: their sum is {sum(distances):.4f}, the root of the sum of their squares"
        f" {math.hypot(*distances):.4f}.{speed}"
    ]


def grouped(groups: list[dict[str, Any]]) -> list[str]:
    """Compare the groups of torch-pruning with ours."""
    wider = [row for row in groups if row["only ours"]]
    rest = [row for row in groups if not row["only ours"]]
    same = [row for row in rest if row["ours"] and not row["only theirs"]]
    tables = [row for row in rest if row not in same]
    lines = [
        f"Of its {len(groups)} groups {len(same)} are the same weights and axes as ours."
        + (
            f" {len(tables)} have the timestep's layers besides, or alone: `unroll` has computed"
            " these into a table."
            if tables
            else ""
        )
    ]
    if wider:
        names = ", ".join(f"`{row['layer']}`" for row in wider)
        lines.append(
            f"{len(wider)} go together with more here ({names}): a group norm behind a"
            " concatenation has groups with channels of both sides, and whole groups go."
        )
    return lines


def peer(rows: Rows, ours: Sequence[str], theirs: str) -> list[str]:
    """Compare the distances of both from the reference, before and after the same training."""
    lines = []
    for config in ours:
        ratios = []
        for state, change in (("before training", str), ("after it", recovered)):
            one, two = change(config), change(theirs)
            if has_quality(rows, one, two):
                ratio, errors = ahead(rows, one, two)
                said = f"{ratio:.2f} times its distance {state} ({errors:+.1f} standard errors"
                ratios.append(f"{said} ahead)")
        if ratios:
            lines.append(
                f"`{config}`, with {share(rows, config):.2f} of the FLOPs, has"
                f" {' and '.join(ratios)}; `{theirs}` leaves {share(rows, theirs):.2f}."
            )
    return lines
