"""The content-addressed cache: an entry's key is the hash of everything that it depends on.

There are two kinds of entries: compiled kernels, and measurements (see `measurement_cache`).

An entry is a container with checksums, written atomically; a damaged one counts as none. Removing
the folder is always safe.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffopt.errors import DiffoptError
from diffopt.storage import container

log = logging.getLogger("diffopt")


def folder() -> Path:
    """Return the cache's folder: $DIFFOPT_CACHE, or diffopt in the user's cache folder."""
    if path := os.environ.get("DIFFOPT_CACHE"):
        return Path(path)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "diffopt")


def key(parts: Mapping[str, Any]) -> str:
    """Return the key of an entry that depends on `parts` (JSON)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def get(name: str, kind: str = "kernel") -> dict[str, bytes] | None:
    """Return the members of the entry with the key `name`; None if there is no intact one."""
    path = _path(name, kind)
    try:
        entry = container.Archive(path, _media(kind), "a cache entry", "remove it")
        entry.verify()
    except DiffoptError as error:
        if path.exists():
            log.warning("cache: %s; making it again", error)
        return None
    return {member: bytes(entry.read(member)) for member in entry.manifest["members"]}


def put(name: str, members: Mapping[str, bytes], kind: str = "kernel") -> None:
    """Write an entry with the key `name`; a cache that cannot be written to is a warning."""
    path = _path(name, kind)
    contents = {member: [content] for member, content in members.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        container.write(path, _media(kind), {}, contents)
    except OSError as error:
        log.warning("cache: %s cannot be written: %s", path, error.strerror)


def _path(name: str, kind: str = "kernel") -> Path:
    return folder() / f"{kind}s" / name[:2] / f"{name}.zip"


def _media(kind: str) -> str:
    return f"application/x-diffopt-{kind}"
