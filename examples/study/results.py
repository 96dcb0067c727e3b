"""The JSON file of the measurements."""

import fcntl
import json
from pathlib import Path
from typing import Any


class Results:
    """The JSON file; several processes may add to it."""

    def __init__(self, path: Path, lock: Path) -> None:
        self.path = path
        self._lock = lock

    def read(self) -> dict[str, Any]:
        """Return all results."""
        data: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        return data

    def put(self, value: Any, *keys: str) -> None:
        """Set one value, at a path of keys."""
        with self._lock.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            data = self.read()
            inner = data
            for key in keys[:-1]:
                inner = inner.setdefault(key, {})
            inner[keys[-1]] = value
            new = self.path.with_suffix(".new")
            new.write_text(json.dumps(data, indent=1) + "\n")
            new.replace(self.path)

    def get(self, *keys: str) -> Any:
        """Return the value at a path of keys; None where there is none."""
        value: Any = self.read()
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value
