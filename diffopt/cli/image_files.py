"""Writes the results of a pipeline to a file: pictures as a grid, others as arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from diffopt.engine import picture_record
from diffopt.errors import DiffoptError, first_line
from diffopt.host.outputs import pictures_in
from diffopt.storage.temporary import replacing

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
NUMBERS = (".pt", ".npy")


def output_type(path: Path) -> str:
    """Return the `output_type` of a call whose result goes to `path`."""
    if path.suffix in PICTURES:
        return "pil"
    if path.suffix in NUMBERS:
        return "pt"
    known = ", ".join((*PICTURES, *NUMBERS))
    raise DiffoptError(f"cannot write '{path}': the name must end in one of {known}")


def as_tensors(loaded: Any) -> dict[str, str]:
    """Return the arguments of a call whose result is tensors, of an engine or program."""
    return {"output_type": "pt"} if loaded.converts("pt") else {}


def grid(images: Sequence[Image.Image], gap: int = 2) -> Image.Image:
    """Return the images side by side in a rectangle that is as wide as high, or wider."""
    if len(images) == 1:
        return images[0]
    side = math.sqrt(len(images))
    divisors = [n for n in range(math.ceil(side), int(2 * side) + 1) if len(images) % n == 0]
    columns = divisors[0] if divisors else math.ceil(side)  # with a full last row if possible
    rows = math.ceil(len(images) / columns)
    width, height = images[0].size
    step_x, step_y = width + gap, height + gap
    size = (columns * step_x - gap, rows * step_y - gap)
    sheet = Image.new(images[0].mode, size, "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * step_x, index // columns * step_y))
    return sheet


def columns(
    heads: Sequence[str], pictures: Sequence[Sequence[Image.Image]], gap: int = 2
) -> Image.Image:
    """Return lists of as many images as columns side by side, each under its heading."""
    font = ImageFont.load_default()
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [draw.multiline_textbbox((0, 0), head, font=font) for head in heads]
    width, height = pictures[0][0].size
    widths = [max(width, math.ceil(right)) + 2 * gap for _, _, right, _ in boxes]
    top = math.ceil(max(bottom for _, _, _, bottom in boxes)) + 2 * gap
    size = sum(widths), top + len(pictures[0]) * (height + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    left = 0
    for head, column, wide in zip(heads, pictures, widths, strict=True):
        draw.multiline_text((left + gap, gap), head, "black", font)
        for row, picture in enumerate(column):
            sheet.paste(picture, (left + gap, top + row * (height + gap)))
        left += wide
    return sheet


def save_picture(
    picture: Image.Image, path: Path, told: picture_record.Record | None = None
) -> None:
    """Write a picture, atomically; a PNG file with what made it, where that is told."""
    kind = Image.registered_extensions()[path.suffix]
    more = {"pnginfo": picture_record.as_text(told)} if told and path.suffix == ".png" else {}
    _replace(path, lambda file: picture.save(file, kind, **more))


def save(
    results: Sequence[Any], path: Path, number: int, told: picture_record.Record | None = None
) -> int:
    """Write the first `number` items of results to one file, atomically; return their count.

    A PNG file has what made them, where that is `told`.
    """
    if path.suffix in PICTURES:
        pictures = [image for result in results for image in pictures_in(result)][:number]
        save_picture(grid(pictures), path, told)
        return len(pictures)
    tensors = torch.cat([torch.as_tensor(result) for result in results])[:number]
    if path.suffix == ".npy":
        _replace(path, lambda file: np.save(file, tensors.numpy()))
    else:
        _replace(path, lambda file: torch.save(tensors, file))
    return len(tensors)


def _replace(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write to a temporary file in the same folder, then rename it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            write(file)
    except (OSError, RuntimeError) as error:  # torch raises a RuntimeError for a full disk
        reason = getattr(error, "strerror", None) or first_line(error)
        raise DiffoptError(f"{path}: cannot be written: {reason}") from error
