"""The file of a program: JSON, safetensors and assets in one zip archive, without pickle."""

import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from diffopt.errors import DiffoptError


def write(
    path: str | os.PathLike[str],
    data: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    assets: Mapping[str, bytes],
) -> None:
    """Write a program's pieces; the file is whole or is not there."""
    path = Path(path)
    members = {
        "program.json": json.dumps(data).encode(),
        "weights.safetensors": pack_tensors(tensors),
    }
    members |= {f"assets/{name}": content for name, content in assets.items()}
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        try:
            with zipfile.ZipFile(file, "w") as archive:
                for name, content in members.items():
                    archive.writestr(name, content)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def read(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, bytes]]:
    """Return the pieces that `write` wrote; a file that has none is a `DiffoptError`."""
    try:
        with zipfile.ZipFile(path) as archive:
            data = json.loads(archive.read("program.json"))
            tensors = safetensors.torch.load(archive.read("weights.safetensors"))
            names = [n for n in archive.namelist() if n.startswith("assets/")]
            assets = {n.removeprefix("assets/"): archive.read(n) for n in names}
    except FileNotFoundError:
        raise DiffoptError(f"{os.fspath(path)}: no such file") from None
    except IsADirectoryError:
        raise DiffoptError(f"{os.fspath(path)}: is a directory, not a program file") from None
    except (zipfile.BadZipFile, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise DiffoptError(
            f"{os.fspath(path)}: not a whole program file ({error}); write it again "
            "with `diffopt trace`"
        ) from None
    return data, tensors, assets


def pack_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Return tensors as safetensors bytes; the values, made contiguous, without sharing storage."""
    return safetensors.torch.save(
        {name: t.detach().contiguous().clone() for name, t in tensors.items()}
    )
