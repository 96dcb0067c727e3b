"""`diffopt passes` and `diffopt targets`: what there is, and which options it takes."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from diffopt import cli_show as show
from diffopt import spec
from diffopt.core import find_pass, pass_names
from diffopt.target import find_target, target_names


def passes(name: str | None, as_json: bool) -> None:
    """Print all passes, or one with its options."""
    names = pass_names() if name is None else [name]
    rows = [
        {"name": each, "kind": "exact" if cls.exact else "approximate", **_about(cls)}
        for each, cls in ((each, find_pass(each)) for each in names)
    ]
    _print("passes", rows, name is not None, as_json)


def targets(name: str | None, as_json: bool) -> None:
    """Print all targets, or one with its options."""
    names = target_names() if name is None else [name]
    rows = [{"name": each, **_about(find_target(each))} for each in names]
    _print("targets", rows, name is not None, as_json)


def _about(cls: Any) -> dict[str, Any]:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    about = {
        "summary": (inspect.getdoc(cls) or "").partition("\n")[0],
        "description": inspect.getdoc(inspect.getmodule(cls)) or "",
        "options": [
            {
                "name": key.replace("_", "-"),
                "type": spec.describe(hint),
                "default": fields[key].default,
                "help": fields[key].metadata.get("help", ""),
            }
            for key, hint in spec.options(cls).items()
        ],
    }
    kind = spec.choice(cls)
    if kind is not None:
        about["choices"] = [{"name": w, **_about(kind[1].find(w))} for w in kind[1].words()]
    return about


def _print(title: str, rows: list[dict[str, Any]], one: bool, as_json: bool) -> None:
    if as_json:
        show.print_json(rows)
        return
    if not one:
        columns = [key for key in ("name", "kind", "summary") if any(key in row for row in rows)]
        show.table(title, columns, [[row[key] for key in columns] for row in rows])
        return
    (row,) = rows
    show.stdout().print(row["description"], markup=False)
    _print_options(row["name"], row)
    for choice in row.get("choices", ()):
        _print_options(f"{row['name']}({choice['name']}): {choice['summary']}", choice)


def _print_options(title: str, row: dict[str, Any]) -> None:
    options = [
        [option["name"], option["type"], str(option["default"]).lower(), option["help"]]
        for option in row["options"]
    ]
    if options:
        show.table(f"options of {title}", ["option", "type", "default", "help"], options)
