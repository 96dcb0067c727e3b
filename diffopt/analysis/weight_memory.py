"""Count the memory of a program's weights, by number format, and compare it with float16."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.ir import graph as g
from diffopt.ir import qdq
from diffopt.ir.nodes import args, is_call, stored_tensor
from diffopt.ir.program import Program

SCALES = "scales"
"""What the scales and zero points of quantized values are listed as."""


@dataclass(frozen=True)
class Footprint:
    """The memory of weights.

    Attributes:
        elements: Numbers of weights by format, without scales and zero points.
        bytes: Stored bytes, by format.
        fp16: Bytes if every weight had 2.
    """

    elements: dict[str, int]
    bytes: dict[str, int]
    fp16: int

    @property
    def total(self) -> int:
        """The stored bytes of all formats."""
        return sum(self.bytes.values())

    @property
    def ratio(self) -> float:
        """The stored bytes as a fraction of float16's."""
        return self.total / self.fp16 if self.fp16 else 1.0

    def to_json(self) -> dict[str, Any]:
        """Return the numbers as JSON."""
        rows = {n: {"elements": self.elements[n], "bytes": self.bytes[n]} for n in self.bytes}
        return {"bytes": self.total, "fp16 bytes": self.fp16, "formats": rows}

    def __str__(self) -> str:
        return f"weights {self.total / 1e6:.1f} MB, {100 * self.ratio:.0f} % of fp16"


@dataclass(frozen=True)
class _Entry:
    name: str
    format: str
    elements: int
    shape: tuple[int, ...]


def of_program(program: Program) -> Footprint:
    """Count the weights and constants of all graphs, shared ones once."""
    return of_graphs(program.graphs.values())


def of_graphs(bodies: Iterable[fx.GraphModule]) -> Footprint:
    """Count the weights and constants of some graphs, shared ones once."""
    tensors: dict[int, Tensor] = {}
    entries: dict[int, _Entry] = {}
    for gm in bodies:
        quantized = _quantized(gm)
        for name, tensor in g.named_tensors(gm):
            tensors[id(tensor)] = tensor
            plain = _Entry(name, _name(tensor.dtype), tensor.numel(), tuple(tensor.shape))
            if id(tensor) in quantized or id(tensor) not in entries:
                entries[id(tensor)] = quantized.get(id(tensor), plain)
    elements: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for key, entry in sorted(entries.items(), key=lambda item: item[1].format):
        elements[entry.format] = elements.get(entry.format, 0) + entry.elements
        sizes[entry.format] = sizes.get(entry.format, 0) + tensors[key].nbytes
    return Footprint(elements, sizes, _fp16_bytes(tensors, entries))


def _fp16_bytes(tensors: dict[int, Tensor], entries: dict[int, _Entry]) -> int:
    """Return the bytes of weights at 2 bytes each, and of the rest as it is.

    A weight that is stored in several formats, for different steps, counts once.
    """
    formats: dict[tuple[str, tuple[int, ...]], str] = {}
    total = 0
    for key, own in sorted(entries.items(), key=lambda item: item[1].format not in _FLOATS):
        is_float = own.format in _FLOATS
        if own.format == SCALES:
            continue
        if not is_float and own.format not in _QUANTIZED:
            total += tensors[key].nbytes
        elif formats.setdefault((own.name, own.shape), own.format) == own.format or is_float:
            total += 2 * own.elements
    return total


_FLOATS = ("float64", "float32", "float16", "bfloat16")
_QUANTIZED = ("int8", "int4", "fp8")


def _quantized(gm: fx.GraphModule) -> dict[int, _Entry]:
    """Return the tensors of quantized weights and of scales, by identity."""
    entries: dict[int, _Entry] = {}
    for node in gm.graph.nodes:
        if (activation := qdq.activation(node)) is not None:
            scales = [n for n in (activation.scale, activation.zero) if n is not None]
            entries |= {id(stored_tensor(gm, n)): _scale(n) for n in scales if n.op == "get_attr"}
        if (weight := qdq.weight(node)) is not None:
            numbers = g.ancestors([weight.values])
            for source in g.ancestors([node]):
                if source.op == "get_attr":
                    entries[id(stored_tensor(gm, source))] = _scale(source)
            for source in numbers:
                if source.op == "get_attr" and _is_number(source.meta["val"]):
                    entries[id(stored_tensor(gm, source))] = _weight(source, weight)
    return entries


def _is_number(value: Tensor) -> bool:
    return value.dtype in (torch.int8, torch.uint8, qdq.FP8)


def _scale(source: fx.Node) -> _Entry:
    return _Entry(str(source.target), SCALES, 0, ())


def _weight(source: fx.Node, weight: qdq.Weight) -> _Entry:
    shape = tuple(source.meta["val"].shape)
    kind: str = "fp8" if weight.number == "fp8" else "int8"
    for user in source.users:
        if is_call(user, torch.ops.diffopt.unpack_int4.default):
            kind, shape = "int4", tuple(args(user)[1])
    # `qdq.place_weight` names the numbers after the weight that they stand for.
    name = re.sub(rf"_{kind}(?=(_\d+)?$)", "", str(source.target))
    return _Entry(name, kind, prod(shape), shape)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
