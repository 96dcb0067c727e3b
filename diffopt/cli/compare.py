"""`diffopt compare`: the images of several engines, side by side and in numbers."""

from __future__ import annotations

import logging
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
from diffopt.cli.flags import CompareFlags
from diffopt.core.equivalence import difference
from diffopt.errors import DiffoptError
from diffopt.host import outputs
from diffopt.progress import Progress, within

log = logging.getLogger("diffopt")


@dataclass(frozen=True)
class Distance:
    """The distance of a file's images from those of the first file.

    Attributes:
        file: As the user wrote it.
        relative: Norm of the difference over the norm of the first file's images.
        max_abs: Largest difference of any value, of values from 0 to 1.
        psnr: In decibels; infinite for equal images.
        features: Mean `image_metrics.feature_distance`; None without the extra `quality`.
    """

    file: str
    relative: float
    max_abs: float
    psnr: float
    features: float | None


def run(
    flags: CompareFlags,
    prompts: Sequence[str],
    arguments: Mapping[str, Any],
    seed: int | None,
) -> None:
    """Sample the same images with every file, write them to a picture, and print the distances."""
    files, output = flags.files, flags.output
    _check(files, output)
    calls = [{**arguments, "prompt": text} for text in prompts] or [dict(arguments)]
    images: list[Tensor] = []
    built: dict[str, tuple[Path, Mapping[str, str]]] = {}
    with show.progress("comparing") as progress:
        for file in files:
            loaded = run_command.load_file(file)
            _warn_of_other_weights(file, run_command.provenance(loaded), built)
            images.append(_sample(file, loaded, calls, seed, flags.number, progress))
            if images[-1].shape != images[0].shape:
                raise DiffoptError(
                    f"{file} makes images of the shape {list(images[-1].shape[1:])} and {files[0]}"
                    f" of {list(images[0].shape[1:])}: they cannot be compared"
                )
        progress("measuring", None)
        rows = _distances(files, images)
    names = [file.name for file in files]
    if len(set(names)) < len(names):
        names = [str(file) for file in files]
    heads = [f"{n}\nrelative {row.relative:.3g}" for n, row in zip(names, rows, strict=True)]
    image_files.save_picture(image_files.columns(heads, [_pictures(m) for m in images]), output)
    _print(rows, prompts, seed or 0, flags)
    show.stderr().print(f"wrote {output} ({len(files)} × {len(images[0])} images)")


def _check(files: Sequence[Path], output: Path) -> None:
    """Raise a `DiffoptError` for wrong file names, before anything is loaded."""
    if len(files) < 2:
        raise DiffoptError(f"compare wants two files or more, got only {files[0]}")
    if output.suffix not in image_files.PICTURES:
        known = ", ".join(image_files.PICTURES)
        raise DiffoptError(f"'{output}' is no picture: its name must end in one of {known}")
    for file in files:
        if not file.is_file():
            raise DiffoptError(f"there is no file {file}")


def _warn_of_other_weights(
    file: Path, about: Mapping[str, Any], built: dict[str, tuple[Path, Mapping[str, str]]]
) -> None:
    """Warn where files of one model were built from other weights or settings of a module."""
    source, digests = about["source"], about.get("digests", {})
    first, known = built.setdefault(source, (file, digests))
    names = sorted(name for name in known.keys() & digests.keys() if known[name] != digests[name])
    if source and names:
        log.warning("%s and %s were built from other weights of %s", first, file, ", ".join(names))


def _sample(
    file: Path,
    loaded: Any,
    calls: Sequence[Mapping[str, Any]],
    seed: int | None,
    number: int,
    progress: Progress,
) -> Tensor:
    """Return the images of all calls as one tensor (…, channels, height, width)."""
    images = []
    for index, call in enumerate(calls):
        part = within(progress, 0, 1, f"{file}: prompt {index + 1} of {len(calls)}, ")
        results = run_command.sample(
            loaded, {**call, **image_files.as_tensors(loaded)}, seed, number, part
        )
        images.append(torch.cat([torch.as_tensor(result) for result in results])[:number])
    result = torch.cat(images)
    if result.ndim < 4 or result.shape[-3] not in (1, 3, 4):
        raise DiffoptError(f"{file} makes no pictures, but values of {list(result.shape[1:])}")
    return result


def _distances(files: Sequence[Path], images: Sequence[Tensor]) -> list[Distance]:
    """Return the distance of each file's images from those of the first."""
    features = list(map(_features, images))
    rows = []
    for file, tensor, feature in zip(files, images, features, strict=True):
        largest, relative = difference([tensor], [images[0]])
        psnr = timing.psnr(tensor.double() - images[0].double())
        distance = None
        if feature is not None and features[0] is not None:
            distance = float(image_metrics.feature_distance(feature, features[0]).mean())
        rows.append(Distance(str(file), relative, largest, psnr, distance))
    return rows


def _features(images: Tensor) -> Tensor | None:
    try:
        return image_metrics.features(images)
    except DiffoptError:  # the extra is not installed, or these are videos
        return None


def _pictures(images: Tensor) -> list[Image.Image]:
    """Return the images, or all frames of videos, one after another."""
    values = images.flatten(0, -4).movedim(-3, -1).float().nan_to_num().clamp(0, 1)
    pictures: list[Image.Image] = outputs.to_images(np.asarray(values), "pil")
    return pictures


def _print(
    rows: Sequence[Distance], prompts: Sequence[str], seed: int, flags: CompareFlags
) -> None:
    if flags.as_json:
        seeds = [seed + index for index in range(flags.number)]
        results = [asdict(row) for row in rows]
        show.print_json({"prompts": list(prompts), "seeds": seeds, "results": results})
        return
    count = flags.number * max(1, len(prompts))
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
