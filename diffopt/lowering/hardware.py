"""Hardware: the memory of a device, its peak rates, and the formats of numbers that it supports.

Devices are described in `targets/devices.toml`. A package adds one with an entry point of the group
`diffopt.devices`, whose value is a `Hardware`.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, Literal

from diffopt import plugins
from diffopt.errors import DiffoptError
from diffopt.spec import suggest

Kind = Literal["cuda", "cpu", "intel-gpu", "intel-npu"]

FORMATS = ("fp32", "tf32", "fp16", "bf16", "fp8", "int8", "int4", "fp4")

SPARSE = "2:4"
"""Weights of which two in every four are zero."""

# The compute capabilities with products of a format: from (inclusive), to (exclusive).
_CAPABILITIES = {
    "tf32": ((8, 0), None),
    "fp16": ((7, 0), None),
    "bf16": ((8, 0), None),
    "fp8": ((8, 9), None),
    "int8": ((7, 5), None),
    "int4": ((7, 5), (9, 0)),
    "fp4": ((10, 0), None),
    SPARSE: ((8, 0), None),
}


@dataclass(frozen=True)
class Hardware:
    """One device.

    Attributes:
        name: Its name in targets: `h100`.
        title: Its vendor's name.
        kind: How it is programmed; its default lowering has the same name.
        memory: In bytes.
        bandwidth: Of that memory, in bytes a second.
        peak: Dense operations a second by format; it has no products in other formats.
        capability: The compute capability of a CUDA device.
        stored: Formats in which weights may be stored, though it has no products in them.
        sparsity: Whether it has products of 2:4 sparse weights.
        cores: The number of a CPU's cores, to which the figures apply.
        sources: The documents from which the figures are.
    """

    name: str
    title: str
    kind: Kind
    memory: int
    bandwidth: float
    peak: Mapping[str, float] = field(hash=False)
    capability: tuple[int, int] | None = None
    stored: tuple[str, ...] = ()
    sparsity: bool = False
    cores: int = 0
    sources: tuple[str, ...] = ()

    def lacks(self, what: str) -> str | None:
        """Return why there are no products in a format, or of "2:4" sparse weights, or None.

        >>> hardware("h100").lacks("fp8")
        >>> hardware("a100").lacks("fp8")
        'a100 has no fp8 products: they need compute capability 8.9, and it has 8.0'
        >>> hardware("cpu").lacks("2:4")
        'cpu has no 2:4 sparse products: they need a GPU of compute capability 8.0'
        """
        if what not in (*FORMATS, SPARSE):
            known = suggest(what, (*FORMATS, SPARSE))
            raise DiffoptError(f"there is no format of numbers '{what}'{known}")
        if self.sparsity if what == SPARSE else what in self.peak:
            return None
        products = f"{self.name} has no {what}{' sparse' if what == SPARSE else ''} products"
        since, until = _CAPABILITIES.get(what, (None, None))
        if since is None:
            return products
        needs = ".".join(map(str, since))
        if self.capability is None:
            return f"{products}: they need a GPU of compute capability {needs}"
        capability = ".".join(map(str, self.capability))
        if self.capability < since:
            return f"{products}: they need compute capability {needs}, and it has {capability}"
        if until is not None and self.capability >= until:
            end = ".".join(map(str, until))
            return (
                f"{products}: GPUs lost them with compute capability {end}, and it has {capability}"
            )
        return f"{products}: {self.sources[0]} names none" if self.sources else products

    def rate(self, number: str) -> float:
        """Return operations a second in a format; without products in it, those of the slowest."""
        return self.peak.get(number, min(self.peak.values()))

    def can_store(self, number: str) -> bool:
        """Tell whether weights may be stored in a format."""
        return number in self.peak or number in self.stored

    def with_cores(self, cores: int) -> Hardware:
        """Return a CPU with fewer cores, its rates scaled in proportion."""
        if not self.cores or not 0 < cores < self.cores:
            return self
        ratio = cores / self.cores
        peak = {number: ratio * rate for number, rate in self.peak.items()}
        return dataclasses.replace(self, cores=cores, peak=peak, bandwidth=ratio * self.bandwidth)

    def to_json(self) -> dict[str, Any]:
        """Return the description as JSON."""
        return dataclasses.asdict(self)


def hardware_names() -> list[str]:
    """Return the names of all devices."""
    return sorted(_sources())


def hardware(name: str) -> Hardware:
    """Return the device called `name`."""
    if name not in _sources():
        raise DiffoptError(f"there is no device '{name}'{suggest(name, hardware_names())}")
    if name in _descriptions():
        return _descriptions()[name]
    device = plugins.import_object(_sources()[name])
    if not isinstance(device, Hardware) or device.name != name:
        raise DiffoptError(f"{_sources()[name]} is not a Hardware named '{name}'")
    return device


@cache
def _sources() -> dict[str, str]:
    """Map the name of each device to the place of its description."""
    builtin = dict.fromkeys(_descriptions(), "targets/devices.toml")
    return plugins.add_entry_points(builtin, "diffopt.devices", "devices")


@cache
def _descriptions() -> dict[str, Hardware]:
    text = resources.files("diffopt.targets").joinpath("devices.toml").read_text("utf-8")
    return {name: _read(name, row) for name, row in tomllib.loads(text).items()}


def _read(name: str, row: Mapping[str, Any]) -> Hardware:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
    values["memory"] = int(values["memory"])
    return Hardware(name=name, **values)
