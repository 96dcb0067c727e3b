"""Draws conclusions from the measurements, in sentences."""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from examples.quantization.configurations import (
    BF16,
    FEWER,
    FOUR_BITS,
    INT4,
    INT8,
    PAIRS,
    SUMS,
    fewer,
)
from examples.quantization.peers import THEIRS
from examples.study.document import number
from examples.study.rows import Rows, ahead, distance, has_quality, median, verdict
from examples.study.study import REFERENCE

KID_SLACK = 1.05
SPEEDUP = 1.25
FOUR_BITS_RATIO = 2
SIZE_GOAL = 0.3  # of the weights' size in fp16, at 4 bits


# Ablations


def ablations(rows: Rows) -> list[str]:
    """Return the table of configurations that differ in one thing."""
    pairs = [pair for pair in PAIRS if has_quality(rows, pair.having, pair.lacking)]
    if not pairs:
        return []
    base = distance(rows[INT8])[0] if has_quality(rows, INT8) else math.nan
    lines = [
        "What one thing does to the distance; the difference is the mean over images of the same"
        " seed, in its standard errors, positive where the thing helps:",
        "",
        "| thing | with | without | ratio | difference | with, next to W8A8 |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for pair in pairs:
        ratio, difference = ahead(rows, pair.having, pair.lacking)
        cells = [number(rows[c]["quality"]["distance"], 1, 4) for c in (pair.having, pair.lacking)]
        to_int8 = distance(rows[pair.having])[0] / base
        numbers = f"{ratio:.2f} | {difference:+.1f} | {to_int8:.2f}"
        lines.append(f"| {pair.what} | {' | '.join(cells)} | {numbers} |")
    return lines


def sums(rows: Rows) -> list[str]:
    """Return the table of configurations and of the sums of their parts."""
    known = [(whole, parts) for whole, parts in SUMS if has_quality(rows, whole, *parts)]
    if not known:
        return []
    lines = [
        "What is added by caching and by fewer bits, alone and together:",
        "",
        "| the whole | its distance | sum of its parts' | root of their squares' sum | parts |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for whole, parts in known:
        distances = [distance(rows[part])[0] for part in parts]
        names = ", ".join(f"`{p}` {d:.4f}" for p, d in zip(parts, distances, strict=True))
        lines.append(
            f"| `{whole}` | {number(rows[whole]['quality']['distance'], 1, 4)}"
            f" | {sum(distances):.4f} | {math.hypot(*distances):.4f} | {names} |"
        )
    return lines


# Goals


def quality_goals(rows: Rows, steps: int) -> list[str]:
    """Return how one model's images meet the goals."""
    lines = [*_kid(rows), *_pairs(rows), *_four_bits(rows), *_weights(rows), *_rivals(rows, steps)]
    return [f"- {line}" for line in lines]


def _kid(rows: Rows) -> list[str]:
    if not has_quality(rows, INT8, REFERENCE):
        return []
    lines = []
    for key, what in (("kid held-out", "held-out images"), ("kid other seeds", "other seeds")):
        kid, floor = (rows[c]["quality"].get(key) for c in (INT8, REFERENCE))
        if kid is None:
            continue
        # 5 % of a floor near zero cannot be told apart: its deviation is allowed instead.
        is_zero = abs(floor[0]) < 3 * floor[1]
        limit = floor[0] + (floor[1] if is_zero else (KID_SLACK - 1) * floor[0])
        more = "one deviation" if is_zero else f"{KID_SLACK - 1:.0%}"
        lines.append(
            f"{verdict(kid[0] <= limit)}: KID to {what} of W8A8 is {number(kid, 1000, 2)}, the"
            f" reference's {number(floor, 1000, 2)}; asked is at most {more} more."
        )
    return lines


def _pairs(rows: Rows) -> list[str]:
    lines = []
    for pair in PAIRS:
        if not (pair.goal and has_quality(rows, pair.having, pair.lacking)):
            continue
        ratio, difference = ahead(rows, pair.having, pair.lacking)
        lines.append(
            f"{verdict(difference >= 2)}: {pair.what}: the distance is {ratio:.2f} times that"
            f" without, {difference:+.1f} standard errors ahead (2 count as measurable)."
        )
    return lines


def _four_bits(rows: Rows) -> list[str]:
    known = [config for config in FOUR_BITS if has_quality(rows, config)]
    if not known or not has_quality(rows, INT4, INT8):
        return []
    best = min(known, key=lambda config: distance(rows[config])[0])
    base = distance(rows[INT8])[0]
    ratio, plain = distance(rows[best])[0] / base, distance(rows[INT4])[0] / base
    return [
        f"{verdict(ratio <= FOUR_BITS_RATIO)}: weights of 4 bits have {ratio:.2f} times the"
        f" distance of W8A8 with `{best}`; the nearest ones have {plain:.2f} times. Asked is at"
        f" most {FOUR_BITS_RATIO}."
    ]


def _weights(rows: Rows) -> list[str]:
    ratios = {
        config: row["cost"]["weights"]["bytes"] / row["cost"]["weights"]["fp16 bytes"]
        for config, row in rows.items()
        if "quantize(int4" in config and "cost" in row
    }
    if not ratios:
        return []
    best = min(ratios, key=lambda config: ratios[config])
    return [
        f"{verdict(ratios[best] <= SIZE_GOAL)}: the weights take {ratios[best]:.0%} of fp16's"
        f" bytes with `{best}`; asked is at most {SIZE_GOAL:.0%}."
    ]


def _rivals(rows: Rows, steps: int) -> list[str]:
    """Compare int8 with fewer steps in bf16 that take at least as long."""
    if not ("time" in rows.get(INT8, {}) and has_quality(rows, INT8)):
        return []
    int8_time = median(rows, INT8) / median(rows, INT8, BF16)
    known = [
        (n, c)
        for n in FEWER.get(steps, ())
        if "time" in rows.get(c := fewer(n, BF16), {}) and has_quality(rows, c)
    ]
    slower = [
        (n, c) for n, c in known if median(rows, c) / median(rows, c, BF16) >= 0.98 * int8_time
    ]
    if not slower:
        return []
    n, rival = min(slower, key=lambda item: distance(rows[item[1]])[0])
    ahead = distance(rows[INT8])[0] < distance(rows[rival])[0]
    return [
        f"W8A8 is {'nearer to the reference than' if ahead else 'behind'} bf16 with {n} of"
        f" {steps} steps, which takes"
        f" {median(rows, rival) / median(rows, rival, BF16) / int8_time:.2f} times as long:"
        f" {distance(rows[INT8])[0]:.4f} and {distance(rows[rival])[0]:.4f}."
    ]


def speed_goals(large: Mapping[str, Any]) -> list[str]:
    """Return how the engines of larger models meet the goals."""
    lines = []
    for name, model in large.items():
        lines += _large_sizes(name, model.get("times", {}))
        times = {k: statistics.median(t["seconds"]) for k, t in model.get("times", {}).items()}
        fastest = {
            config: min((t for k, t in times.items() if k.startswith(f"{config} on ")), default=0)
            for config in (BF16, INT8)
        }
        if not all(fastest.values()):
            continue
        ratio = fastest[BF16] / fastest[INT8]
        lines.append(
            f"- {verdict(ratio >= SPEEDUP)}: {name}: int8 is {ratio:.2f}× as fast as bf16 end to"
            f" end, each on its fastest target; asked is {SPEEDUP}×."
        )
    return lines


def _large_sizes(name: str, times: Mapping[str, Any]) -> list[str]:
    """Return the size of a larger model's engine with 4-bit weights."""
    sizes = {
        k: t["weights"]["bytes"] / t["weights"]["fp16 bytes"]
        for k, t in times.items()
        if "quantize(int4" in k
    }
    if not sizes:
        return []
    best = min(sizes, key=lambda k: sizes[k])
    config, _, target = best.partition(" on ")
    base = times.get(f"{BF16} on {target}")
    file = f", its file {times[best]['file'] / base['file']:.0%} of bf16's" if base else ""
    return [
        f"- {verdict(sizes[best] <= SIZE_GOAL)}: {name}: the weights of `{config}` take"
        f" {sizes[best]:.0%} of fp16's bytes{file}; asked is at most {SIZE_GOAL:.0%}."
    ]


def peer_goals(peers: Mapping[str, Any]) -> list[str]:
    """Compare engines with the peer, each at its fastest."""
    lines = []
    for name, model in peers.items():
        for kind in ("bf16", "int8"):
            rows = {k: r for k, r in model["contenders"].items() if k.startswith(f"{kind}, ")}
            theirs = rows.pop(f"{kind}, {THEIRS}")
            key, ours = min(rows.items(), key=lambda item: statistics.median(item[1]["seconds"]))
            times = [statistics.median(row["seconds"]) for row in (ours, theirs)]
            verb = "faster" if times[0] < times[1] else "not faster"
            lines.append(
                f"- {name}, {kind}: the engine ({key.partition(', ')[2]}) is {verb}:"
                f" {times[1] / times[0]:.2f}× the speed of {THEIRS}, with"
                f" {ours['error'] / theirs['error']:.2f} times its error."
            )
    return lines
