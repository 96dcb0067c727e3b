"""Which layers a pass takes: patterns of module paths, with or without their component's name."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Sequence

from diffopt.errors import DiffoptError
from diffopt.spec import suggest


class Patterns:
    """Tells which paths are wanted, and remembers which patterns have matched one."""

    def __init__(self, wanted: Sequence[str], unwanted: Sequence[str] = ()) -> None:
        self._wanted, self._unwanted = wanted, unwanted
        self._used: set[str] = set()
        self._seen: dict[str, None] = {}

    def wants(self, component: str, path: str) -> bool:
        """Tell whether a module of a component is to be rewritten."""
        self._seen[path] = None
        names = (path, f"{component}.{path}")
        yes, no = (
            {p for p in patterns if any(fnmatch.fnmatchcase(name, p) for name in names)}
            for patterns in (self._wanted, self._unwanted)
        )
        self._used |= yes | no
        return bool(yes) and not no

    def check(self, what: str, components: Collection[str]) -> None:
        """Raise if a pattern has matched nothing; `what` says of what."""
        for pattern in (*self._wanted, *self._unwanted):
            if pattern == "*" or pattern in self._used:
                continue
            paths = list(self._seen)
            hint = suggest(pattern, paths) if len(paths) <= 20 else ""
            if not hint and paths:
                hint = f"; modules are called like {paths[len(paths) // 2]}"
            raise DiffoptError(f"no {what} of {', '.join(components)} matches '{pattern}'{hint}")
