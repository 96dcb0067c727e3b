"""Records of what each pass did: the provenance that programs and engines keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffopt.ir import graph
from diffopt.ir.program import Program


@dataclass(frozen=True)
class Size:
    """Nodes, parameters, bytes of weights and FLOPs of a program."""

    nodes: int
    parameters: int
    bytes: int
    flops: int

    @classmethod
    def of(cls, program: Program) -> Size:
        """Count the nodes of all graphs, distinct weights and their bytes, and FLOPs of a run."""
        weights = program.weights().values()
        return cls(
            nodes=sum(len(gm.graph.nodes) for gm in program.graphs.values()),
            parameters=sum(tensor.numel() for tensor in weights),
            bytes=graph.tensor_bytes(weights),
            flops=program.flops(),
        )


@dataclass(frozen=True)
class Record:
    """What one run of a pass did; programs and engines keep it as provenance.

    Attributes:
        text: The pass as pipeline text.
        changed: Whether the program differs at all from the one before.
        exact: Whether the pass promises equal outputs.
        seconds: Time of the pass, without the checks.
        max_abs: Largest absolute difference of any output from the program before; None where
            outputs were not compared.
        relative: Norm of that difference over the norm of the outputs before.
        drift: Like `relative`, against the program that the pipeline began with.
        skipped: Reasons for rewrites not done, as "where: reason".
        notes: Facts that the pass noted; see `Context.note`.
        before: Size of the program before.
        after: Size of the program after.
        tolerance: The stated bound and its reason; "" for bitwise equality.
    """

    text: str
    changed: bool
    exact: bool
    seconds: float
    max_abs: float | None
    relative: float | None
    drift: float | None
    skipped: list[str]
    notes: dict[str, Any]
    before: Size
    after: Size
    tolerance: str = ""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Record:
        """Return the record of an entry of `Program.history`."""
        sizes = {key: Size(**values[key]) for key in ("before", "after")}
        return cls(**{**values, **sizes})
