"""Writes the section of docs/caching.md, and its pictures, from the results."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.caching.configurations import kind, shown
from examples.caching.ranking import SLACK, best_of, distance, duels, measured, pareto_front
from examples.study.document import floor_lines, left_out, milliseconds, number
from examples.study.models import GUIDANCE
from examples.study.study import REFERENCE

DOCUMENT = Path(__file__).parents[2] / "docs" / "caching.md"


def section(data: Mapping[str, Any], folder: Path) -> str:
    """Return the results as the text between the markers; pictures are in the folder."""
    setup, at = data["setup"], data.get("machine", {})
    lines = [
        "`make bench-caching` writes this section; the raw numbers are in caching.json beside it.",
        "",
        f"The reference is the pipeline as it is: DDIM, {setup['steps']} steps, guidance"
        f" {GUIDANCE:g}, fp32. Images are those of {setup['images']} seeds, the same for all;"
        " policies that measure do so with other seeds. Distance is the mean over pairs of images"
        " of the same seed of |f(a) - f(b)| / |f(b)|, f the features of"
        " diffopt/cli/image_metrics.py. KID is times 1000, ± its deviation over subsets;"
        " other seeds are images of the reference itself. In bold: no configuration has both"
        " fewer FLOPs and a smaller distance.",
    ]
    if at:
        lines += [
            "",
            f"Times are of one request on {at['cpu']}, {at['threads']} threads, torch"
            f" {at['torch']}, medians of engines that take turns with the reference's; in"
            " parentheses, the interquartile range. Promised is the ratio of the FLOPs of the"
            " whole program, text encoder and decoder included.",
        ]
    for name, model in data.get("models", {}).items():
        rows = {c: r for c, r in model["configs"].items() if "cost" in r}
        lines += ["", f"### {name}", "", *table(rows), "", *floor_lines(model, rows)]
        if duels(rows):
            lines += ["", *duel_table(rows)]
        lines += [
            "",
            *verdicts(rows),
            *kid_goal(model, rows),
            *left_out(model["configs"], "cost", shown),
        ]
        picture = picture_rows(rows)
        if (folder / f"caching-{name}.png").exists():
            names = ", ".join(f"`{c}`" for c in picture)
            lines += ["", f"![images](caching-{name}.png)", "", f"From the top: {names}."]
    return "\n".join(lines)


def table(rows: Mapping[str, Any]) -> list[str]:
    """Return a row for each configuration, the most FLOPs first."""
    lines = [
        "| configuration | FLOPs | | time, ms | measured | promised | distance | pixels"
        " | KID, held-out | KID, other seeds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    best = pareto_front(rows)
    for config, row in sorted(rows.items(), key=lambda item: -item[1]["cost"]["denoiser"]):
        part, quality = row["cost"]["denoiser"], row.get("quality", {})
        name = f"**`{shown(config)}`**" if config in best else f"`{shown(config)}`"
        cells = [
            name,
            f"{part:.3f}",
            f"{1 / part:.2f}×",
            *time_cells(row),
            *(number(quality.get(key), 1, 4) for key in ("distance", "pixels")),
            *(number(quality.get(key), 1000, 2) for key in ("kid held-out", "kid other seeds")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def time_cells(row: Mapping[str, Any]) -> list[str]:
    """Return the time, and how much faster it is than the reference, measured and promised."""
    promised = f"{1 / row['cost']['program']:.2f}×"
    if "time" not in row:
        return ["-", "-", promised]
    return [milliseconds(row["time"]["seconds"]), f"{measured(row):.2f}×", promised]


def duel_table(rows: Mapping[str, Any]) -> list[str]:
    """Return `auto` beside its best rivals."""
    lines = [
        f"A rival may have {SLACK - 1:.0%} more FLOPs than `auto` has or than the speedup asks.",
        "",
        "| at | `auto`: FLOPs, distance | best fixed policy | best with fewer steps |",
        "| --- | --- | --- | --- |",
    ]
    for speedup, chosen in duels(rows).items():
        cells = [
            f"{rows[c]['cost']['denoiser']:.3f}, {distance(rows[c]):.4f}"
            + ("" if kind(c) == "auto" else f": `{shown(c)}`")
            if c
            else "none as cheap"
            for c in chosen
        ]
        lines.append(f"| {speedup:g}× | {' | '.join(cells)} |")
    return lines


def verdicts(rows: Mapping[str, Any]) -> list[str]:
    """Return conclusions from the numbers, in sentences."""
    lines = []
    for speedup, (auto, *rivals) in duels(rows).items():
        nearer = [c for c in rivals if c and distance(rows[c]) <= distance(rows[auto])]
        text = " and ".join(f"`{shown(c)}`" for c in nearer)
        verb = "is" if len(nearer) == 1 else "are"
        lines.append(
            f"- At {speedup:g}× `auto` is behind: {text} {verb} nearer to the reference."
            if nearer
            else f"- At {speedup:g}× `auto` is ahead of every fixed policy and of fewer steps."
        )
    ratios = {
        c: measured(r) * r["cost"]["program"]
        for c, r in rows.items()
        if "time" in r and c != REFERENCE
    }
    if ratios:
        low = min(ratios, key=lambda c: ratios[c])
        good = sum(ratio >= 0.85 for ratio in ratios.values())
        lines.append(
            f"- {good} of {len(ratios)} engines reach 85 % of the speedup that their FLOPs promise;"
            f" the least is {ratios[low]:.0%}, of `{shown(low)}`."
        )
    return lines


def kid_goal(model: Mapping[str, Any], rows: Mapping[str, Any]) -> list[str]:
    """Return how `auto` at 2.5 times fewer FLOPs compares with the floors of KID."""
    config = "auto,speedup=2.5"
    row, base = (
        rows.get(c, {}).get("quality", {}).get("kid held-out") for c in (config, REFERENCE)
    )
    floor = model.get("floors", {}).get("real")
    if not (row and base and floor):
        return []
    words = [
        f"{name} {number(other, 1000, 2)}: it is {'' if row[0] <= 1.1 * other[0] else 'not '}within"
        " that plus 10 %"
        for name, other in (("the reference's", base), ("that of real images", floor))
    ]
    return [
        f"- `cache({config})` has {1 / rows[config]['cost']['denoiser']:.2f}× fewer FLOPs. Its KID"
        f" to held-out images is {number(row, 1000, 2)}; {'; '.join(words)}."
    ]


def picture_rows(rows: Mapping[str, Any]) -> list[str]:
    """Return the configurations that the picture shows, from the top."""
    wanted = [REFERENCE, "auto,speedup=2", "auto,speedup=3"]
    wanted += [c for c in (best_of(rows, "policy", 3), best_of(rows, "fewer steps", 3)) if c]
    return [c for c in wanted if c in rows]
