"""Checkpoints of a training, written atomically."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from diffopt.errors import DiffoptError
from diffopt.storage import container

log = logging.getLogger("diffopt")

_KIND = "application/x-diffopt-checkpoint"
_STATE = "state.safetensors"


def save(path: Path, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint; a folder that cannot be written to is a warning."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        container.write(path, _KIND, manifest, {_STATE: container.pack_tensors(tensors)})
    except OSError as error:
        log.warning("%s: the checkpoint cannot be written: %s", path, error.strerror)


def load(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Return what `save` wrote; None if there is no intact file."""
    if not path.exists():
        return None
    try:
        file = container.Archive(path, _KIND, "a checkpoint", "remove it", "remove it")
        file.verify()
    except DiffoptError as error:
        log.warning("%s; beginning again", error)
        return None
    # Copies: the file is replaced while its state is trained on.
    return file.manifest, {key: t.clone() for key, t in file.tensors(_STATE).items()}
