"""The file of a program: JSON, safetensors and assets in one container, without pickle."""

import json
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffopt.errors import DiffoptError
from diffopt.storage import container, file_schema

KIND = "application/x-diffopt-program"
ASSETS = "assets/"
HINT = "write one with `diffopt trace MODEL -o FILE.program`"


def write(
    path: str | os.PathLike[str],
    data: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    assets: Mapping[str, bytes],
    compress: int | None = None,
) -> None:
    """Write what `Program.to_members` returns, atomically; see `container.write` for `compress`."""
    members: dict[str, container.Buffers] = {
        "program.json": [encoded(data)],
        **{ASSETS + name: [content] for name, content in assets.items()},
        "weights.safetensors": container.pack_tensors(tensors),
    }
    try:
        container.write(path, KIND, {}, members, compress)
    except OSError as error:
        raise DiffoptError(f"{os.fspath(path)}: cannot be written: {error.strerror}") from None


def encoded(data: Mapping[str, Any]) -> bytes:
    """Return a program's JSON; what `members` would refuse is a `DiffoptError`."""
    text = json.dumps(data).encode()
    try:
        file_schema.parse(text, file_schema.ProgramData)
    except ValueError as error:
        raise DiffoptError(f"the program cannot be written to a file: {error}") from None
    return text


def read(path: str | os.PathLike[str]) -> container.Archive:
    """Open what `write` wrote, mapped and not verified; another file is a `DiffoptError`."""
    return container.Archive(path, KIND, "a program file", HINT, "trace it again")


def members(
    file: container.Archive,
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, bytes]]:
    """Return the JSON, tensors and assets of a program in a file."""
    data: dict[str, Any] = file.json("program.json", file_schema.ProgramData)
    return data, file.tensors("weights.safetensors"), assets(file)


def assets(file: container.Archive) -> dict[str, bytes]:
    """Return the files of host components by path."""
    names = file.names(ASSETS)
    return {name.removeprefix(ASSETS): bytes(file.read(name)) for name in names}
