"""Writes sections of documents, between two markers, and pictures for them."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffopt.errors import DiffoptError
from examples.study.study import REFERENCE, Study

BEGIN, END = "<!-- measurements: begin -->", "<!-- measurements: end -->"


def rewrite(document: Path, section: str, markers: tuple[str, str] = (BEGIN, END)) -> None:
    """Replace the text between the markers of the document."""
    text = document.read_text(encoding="utf-8")
    begin, end = markers
    before, _, rest = text.partition(begin)
    _, marker, after = rest.partition(end)
    if not marker:
        raise DiffoptError(f"{document}: has no lines {begin} and {end} to write between")
    document.write_text(f"{before}{begin}\n{section}\n{end}{after}", encoding="utf-8")


def number(pair: Sequence[float] | None, scale: float, digits: int) -> str:
    """Return a number with its error."""
    if pair is None:
        return "-"
    return f"{pair[0] * scale:.{digits}f} ± {pair[1] * scale:.{digits}f}"


def milliseconds(seconds: Sequence[float]) -> str:
    """Return the median of times and, in parentheses, their interquartile range."""
    if len(seconds) < 2:
        return f"{seconds[0] * 1e3:.1f} (-)"
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return f"{middle * 1e3:.1f} ({(high - low) * 1e3:.1f})"


def floor_lines(model: Mapping[str, Any], rows: Mapping[str, Any]) -> list[str]:
    """Return the floors of the metrics: what differs between seeds, and real images."""
    floors = model.get("floors", {})
    lines = []
    if REFERENCE in rows and "quality" in rows[REFERENCE]:
        base = rows[REFERENCE]["quality"]
        real = f", of real images {number(floors['real'], 1000, 2)}" if "real" in floors else ""
        lines += [
            f"- Floors of KID: of the reference to its own images of other seeds"
            f" {number(base['kid other seeds'], 1000, 2)}; to held-out images, of the reference"
            f" {number(base.get('kid held-out'), 1000, 2)}{real}.",
        ]
    if floors and "real" not in floors:
        lines.append("- The held-out images were not at hand: there is no KID to them.")
    if floors:
        lines += [
            f"- Two images of the reference of one class and different seeds have the distance"
            f" {number(floors['other seeds'], 1, 4)}. The reference's pixels differ from the"
            f" pipeline's own by at most {floors['pipeline']:.1e}.",
        ]
    return lines


def left_out(
    configs: Mapping[str, Any], measured: str, shown: Callable[[str], str] = str
) -> list[str]:
    """Return which configurations were not measured, and why: one line a reason.

    Args:
        configs: The rows of the results by configuration.
        measured: The key that measured rows have.
        shown: Returns a configuration as the document shows it.
    """
    reasons: dict[tuple[str, str], list[str]] = {}
    for config, row in configs.items():
        for what in {"left out", "failed"} & row.keys() if measured not in row else ():
            reasons.setdefault((what, row[what]), []).append(f"`{shown(config)}`")
    return [f"- {what.capitalize()}: {', '.join(n)}: {why}." for (what, why), n in reasons.items()]


def larger(
    data: Mapping[str, Any],
    columns: Sequence[str],
    cells: Callable[[Mapping[str, Any], str], Sequence[str]],
) -> list[str]:
    """Return the tables of the times of larger models.

    Args:
        data: The results by model.
        columns: The titles of the columns: names, then numbers.
        cells: Returns the cells of an engine, from the rows of all and its key.
    """
    lines = []
    for title, model in data.items():
        if "times" not in model:
            continue
        lines += [
            "",
            f"{title}, denoiser of {model['parameters'] / 1e6:.1f} M parameters:",
            "",
            f"| {' | '.join(columns)} |",
            f"| --- |{' ---: |' * (len(columns) - 1)}",
            *(f"| {' | '.join(cells(model['times'], key))} |" for key in model["times"]),
            *left_out(model.get("configs", {}), "times"),
        ]
    return lines


def draw(study: Study, configs: Iterable[str], path: Path) -> None:
    """Write the first images of some configurations as a PNG, enlarged three times."""
    files = [study.path(c, ".0.pt") for c in configs]
    if not files or not all(file.exists() for file in files):
        return
    grid = torch.cat([torch.cat(list(torch.load(file)[:10, 0]), 1) for file in files])
    image = Image.fromarray((grid * 255).round().byte().numpy())
    size = (image.width * 3, image.height * 3)
    image.resize(size, Image.Resampling.NEAREST).save(path, optimize=True)
