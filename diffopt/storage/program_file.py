"""The file of a program: JSON, safetensors and assets in one container, without pickle."""

import json
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffopt.errors import DiffoptError
from diffopt.storage import container

KIND = "application/x-diffopt-program"
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
        "program.json": [json.dumps(data).encode()],
        **{f"assets/{name}": [content] for name, content in assets.items()},
        "weights.safetensors": container.pack_tensors(tensors),
    }
    try:
        container.write(path, KIND, {}, members, compress)
    except OSError as error:
        raise DiffoptError(f"{os.fspath(path)}: cannot be written: {error.strerror}") from None


def read(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, bytes]]:
    """Return what `write` wrote, verified and mapped; another file is a `DiffoptError`."""
    file = container.Archive(path, KIND, "a program file", HINT, "trace it again")
    file.verify()
    data: dict[str, Any] = json.loads(bytes(file.read("program.json")))
    names = file.names("assets/")
    assets = {name.removeprefix("assets/"): bytes(file.read(name)) for name in names}
    return data, file.tensors("weights.safetensors"), assets
