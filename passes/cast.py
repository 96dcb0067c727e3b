"""Compute in bfloat16 or float16, but for islands that measurements say should stay in float32.

Before:

    %x: float32[2,8]
    %1: float32[8,8] = weight
    %2: float32[2,8] = aten.linear(%x, %1)
    %3: float32[2,8] = aten.layer_norm(%2, [8])
    %4: float32[2,8] = aten.linear(%3, %1)
    return %4

After `cast(bf16,islands=norms)`:

    %x: float32[2,8]
    %1: bfloat16[2,8] = aten._to_copy(%x, dtype=bfloat16)
    %2: bfloat16[8,8] = weight
    %3: bfloat16[2,8] = aten.linear(%1, %2)
    %4: float32[2,8] = aten._to_copy(%3, dtype=float32)
    %5: float32[2,8] = aten.layer_norm(%4, [8])
    %6: bfloat16[2,8] = aten._to_copy(%5, dtype=bfloat16)
    %7: bfloat16[2,8] = aten.linear(%6, %2)
    %8: float32[2,8] = aten._to_copy(%7, dtype=float32)
    return %8

Layers and what reads their values change; the pipeline graph, operators before the first and after
the last layer, float64 and integers do not (see `diffopt.analysis.dtype_regions` for the terms).
Arguments and results of components are float32, but for values that are passed from component to
component alone. With `islands=auto` each component runs on a few of its calls, entirely in the low
type and with each kind of island in float32, and a kind is kept in float32 that removes at least
`share` of the squared error. Where islands are named, bf16 runs nothing, and fp16 runs those calls
to find what overflows, unless outputs are not compared.

Not rewritten when
- a component has no layers, or one that computes in 16 bits already;
- values of a component overflow the type wherever its islands are;
- an operator has no kernel for the type: it stays in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from diffopt.analysis.dtype_regions import (
    KINDS,
    DtypePlan,
    half_dtype,
    islands,
    layers,
    timestep_arguments,
)
from diffopt.core import Context, Needs, Pass, option
from diffopt.errors import DiffoptError
from diffopt.execution.calibration_inputs import requests
from diffopt.ir.program import Program
from diffopt.precision.boundary_dtypes import assign_boundary_dtypes
from diffopt.precision.cast_body import LowWeights, cast_body, update_calls
from diffopt.precision.island_search import (
    CastTrial,
    IslandChoice,
    fixed_islands,
    record_calls,
    search_islands,
)

Islands = Literal["auto", "none", "norms", "softmax", "time", "output"]

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Cast(Pass):
    """Compute in bfloat16 or float16, with islands in float32."""

    exact = False

    dtype: Literal["bf16", "fp16"] = option("bf16", "what to compute in")
    islands: tuple[Islands, ...] = option(
        ("auto",), "what stays in float32: auto, none, or of norms, softmax, time, output"
    )
    share: float = option(0.1, "least part of the squared error that an island of auto takes away")
    calls: int = option(4, "calls of each component to measure on, spread over the steps")
    budget: float | None = option(None, "largest relative error that the pass may add")

    def __post_init__(self) -> None:
        alone = {"auto", "none"} & set(self.islands)
        if not self.islands or (alone and len(self.islands) > 1):
            raise DiffoptError(
                f"cast has islands={','.join(self.islands)}; write auto, none or kinds of islands,"
                " as in cast(bf16,islands=norms,output)"
            )
        if self.calls < 1 or not 0 < self.share <= 1:
            raise DiffoptError("cast wants calls >= 1 and 0 < share <= 1")

    def needs(self) -> Needs:
        """Return that values are measured, to choose islands or to find what overflows."""
        return "one run" if self.islands == ("auto",) or self.dtype == "fp16" else "nothing"

    def runs(self, program: Program) -> float:
        """Return a run, and those calls of it that are measured with several choices of islands."""
        if self.needs() == "nothing":
            return 0.0
        trials = len(KINDS) + 3 if self.islands == ("auto",) else 2
        return 1.0 + min(1.0, self.calls * len(program.components) / len(program.calls())) * trials

    def run(self, program: Program, ctx: Context) -> None:
        """Choose islands for each component, and rewrite it."""
        low = _TYPES[self.dtype]
        plans = self._plans(program, low, ctx)
        if not plans:
            return
        assign_boundary_dtypes(program, plans)
        weights = LowWeights(low)
        seen: dict[str, list[list[torch.Tensor]]] = {}
        is_measured = self.islands == ("auto",) or (self.dtype == "fp16" and ctx.compare)
        if is_measured:
            (inputs,) = requests(program, ctx.prompts, 1, ctx.seed)
            ctx.progress("cast: running the program in float32")
            seen = record_calls(program, plans, inputs, self.calls)
        for number, name in enumerate(list(plans)):
            ctx.progress(f"cast: {name}", number / len(plans))
            kinds = islands(plans[name], timestep_arguments(program, name))
            fixed = None if self.islands == ("auto",) else [k for k in kinds if k in self.islands]
            if is_measured:
                trial = CastTrial(plans[name], seen.pop(name), weights)
                choice = search_islands(trial, kinds, fixed, self.share)
            else:
                choice = fixed_islands(plans[name], kinds, fixed or ())
            if choice.reason:
                ctx.skip(name, choice.reason)
                del plans[name]
                continue
            for node, reason in choice.unsupported.items():
                ctx.skip(f"{name}.{node}", f"stays in float32: {reason}")
            ctx.note(name, _measured(choice) if is_measured else {"islands": list(choice.kinds)})
        assign_boundary_dtypes(program, plans)
        for name, plan in plans.items():
            program.root._modules[name] = cast_body(plan, weights)
        update_calls(program)

    def _plans(self, program: Program, low: torch.dtype, ctx: Context) -> dict[str, DtypePlan]:
        plans = {}
        for name, body in program.components.items():
            half = half_dtype(body)
            if not layers(body):
                ctx.skip(name, "has no layers, nothing would be faster")
            elif half is not None:
                ctx.skip(name, f"computes in {str(half).removeprefix('torch.')} already")
            elif program.calls(name):
                plans[name] = DtypePlan(body, low)
        return plans


def _measured(choice: IslandChoice) -> dict[str, Any]:
    shares = {kind: round(share, 3) for kind, share in choice.shares.items()}
    return {
        "islands": list(choice.kinds),
        "share of the squared error": shares,
        "relative error": float(f"{choice.error**0.5:.3g}"),
        "without islands": float(f"{choice.without**0.5:.3g}"),
    }
