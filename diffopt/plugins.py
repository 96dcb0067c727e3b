"""Finds passes, targets and policies by name: one file each in a package, or an entry point."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from diffopt import spec
from diffopt.errors import DiffoptError


def sources(package: ModuleType, plural: str) -> dict[str, str]:
    """Map the name of each to where it is, as "module:class", without importing any.

    Args:
        package: Each module in it is one; its name is also that of the group of entry points.
        plural: What error messages call them.
    """
    found = {}
    for module in pkgutil.iter_modules(package.__path__):
        camel = "".join(map(str.capitalize, module.name.split("_")))
        found[module.name.replace("_", "-")] = f"{package.__name__}.{module.name}:{camel}"
    for entry in entry_points(group=package.__name__):
        if found.setdefault(entry.name, entry.value) != entry.value:
            raise DiffoptError(
                f"two {plural} are called '{entry.name}': {found[entry.name]} and {entry.value};"
                " uninstall or rename one"
            )
    return found


def find(name: str, known: Mapping[str, str], base: type[Any], noun: str) -> Any:
    """Return the subclass of `base` called `name`, of those in `known`."""
    if name not in known:
        raise DiffoptError(f"there is no {noun} '{name}'{spec.suggest(name, known)}")
    module, _, attribute = known[name].partition(":")
    found: Any = getattr(importlib.import_module(module), attribute)
    is_one = isinstance(found, type) and issubclass(found, base)
    if not is_one or found.name != name:
        raise DiffoptError(f"{known[name]} is not a {base.__name__} named '{name}'")
    return found
