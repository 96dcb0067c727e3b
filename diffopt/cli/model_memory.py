"""Refuses a pipeline whose weights do not fit into memory, before they are read."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from diffopt.errors import DiffoptError, first_line

# Of the types that safetensors names: those that --dtype has.
_OPTIONS = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
_FLOATS = {*_OPTIONS, "F64"}


def check(folder: Path, name: str, dtype: torch.dtype) -> None:
    """Refuse a diffusers directory that takes more memory than is free.

    Weights that are stored in the type are mapped from their files, and take none.

    Args:
        folder: The directory.
        name: The type, as the command line names it.
        dtype: The type to load weights in.
    """
    stored: Counter[str] = Counter()
    for file in _weight_files(folder):
        stored += _numbers(file)
    needed = sum(n * dtype.itemsize for kind, n in stored.items() if _OPTIONS.get(kind) != name)
    free = _free_memory()
    if free is None or needed <= free:
        return
    ((most, _),) = stored.most_common(1)
    advice = "take a machine with more"
    if most in _OPTIONS:
        advice = f"--dtype {_OPTIONS[most]} maps them as they are stored"
    raise DiffoptError(
        f"{folder}: its weights in {name} take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of"
        f" memory are free: {advice}"
    )


def _weight_files(folder: Path) -> list[Path]:
    """Return the files of weights that diffusers reads: not those of variants, as `x.fp16.…`."""
    files = sorted(folder.glob("*/*.safetensors"))
    return [file for file in files if file.name.count(".") == 1]


def _numbers(file: Path) -> Counter[str]:
    """Return the number of elements of each float type in a safetensors file."""
    counts: Counter[str] = Counter()
    try:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (it is no dictionary)
                tensor = tensors.get_slice(key)
                counts[tensor.get_dtype()] += math.prod(tensor.get_shape())
    except (OSError, SafetensorError) as error:
        raise DiffoptError(f"{file} cannot be read: {first_line(error)}") from error
    return Counter({kind: number for kind, number in counts.items() if kind in _FLOATS})


def _free_memory() -> int | None:
    """Return the bytes that are free, or None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    rows = dict(line.split(":") for line in lines)
    return int(rows["MemAvailable"].split()[0]) * 1024
