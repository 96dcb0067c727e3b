"""The content-addressed cache of kernels: a key is the hash of all that a kernel depends on.

An entry is a checksummed container (see `archive`), written atomically: a broken one is the same as
none. Removing the folder is always safe.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffopt import archive
from diffopt.errors import DiffoptError

KIND = "application/x-diffopt-kernel"

log = logging.getLogger("diffopt")


def folder() -> Path:
    """Return where entries are kept: $DIFFOPT_CACHE, or diffopt in the user's cache folder."""
    if chosen := os.environ.get("DIFFOPT_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "diffopt")


def key(parts: Mapping[str, Any]) -> str:
    """Return the key of what `parts` (JSON) determine."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def get(name: str) -> dict[str, bytes] | None:
    """Return the members of the entry with this key; None if there is no intact one."""
    try:
        entry = archive.Archive(_path(name), KIND, "a cache entry", "remove it")
        entry.verify()
    except DiffoptError as error:
        if _path(name).exists():
            log.warning("cache: %s; compiling again", error)
        return None
    return {member: bytes(entry.read(member)) for member in entry.manifest["members"]}


def put(name: str, members: Mapping[str, bytes]) -> None:
    """Keep `members` under a key; a cache that cannot be written to is a warning."""
    path = _path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        archive.write(path, KIND, {}, {member: [content] for member, content in members.items()})
    except OSError as error:
        log.warning("cache: %s cannot be written: %s", path, error.strerror)


def _path(name: str) -> Path:
    return folder() / "kernels" / name[:2] / f"{name}.zip"
