"""Bind every step's constants, and fold what depends on the timestep alone into tables.

Before (a component called once a step with a constant timestep):

    %unet = unet(%latents, %t981)              # in unet: emb = linear(silu(linear(sinusoid(t))))

After (one body for all steps; the time embedding is a row of a constant table):

    %row = aten.select(%table, 0, 0)
    %unet = unet(%latents, %row)

Not rewritten when
- no argument of a component is a constant at every call;
- the table would be larger than `max-table-mb`.

With `steps`, `scheduler` or `spacing` the pipeline is captured again with that sampler first,
which is an approximate change.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from diffopt.core import Context, Pass, option
from diffopt.ir import graph as g
from diffopt.ir.aliasing import clone_aliased_outputs, output_aliases
from diffopt.ir.interpreter import Interpreter
from diffopt.ir.program import Program
from diffopt.ir.step_tables import (
    first_after_arguments,
    frontier,
    pass_rows,
    replace_by_rows,
    to_row,
)
from diffopt.transforms import component_signatures, resample

aten = torch.ops.aten


@dataclass(frozen=True)
class Unroll(Pass):
    """Bind each step's constants and fold what depends on the timestep alone."""

    steps: int | None = option(None, "sample in this many steps (approximate)")
    scheduler: str | None = option(None, "sample with this diffusers scheduler (approximate)")
    spacing: str | None = option(None, "timestep_spacing of the scheduler (approximate)")
    max_table_mb: int = option(256, "leave a component alone whose table would be larger")

    def is_exact(self) -> bool:
        """Another sampler is another result."""
        return self.steps is None and self.scheduler is None and self.spacing is None

    def run(self, program: Program, ctx: Context) -> None:
        """Capture again if options ask for it, then fold."""
        if not self.is_exact():
            resample.resample(program, ctx, self.steps, self.scheduler, self.spacing)
        before = output_aliases(program)
        for name in list(program.components):
            self._fold(program, name, ctx)
        clone_aliased_outputs(program, before)

    def _fold(self, program: Program, name: str, ctx: Context) -> None:
        calls, body = program.calls(name), program.components[name]
        formals = g.placeholders(body)
        bound = [i for i in range(len(formals)) if all(_is_constant(c.args[i]) for c in calls)]
        if not bound:
            ctx.skip(name, "no argument is a constant at every call")
            return
        values = _bound_values(body, bound)
        rows = _evaluate(program, name, bound, values)
        size = g.tensor_bytes(t for row in rows for t in row)
        if size > self.max_table_mb << 20:
            ctx.skip(
                name, f"the table would take {size >> 20} MB, over max-table-mb={self.max_table_mb}"
            )
            return
        varying = [
            k for k in range(len(values)) if not all(torch.equal(r[k], rows[0][k]) for r in rows)
        ]
        for k in [k for k in range(len(values)) if k not in varying]:
            with body.graph.inserting_before(first_after_arguments(body)):
                constant = g.get_attr(body, "bound", rows[0][k])
            values[k].replace_all_uses_with(constant)
        stored = [_one_row([row[k] for row in rows]) for k in varying]
        shapes = [(values[k], list(s[0].shape)) for k, s in zip(varying, stored, strict=True)]
        groups = replace_by_rows(body, shapes, "row")
        for members in groups:
            table = [to_row([stored[m][c] for m in members]) for c in range(len(calls))]
            pass_rows(program.root, calls, table, f"{name}_table")
        component_signatures.drop_unread_arguments(program, name)
        ctx.note(name, {"calls": len(calls), "values in tables": len(varying), "table bytes": size})


def _is_constant(arg: object) -> bool:
    return isinstance(arg, fx.Node) and arg.op == "get_attr"


def _bound_values(body: fx.GraphModule, bound: list[int]) -> list[fx.Node]:
    """Return the values that depend on bound parameters alone and that other nodes read."""
    args = g.placeholders(body)
    late = g.descendants([*(n for i, n in enumerate(args) if i not in bound), g.output_node(body)])
    early = {n for n in g.descendants(args[i] for i in bound) if n not in late}
    early |= {n for n in g.ancestors(early) if n not in late}
    arguments = [args[i] for i in bound if any(u in late for u in args[i].users)]
    inner = {n for n in early if n.op == "call_function"}
    return arguments + [
        n for n in frontier(inner, body) if g.ancestors([n]) & {args[i] for i in bound}
    ]


def _evaluate(
    program: Program, name: str, bound: list[int], values: list[fx.Node]
) -> list[list[Tensor]]:
    """Return the values at every call; calls with the same constants share them."""
    body = program.components[name]
    formals = [g.placeholders(body)[i] for i in bound]
    part = Interpreter(body, values)
    known: dict[tuple[str, ...], list[Tensor]] = {}
    rows = []
    for call in program.calls(name):
        key = tuple(str(call.args[i].target) for i in bound)  # type: ignore[union-attr]
        if key not in known:
            with torch.no_grad():
                constants = (g.attribute(program.root, k) for k in key)
                computed = part.values(known=dict(zip(formals, constants, strict=True)))
                known[key] = [computed[n].clone() for n in values]
        rows.append(known[key])
    return rows


def _one_row(tensors: list[Tensor]) -> list[Tensor]:
    """Return the tensors with the batch cut to one where all of its entries are equal."""
    first = tensors[0]
    if (
        first.ndim < 2
        or first.shape[0] == 1
        or not all(torch.equal(t, t[:1].expand_as(t)) for t in tensors)
    ):
        return tensors
    return [t[:1] for t in tensors]
