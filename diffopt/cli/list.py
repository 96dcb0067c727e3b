"""`diffopt passes` and `diffopt targets`: their names, options and descriptions."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

from diffopt import spec
from diffopt.cli import output as show
from diffopt.core import find_pass, pass_names
from diffopt.errors import DiffoptError
from diffopt.lowering import target
from diffopt.lowering.hardware import FORMATS, SPARSE, Hardware, hardware, hardware_names
from diffopt.lowering.target import find_target, lowerings, target_names


def passes(name: str | None, as_json: bool) -> None:
    """Print all passes, or one with its options."""
    names = pass_names() if name is None else [name]
    rows = [
        {
            "name": each,
            "kind": "exact" if cls.exact else "approximate",
            "needs": cls().needs(),
            **_facts(cls),
        }
        for each, cls in ((each, find_pass(each)) for each in names)
    ]
    if as_json:
        show.print_json(rows)
    elif name is None:
        rows = [{**row, "needs by default": row["needs"]} for row in rows]
        _print_list("passes", ["name", "kind", "needs by default", "summary"], rows)
    else:
        _print_one(rows[0])


def targets(name: str | None, as_json: bool) -> None:
    """Print all lowerings and devices, or those called `name`, which can be one of each."""
    known = {*target_names(), *hardware_names()}
    if name is not None and name not in known:
        raise DiffoptError(f"there is no target '{name}'{spec.suggest(name, known)}")
    rows = [_lowering(each) for each in target_names() if name in (None, each)]
    devices = [hardware(each) for each in hardware_names() if name in (None, each)]
    if as_json:
        show.print_json([*rows, *map(_device, devices)])
    elif name is None:
        lists = [{**row, "devices": ", ".join(row["devices"])} for row in rows]
        _print_list("lowerings", ["name", "summary", "devices"], lists)
        _print_devices(devices)
    else:
        for row in rows:
            _print_one(row)
        for device in devices:
            _print_device(device)


def _lowering(name: str) -> dict[str, Any]:
    cls = find_target(name)
    return {"name": name, "kind": "lowering", **_facts(cls), "devices": target.devices(cls)}


def _device(device: Hardware) -> dict[str, Any]:
    facts = {**device.to_json(), "programmed": device.kind, "lowerings": lowerings(device)}
    return {**facts, "kind": "device"}


def _facts(cls: Any) -> dict[str, Any]:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    facts = {
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
        facts["choices"] = [{"name": w, **_facts(kind[1].find(w))} for w in kind[1].words()]
    return facts


def _print_list(title: str, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    show.table(title, columns, [[row[key] for key in columns] for row in rows])


def _print_one(row: dict[str, Any]) -> None:
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


def _print_devices(devices: Sequence[Hardware]) -> None:
    columns = ["device", "GB", "GB/s", *FORMATS, SPARSE]
    rows = [
        [
            device.name,
            *(f"{value / 1e9:.4g}" for value in (device.memory, device.bandwidth)),
            *(f"{device.peak[n] / 1e12:.4g}" if n in device.peak else "" for n in FORMATS),
            "yes" if device.sparsity else "",
        ]
        for device in devices
    ]
    show.table("devices: 10¹² operations a second by format, dense, at most", columns, rows)


def _print_device(device: Hardware) -> None:
    facts = {
        "memory": f"{device.memory / 1e9:.4g} GB",
        "bandwidth": f"{device.bandwidth / 1e9:.4g} GB/s",
    }
    if device.capability is not None:
        facts["compute capability"] = ".".join(map(str, device.capability))
    if device.cores:
        facts["cores"] = str(device.cores)
    for number in FORMATS:
        if number in device.peak:
            facts[number] = (
                f"{device.peak[number] / 1e12:.4g}·10¹² operations a second, dense, at most"
            )
    for number in (*FORMATS, SPARSE):
        if reason := device.lacks(number):
            facts[number] = reason + ("; may hold weights" if device.can_store(number) else "")
    facts.setdefault(SPARSE, "products of weights with two zeros in every four")
    names = [f"{device.name}:{n}" if n != device.kind else device.name for n in lowerings(device)]
    facts["targets"] = ", ".join(names) or "no lowering takes it"
    show.table(
        f"device {device.name}: {device.title}",
        ["fact", "description"],
        [[*p] for p in facts.items()],
    )
    for source in device.sources:
        show.stdout().print(f"source: {source}", markup=False)
