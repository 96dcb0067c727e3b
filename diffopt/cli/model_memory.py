"""Refuses a pipeline whose weights do not fit into memory, before they are read."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from diffopt.errors import DiffoptError, first_line

_TYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_STORED = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def check(folder: Path, name: str, dtype: torch.dtype) -> None:
    """Refuse a diffusers directory that takes more memory than is free.

    Weights that are stored in the type are mapped from their files, and take none.

    Args:
        folder: The directory.
        name: The type, as the command line names it.
        dtype: The type to load weights in.
    """
    stored: dict[str, int] = {}
    for file in _weight_files(folder):
        for kind, numbers in _numbers(file):
            stored[kind] = stored.get(kind, 0) + numbers
    needed = sum(n * dtype.itemsize for kind, n in stored.items() if kind != _STORED[dtype])
    free = _free_memory()
    if free is None or needed <= free:
        return
    most = max(stored, key=lambda kind: stored[kind])
    options = {"BF16": "bf16", "F32": "fp32", "F16": "fp16"}
    advice = f"--dtype {options[most]} maps them as they are stored" if most in options else ""
    raise DiffoptError(
        f"{folder}: its weights in {name} take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of"
        f" memory are free: {advice or 'take a machine with more'}"
    )


def _weight_files(folder: Path) -> list[Path]:
    """Return the files of weights that diffusers reads: not those of variants, as `x.fp16.…`."""
    files = sorted(folder.glob("*/*.safetensors"))
    return [file for file in files if file.name.count(".") == 1]


def _numbers(file: Path) -> Iterator[tuple[str, int]]:
    """Yield the type and the number of elements of each float tensor in a safetensors file."""
    try:
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            header: dict[str, Any] = json.loads(stream.read(size))
    except (OSError, ValueError, struct.error) as error:
        raise DiffoptError(f"{file} cannot be read: {first_line(error)}") from error
    for key, row in header.items():
        if key != "__metadata__" and row["dtype"] in _TYPES:
            start, end = row["data_offsets"]
            yield row["dtype"], (end - start) // _TYPES[row["dtype"]]


def _free_memory() -> int | None:
    """Return the bytes that are free, or None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    rows = dict(line.split(":") for line in lines)
    return int(rows["MemAvailable"].split()[0]) * 1024
