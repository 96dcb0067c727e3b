"""Writes the section of docs/caching.md on other packages from the measurements."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from examples.caching.peers.measure import (
    COMPILED,
    EAGER,
    ENGINE,
    RECOMPILE_LIMIT,
    UNCACHED,
    UNCACHED_COMPILED,
)
from examples.study.document import rewrite
from examples.study.models import GUIDANCE

BEGIN, END = "<!-- peers: begin -->", "<!-- peers: end -->"


def document(data: Mapping[str, Any]) -> str:
    """Return the section of the document."""
    at, rows = data["machine"], data["rows"]
    versions = {row["package"]: row["version"] for row in rows.values()}
    lines = [
        "`python -m examples.caching.peers` writes this section; the raw times are in peers.json"
        " beside this file.",
        f"{', '.join(f'{name} {version}' for name, version in sorted(versions.items()))}, on"
        f" {at['cpu']} ({at['capability']}), {at['threads']} threads, torch {at['torch']}, fp32,"
        f" batch 1, guidance {GUIDANCE:g}.",
        "",
        "The same schedule gives the same image:",
        "",
        "| package | its call | the same pass | same layers in every step"
        " | largest pixel difference | mean | what the cache itself changes |",
        "| --- | --- | --- | --- | ---: | ---: | ---: |",
        *(image_line(row) for row in rows.values()),
        "",
        "Layers are counted by hooks on the package's side, in the graph on the engine's."
        " Differences are pixels from 0 to 1, the largest over"
        f" {' or '.join(sorted({str(row['seeds']) for row in rows.values()}))} seeds; the last"
        " column is the largest difference between the package's images and those without a cache.",
        "",
        "Milliseconds an image, medians of rounds in which all take turns; ± half the interquartile"
        " range:",
        "",
        "| package, pass | steps | no cache, eager | no cache, compiled | package, eager"
        " | package, compiled | engine | engine against the package, eager | compiled |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(time_line(row) for row in rows.values()),
        "",
        *compile_lines(rows.values()),
    ]
    return "\n".join(lines) + "\n"


def image_line(row: Mapping[str, Any]) -> str:
    """Return a row of the table of images."""
    same = "yes" if row["same layers"] else "no"
    return (
        f"| {row['package']} | {row['call']} | {short(row)} | {same} | {row['max_abs']:.1e}"
        f" | {row['mean_abs']:.1e} | {row['cache max_abs']:.2f} |"
    )


def time_line(row: Mapping[str, Any]) -> str:
    """Return a row of the table of times."""
    rows = row["contenders"]
    names = (UNCACHED, UNCACHED_COMPILED, EAGER, COMPILED, ENGINE)
    cells = [milliseconds(rows[name]) if name in rows else "-" for name in names]
    for name in (EAGER, COMPILED):
        ratio = rows[name]["median"] / rows[ENGINE]["median"] if name in rows else None
        cells.append(f"{ratio:.2f}×" if ratio else "-")
    return f"| {row['package']}, {short(row)} | {row['steps']} | {' | '.join(cells)} |"


def short(row: Mapping[str, Any]) -> str:
    """Return a pass without long lists of numbers."""
    return "`" + re.sub(r"\((?:[\d.]+,){4,}[\d.]+\)|[01]{9,}", "…", row["cache"]) + "`"


def milliseconds(times: Mapping[str, Any]) -> str:
    """Return a median and its spread."""
    return f"{times['median'] * 1e3:.1f} ± {times['spread'] * 1e3 / 2:.1f}"


def compile_lines(rows: Collection[Mapping[str, Any]]) -> list[str]:
    """Return what compiling the packages' caches took."""
    lines = [
        "What torch.compile makes of the packages' Python, with its limit of recompilations raised"
        f" to {RECOMPILE_LIMIT} (two images):",
        "",
    ]
    for row in rows:
        if "compile" not in row:
            continue
        cost = row["compile"]
        what = cost.get("error") or (
            f"{cost['graphs']} graphs, {cost['breaks']} graph breaks, {cost['seconds']:.0f} s"
        )
        lines.append(f"- {row['package']}, {short(row)}: {what}")
    return lines


def put(text: str, path: Path) -> None:
    """Write the section between its marks, at the end of a document that has none."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    if BEGIN not in old:
        new = f"\n## Next to the peers' own packages\n\n{BEGIN}\n{END}\n"
        path.write_text(old + new, encoding="utf-8")
    rewrite(path, f"\n{text}", (BEGIN, END))
