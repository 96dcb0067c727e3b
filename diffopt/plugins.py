"""Finds passes, targets and policies by name: one file each in a package, or an entry point."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from diffopt import spec
from diffopt.errors import DiffoptError


def sources(package: str, plural: str, group: str | None = None) -> dict[str, str]:
    """Map the name of each to where it is, as "module:class", without importing any.

    Args:
        package: The name of a package of which each module is one: as text, since it is above
            what asks for it.
        plural: What error messages call them.
        group: The group of entry points; by default it is called as the package.
    """
    found = {}
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        camel = "".join(map(str.capitalize, module.name.split("_")))
        found[module.name.replace("_", "-")] = f"{package}.{module.name}:{camel}"
    return add_entries(found, group or package, plural)


def add_entries(found: dict[str, str], group: str, plural: str) -> dict[str, str]:
    """Add the entry points of a group to what is known by name; two of one name are an error."""
    for entry in entry_points(group=group):
        if found.setdefault(entry.name, entry.value) != entry.value:
            raise DiffoptError(
                f"two {plural} are called '{entry.name}': {found[entry.name]} and {entry.value};"
                " uninstall or rename one"
            )
    return found


def load(place: str) -> Any:
    """Return what is at a place, "module:name"."""
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


def find(name: str, known: Mapping[str, str], base: type[Any], noun: str) -> Any:
    """Return the subclass of `base` called `name`, of those in `known`."""
    if name not in known:
        raise DiffoptError(f"there is no {noun} '{name}'{spec.suggest(name, known)}")
    found = load(known[name])
    is_one = isinstance(found, type) and issubclass(found, base)
    if not is_one or found.name != name:
        raise DiffoptError(f"{known[name]} is not a {base.__name__} named '{name}'")
    return found
