"""Selects layers by patterns of module paths, with or without their component's name."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Sequence

from diffopt.errors import DiffoptError
from diffopt.spec import suggest


class ModuleFilter:
    """Match module paths against `fnmatch` patterns, and record which patterns ever matched."""

    def __init__(self, include: Sequence[str], exclude: Sequence[str] = ()) -> None:
        self._include, self._exclude = include, exclude
        self._used: set[str] = set()
        self._seen: dict[str, None] = {}

    def matches(self, component: str, path: str) -> bool:
        """Tell whether a module is included and not excluded."""
        self._seen[path] = None
        names = (path, f"{component}.{path}")
        included, excluded = (
            {p for p in patterns if any(fnmatch.fnmatchcase(name, p) for name in names)}
            for patterns in (self._include, self._exclude)
        )
        self._used |= included | excluded
        return bool(included) and not excluded

    def check(self, noun: str, components: Collection[str]) -> None:
        """Raise a `DiffoptError` for a pattern that matched nothing; `noun` is "module", say."""
        for pattern in (*self._include, *self._exclude):
            if pattern == "*" or pattern in self._used:
                continue
            paths = list(self._seen)
            hint = suggest(pattern, paths) if len(paths) <= 20 else ""
            if not hint and paths:
                hint = f"; modules are called like {paths[len(paths) // 2]}"
            raise DiffoptError(f"no {noun} of {', '.join(components)} matches '{pattern}'{hint}")
