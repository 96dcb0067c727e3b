"""Draws heat maps of the sampling loop, blocks by steps: which are computed, which reused."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from diffopt.caching.step_map import StepMapReport, step_map_reports
from diffopt.cli.output import count
from diffopt.core import Record
from diffopt.errors import DiffoptError
from diffopt.ir.program import Program

MARGIN = 16
LINE = 20  # height of a line of text and of a row
GRID = 900  # approximate width of all cells
CELLS = (2, 28)  # the smallest and the largest width of a cell
SMALL, LARGE = 13, 16  # sizes of text, in pixels like all lengths
GREY = "#555555"

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def draw(source: Program | Record) -> Image.Image:
    """Return the heat maps of passes that reuse values of earlier steps, one below the other.

    `source` is the record of one pass, or a program with those of all.
    """
    records = [source] if isinstance(source, Record) else map(Record.from_json, source.history)
    pictures = [_picture(report) for report in step_map_reports(records)]
    if not pictures:
        raise DiffoptError(
            "no pass has made a step take values of earlier steps, so there is no map to draw: "
            "optimize with one that does, as in unroll,hoist,cache(fora)"
        )
    return stacked(pictures)


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """Return pictures one below the other."""
    size = max(p.width for p in pictures), sum(p.height for p in pictures)
    sheet = Image.new("RGB", size, "white")
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    return sheet


def _picture(report: StepMapReport) -> Image.Image:
    legend = {meaning: report.colour(sign) for sign, meaning in report.note["legend"].items()}
    rows = {
        label: [report.colour(sign) for sign in signs]
        for label, signs in report.note["map"].items()
    }
    return cells(report.text, _facts(report), legend, rows)


def cells(
    text: str, notes: Sequence[str], legend: Mapping[str, str], rows: Mapping[str, Sequence[str]]
) -> Image.Image:
    """Return a picture of a grid of coloured cells: a row a part of the loop, a column a step.

    Args:
        text: The title.
        notes: Lines below the title.
        legend: The colour of each meaning.
        rows: The colours of each part's steps.
    """
    steps = max(len(row) for row in rows.values())
    small, large = ImageFont.load_default(SMALL), ImageFont.load_default(LARGE)
    cell = min(CELLS[1], max(CELLS[0], GRID // steps))
    left = MARGIN + math.ceil(max(small.getlength(label) for label in rows)) + 8
    width = max(left + cell * steps + MARGIN, 640)
    title = list(_wrapped(text, large, width - 2 * MARGIN))
    facts = [line for note in notes for line in _wrapped(note, small, width - 2 * MARGIN)]
    grid = MARGIN + LINE * (len(title) + len(facts) + 2) + MARGIN
    sheet = Image.new("RGB", (width, grid + LINE * (len(rows) + 1) + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for index, line in enumerate(title):
        pen.text((MARGIN, MARGIN + LINE * index), line, "black", large)
    for index, line in enumerate(facts, len(title)):
        pen.text((MARGIN, MARGIN + LINE * index + 4), line, GREY, small)
    _legend(pen, legend, grid - LINE - MARGIN, small)
    for index, (label, colours) in enumerate(rows.items()):
        top = grid + LINE * index
        pen.text((left - 8, top + LINE // 2), label, "black", small, anchor="rm")
        _row(pen, colours, (left, top), cell)
    _numbers(pen, steps, (left, grid + LINE * len(rows)), cell, small)
    return sheet


def _facts(report: StepMapReport) -> list[str]:
    """Return the FLOPs and the memory of a pass as text, in characters that every font has."""
    note = report.note
    before, promised, after = (
        count(note["flops"][key]) for key in ("before", "predicted", "measured")
    )
    bodies = "1 body" if note["bodies"] == 1 else f"{note['bodies']} bodies"
    return [
        f"{report.component}: {before} FLOPs before, {promised} predicted, {after} measured: "
        f"{report.flops_ratio:.3g} times fewer",
        f"{bodies}, at most {note['peak cache bytes'] / 2**20:.3g} MB kept for later steps, "
        f"relative error of the output {report.relative:.3g}",
    ]


def _legend(pen: ImageDraw.ImageDraw, legend: Mapping[str, str], top: int, font: Font) -> None:
    left = float(MARGIN)
    for meaning, colour in legend.items():
        pen.rectangle((left, top + 3, left + 13, top + 16), colour)
        pen.text((left + 19, top + LINE // 2), meaning, "black", font, anchor="lm")
        left += 19 + font.getlength(meaning) + 20


def _row(
    pen: ImageDraw.ImageDraw, colours: Sequence[str], corner: tuple[int, int], cell: int
) -> None:
    left, top = corner
    gap = 2 if cell > 4 else 1  # the line between cells
    for step, colour in enumerate(colours):
        start = left + cell * step
        box = (start, top + 1, start + cell - gap, top + LINE - 2)
        pen.rectangle(box, colour)


def _numbers(
    pen: ImageDraw.ImageDraw,
    steps: int,
    corner: tuple[int, int],
    cell: int,
    font: Font,
) -> None:
    """Write the numbers of steps below their columns, as many as fit."""
    left, top = corner
    room = font.getlength(str(steps)) + 8
    apart = next((n for n in (1, 2, 5, 10, 20, 50, 100) if n * cell >= room), steps)
    for step in range(0, steps, apart):
        middle = left + cell * step + (cell - 1) / 2
        pen.text((middle, top + 12), str(step), GREY, font, anchor="mm")
    pen.text((left - 8, top + 12), "step", GREY, font, anchor="rm")


def _wrapped(text: str, font: Font, width: float) -> Iterator[str]:
    """Break a text into lines that fit, at a space or a comma where there is one."""
    while text:
        end = _prefix_length(text, font, width)
        if end < len(text):
            end = max(text.rfind(" ", 0, end), text.rfind(",", 0, end)) + 1 or end
        yield text[:end].rstrip()
        text = text[end:]


def _prefix_length(text: str, font: Font, width: float) -> int:
    """Return the number of leading characters that fit, at least 1."""
    lengths: Sequence[int] = range(1, len(text) + 1)
    return next((n - 1 for n in lengths[1:] if font.getlength(text[:n]) > width), len(text))
