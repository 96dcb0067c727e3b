"""What made a picture, kept in the picture: a text in PNG files, which `diffopt inspect` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffopt.errors import DiffoptError
from diffopt.host.schema import describe, plain

KEY = "diffopt"
"""Of the text, which is JSON."""

Record = dict[str, Any]


def record(loaded: Any, arguments: Mapping[str, Any], *, images: int = 1) -> Record:
    """Return what made pictures.

    Args:
        loaded: The engine or program.
        arguments: Of the call; of tensors and pictures the record has but words.
        images: How many the file shows, of this seed and those that follow it.
    """
    told: Record = {
        name: plain(describe(value))
        for name, value in arguments.items()
        if name != "output_type" and value is not None
    }
    if images > 1:
        told["images"] = images
    if not hasattr(loaded, "manifest"):  # a program, of which there is no digest
        return {**told, "passes": ",".join(each["text"] for each in loaded.history)}
    manifest = loaded.manifest
    return {
        **told,
        "engine": loaded.digest(),
        "passes": manifest["passes"],
        "target": manifest["target"],
    }


def as_text(told: Record) -> PngInfo:
    """Return the record as a PNG file takes it."""
    info = PngInfo()
    info.add_itxt(KEY, json.dumps(told))
    return info


def read(path: str | Path) -> Record:
    """Return the record of a PNG file; a `DiffoptError` where it has none."""
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            picture.load()  # the text may be behind the pixels
            text = getattr(picture, "text", {}).get(KEY)
    except FileNotFoundError:
        raise DiffoptError(f"there is no file {path}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise DiffoptError(f"{path}: is no intact PNG file") from None
    try:
        told = json.loads(text or "null")
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise DiffoptError(f"{path}: does not say what made it, as a PNG file of diffopt's does")
    return told
