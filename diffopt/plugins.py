"""Finds passes, targets and policies by name: a module of a package each, or an entry point."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from diffopt import spec
from diffopt.errors import DiffoptError


def sources(package: str, plural: str, group: str | None = None) -> dict[str, str]:
    """Return the "module:class" of each plugin by name, without importing any.

    Args:
        package: The package whose modules are the plugins: by name, since it is on a layer above.
        plural: What error messages call them.
        group: The group of entry points; by default the package's name.
    """
    known = {}
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        camel = "".join(map(str.capitalize, module.name.split("_")))
        known[module.name.replace("_", "-")] = f"{package}.{module.name}:{camel}"
    return add_entry_points(known, group or package, plural)


def add_entry_points(known: dict[str, str], group: str, plural: str) -> dict[str, str]:
    """Add the entry points of a group to the known plugins; a name used twice is an error."""
    for entry in entry_points(group=group):
        if known.setdefault(entry.name, entry.value) != entry.value:
            raise DiffoptError(
                f"two {plural} are called '{entry.name}': {known[entry.name]} and {entry.value};"
                " uninstall or rename one"
            )
    return known


def import_object(path: str) -> Any:
    """Import the object with the path "module:name"."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


def find_class(name: str, known: Mapping[str, str], base: type[Any], noun: str) -> Any:
    """Return the subclass of `base` called `name`; `noun` is what error messages call one."""
    if name not in known:
        raise DiffoptError(f"there is no {noun} '{name}'{spec.suggest(name, known)}")
    cls = import_object(known[name])
    is_subclass = isinstance(cls, type) and issubclass(cls, base)
    if not is_subclass or cls.name != name:
        raise DiffoptError(f"{known[name]} is not a {base.__name__} named '{name}'")
    return cls
