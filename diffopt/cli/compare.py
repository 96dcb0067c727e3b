"""`diffopt compare`: the images of several engines, side by side and in numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffopt.cli import image_files, image_metrics, timing
from diffopt.cli import output as show
from diffopt.cli import run as run_command
from diffopt.core.equivalence import difference
from diffopt.errors import DiffoptError
from diffopt.host import outputs
from diffopt.progress import Progress, within


@dataclass(frozen=True)
class Distance:
    """Say how far a file's images are from those of the first file.

    Attributes:
        file: As the user wrote it.
        relative: Norm of the difference over the norm of the first file's images.
        max_abs: Largest difference of any value, which goes from 0 to 1.
        psnr: In decibels; infinite for equal images.
        features: Mean `metrics.feature_distance`; None without the extra `quality`.
    """

    file: str
    relative: float
    max_abs: float
    psnr: float
    features: float | None


def run(
    files: Sequence[Path],
    output: Path,
    prompts: Sequence[str],
    arguments: Mapping[str, Any],
    seed: int,
    number: int,
    as_json: bool,
) -> None:
    """Make the same images with every file; write them to `output`, and print the distances."""
    _check(files, output)
    calls = [{**arguments, "prompt": text} for text in prompts] or [dict(arguments)]
    made: list[Tensor] = []
    with show.progress("comparing") as progress:
        for file in files:
            made.append(_make(file, calls, seed, number, progress))
            if made[-1].shape != made[0].shape:
                raise DiffoptError(
                    f"{file} makes images of the shape {list(made[-1].shape[1:])} and {files[0]}"
                    f" of {list(made[0].shape[1:])}: they cannot be compared"
                )
        progress("measuring", None)
        rows = _distances(files, made)
    names = [file.name for file in files]
    if len(set(names)) < len(names):
        names = [str(file) for file in files]
    heads = [f"{n}\nrelative {row.relative:.3g}" for n, row in zip(names, rows, strict=True)]
    image_files.save_picture(image_files.columns(heads, [_pictures(m) for m in made]), output)
    _print(rows, prompts, seed, number, as_json)
    show.stderr().print(f"wrote {output} ({len(files)} × {len(made[0])} images)")


def _check(files: Sequence[Path], output: Path) -> None:
    """Refuse what can be seen to be wrong before anything is loaded."""
    if len(files) < 2:
        raise DiffoptError(f"compare wants two files or more, got only {files[0]}")
    if output.suffix not in image_files.PICTURES:
        known = ", ".join(image_files.PICTURES)
        raise DiffoptError(f"'{output}' is no picture: its name must end in one of {known}")
    for file in files:
        if not file.is_file():
            raise DiffoptError(f"there is no file {file}")


def _make(
    file: Path, calls: Sequence[Mapping[str, Any]], seed: int, number: int, progress: Progress
) -> Tensor:
    """Return the images of all calls as one tensor (…, channels, height, width)."""
    loaded = run_command.load(file)
    made = []
    for index, call in enumerate(calls):
        told = within(progress, 0, 1, f"{file}: prompt {index + 1} of {len(calls)}, ")
        results = run_command.make(loaded, {**call, "output_type": "pt"}, seed, number, told)
        made.append(torch.cat([torch.as_tensor(result) for result in results])[:number])
    whole = torch.cat(made)
    if whole.ndim < 4 or whole.shape[-3] not in (1, 3, 4):
        raise DiffoptError(f"{file} makes no pictures, but values of {list(whole.shape[1:])}")
    return whole


def _distances(files: Sequence[Path], made: Sequence[Tensor]) -> list[Distance]:
    """Return each file's distance from the first."""
    features = [_features(images) for images in made]
    rows = []
    for file, own, found in zip(files, made, features, strict=True):
        largest, relative = difference([own], [made[0]])
        psnr = timing.psnr(own.double() - made[0].double())
        apart = None
        if found is not None and features[0] is not None:
            apart = float(image_metrics.feature_distance(found, features[0]).mean())
        rows.append(Distance(str(file), relative, largest, psnr, apart))
    return rows


def _features(made: Tensor) -> Tensor | None:
    try:
        return image_metrics.features(made)
    except DiffoptError:  # the extra is not installed, or these are videos
        return None


def _pictures(made: Tensor) -> list[Image.Image]:
    """Return the images, or every frame of videos, one after another."""
    values = made.flatten(0, -4).movedim(-3, -1).float().nan_to_num().clamp(0, 1)
    pictures: list[Image.Image] = outputs.to_images(np.asarray(values), "pil")
    return pictures


def _print(
    rows: Sequence[Distance], prompts: Sequence[str], seed: int, number: int, as_json: bool
) -> None:
    if as_json:
        seeds = list(range(seed, seed + number))
        told = {"prompts": list(prompts), "seeds": seeds, "results": [asdict(row) for row in rows]}
        show.print_json(told)
        return
    count = number * max(1, len(prompts))
    show.table(
        f"{count} image{'s' if count != 1 else ''} of each, against those of {rows[0].file}",
        ["file", "relative error", "max abs", "PSNR dB", "feature distance"],
        [
            [
                row.file,
                f"{row.relative:.3g}",
                f"{row.max_abs:.3g}",
                f"{row.psnr:.1f}",
                "-" if row.features is None else f"{row.features:.3g}",
            ]
            for row in rows
        ],
    )
