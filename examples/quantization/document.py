"""Writes the measurements of docs/quantization.md from the results."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.quantization import findings
from examples.quantization.configurations import (
    BF16,
    CACHE_INT8,
    INT4,
    INT4_ADAROUND,
    INT4_RANK,
    INT8,
    INT8_ONE_STEP,
    ONE_STEP,
)
from examples.quantization.measure import LEVEL
from examples.quantization.peers import PACKAGES, SAMPLES, THEIRS
from examples.study.document import floor_lines, larger, left_out, milliseconds, number
from examples.study.models import GUIDANCE
from examples.study.rows import median
from examples.study.study import REFERENCE

DOCUMENT = Path(__file__).parents[2] / "docs" / "quantization.md"

PICTURED = (REFERENCE, INT8, INT8_ONE_STEP, INT4, INT4_ADAROUND, INT4_RANK, CACHE_INT8)


def pictured(rows: Mapping[str, Any]) -> list[str]:
    """Return the configurations that the picture shows, from the top."""
    return [config for config in PICTURED if "quality" in rows.get(config, {})]


def section(data: Mapping[str, Any], folder: Path) -> str:
    """Return the results as the text between the markers; pictures are in the folder."""
    lines = [
        "`make bench-quantization` writes this section; the raw numbers are in quantization.json"
        " beside it.",
        "",
        *_about(data),
    ]
    for title, model in data.get("models", {}).items():
        lines += ["", f"### {title}", "", *_model(title, model, folder)]
    if "large" in data:
        lines += ["", "### Times of larger models", "", *_large(data["large"])]
    if "peers" in data:
        lines += ["", f"### Next to {' and '.join(PACKAGES)}", "", *_peers(data["peers"])]
    return "\n".join(lines)


def _about(data: Mapping[str, Any]) -> list[str]:
    at = data.get("machine")
    lines = [
        f"The reference is the pipeline as it is: DDIM, guidance {GUIDANCE:g}, fp32. All others"
        " follow `unroll,hoist,simplify,fuse`; `cache` and `unroll` with other steps take their"
        f" places in there. Images are those of {data['setup']['images']} seeds, the same for all,"
        " made without a target, with numbers that are quantized and widened again; calibration"
        " has other seeds. Distance is the mean over pairs of images of the same seed of"
        " |f(a) - f(b)| / |f(b)|, f the features of"
        " diffopt/cli/image_metrics.py. KID is times 1000, ± its deviation over"
        " subsets; other seeds are images of the reference itself.",
        "",
        f"With `{ONE_STEP.strip()}` every step gets the ranges that were measured in the step in"
        " the middle of the trajectory; all else is the same.",
    ]
    if at:
        lines += [
            "",
            f"Times are of one request on {at['cpu']}, {at['threads']} threads, torch"
            f" {at['torch']}, medians of engines that take turns with those of the reference and"
            " of bf16; in parentheses, the interquartile range.",
        ]
    return lines


# Trained models


def _model(title: str, model: Mapping[str, Any], folder: Path) -> list[str]:
    rows = {config: row for config, row in model["configs"].items() if "cost" in row}
    steps = int(title.partition(", ")[2].partition(" ")[0])
    lines = [*_qualities(rows), "", *floor_lines(model, rows)]
    timed = {config: row for config, row in rows.items() if "time" in row}
    blocks = [_timings(timed), findings.ablations(rows), findings.sums(rows)]
    for block in blocks:
        lines += ["", *block] if block else []
    lines += ["", *findings.quality_goals(rows, steps), *left_out(model["configs"], "cost")]
    picture = f"quantization-{title.replace(', ', '-').removesuffix(' steps')}.png"
    if (folder / picture).exists():
        names = ", ".join(f"`{config}`" for config in pictured(rows))
        lines += ["", f"![images]({picture})", "", f"From the top: {names}."]
    return lines


def _qualities(rows: Mapping[str, Any]) -> list[str]:
    lines = [
        "| configuration | weights, MB | of fp16 | distance | pixels | KID, held-out"
        " | KID, other seeds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for config, row in rows.items():
        weights, quality = row["cost"]["weights"], row.get("quality", {})
        cells = [
            f"`{config}`",
            f"{weights['bytes'] / 1e6:.2f}",
            f"{weights['bytes'] / weights['fp16 bytes']:.0%}",
            *(number(quality.get(key), 1, 4) for key in ("distance", "pixels")),
            *(number(quality.get(key), 1000, 2) for key in ("kid held-out", "kid other seeds")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _timings(rows: Mapping[str, Any]) -> list[str]:
    if not rows:
        return []
    first = next(iter(rows.values()))["time"]
    lines = [
        f"Engines for `{first['target']}`; distances are those of their own images and of those"
        f" above, on {first['images']} seeds. The last column is the file with zstandard at level"
        f" {LEVEL}.",
        "",
        "| configuration | time, ms | against fp32 | against bf16 | engine's distance"
        " | distance above | file, MB | next to bf16's | compressed, MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for config, row in rows.items():
        at = row["time"]
        ratios = [median(rows, config, c) / median(rows, config) for c in (REFERENCE, BF16)]
        base = rows.get(BF16, {}).get("time", {}).get("file")
        cells = [
            f"`{config}`",
            milliseconds(at["seconds"]),
            *(f"{ratio:.2f}×" for ratio in ratios),
            *(number(at[key], 1, 4) for key in ("engine", "emulated")),
            f"{at['file'] / 1e6:.2f}",
            f"{at['file'] / base:.0%}" if base else "-",
            f"{at['compressed'] / 1e6:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


# Larger models


def _large(data: Mapping[str, Any]) -> list[str]:
    def cells(times: Mapping[str, Any], key: str) -> list[str]:
        row, weights = times[key], times[key]["weights"]
        config, _, target = key.partition(" on ")
        base = times.get(f"{BF16} on {target}")
        seconds = [statistics.median(each["seconds"]) for each in (base, row) if each]
        return [
            f"`{config}` on `{target}`",
            milliseconds(row["seconds"]),
            f"{seconds[0] / seconds[1]:.2f}×" if base else "-",
            f"{weights['bytes'] / 1e6:.1f}",
            f"{weights['bytes'] / weights['fp16 bytes']:.0%}",
            f"{row['file'] / 1e6:.1f}",
            f"{row['psnr']:.1f}",
        ]

    columns = (
        "engine",
        "time, ms",
        "against bf16",
        "weights, MB",
        "of fp16",
        "file, MB",
        "PSNR, dB",
    )
    return [
        "Random weights: what is measured is time and size. The error is that of the pixels next to"
        " the first row's, in decibels.",
        *larger(data, columns, cells),
        "",
        *findings.speed_goals(data),
    ]


def _peers(data: Mapping[str, Any]) -> list[str]:
    packages = next(iter(data.values()))["packages"]
    lines = [
        f"{', '.join(f'{name} {version}' for name, version in packages.items())}. One call of the"
        " denoiser, the same graph, arguments and threads on both sides, which take turns in one"
        f" process; `{INT8}` and NNCF's post-training quantization are calibrated with the calls of"
        f" the same {SAMPLES} requests. {THEIRS} has static shapes, and bf16 for what is not int8."
        " The error is relative to fp32 in the results of the calls of another request.",
    ]
    for title, model in data.items():
        lines += [
            "",
            f"{title}, {model['parameters'] / 1e6:.1f} M parameters,"
            f" a batch of {model['shape'][0]}:",
            "",
            "| numbers | by | time, ms | against OpenVINO | error |",
            "| --- | --- | ---: | ---: | ---: |",
        ]
        for key, row in model["contenders"].items():
            kind, _, side = key.partition(", ")
            base = statistics.median(model["contenders"][f"{kind}, {THEIRS}"]["seconds"])
            name = side if side == THEIRS else f"engine, `{side}`"
            lines.append(
                f"| {kind} | {name} | {milliseconds(row['seconds'])}"
                f" | {base / statistics.median(row['seconds']):.2f}× | {row['error']:.5f} |"
            )
    return [*lines, "", *findings.peer_goals(data)]
