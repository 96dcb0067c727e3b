"""Quantize inputs and weights of layers, with scales that follow the sampling steps.

Before:

    %1: float32[4,16] = aten.linear(%x, %w, %b)

After `quantize(int8)`, where `%input_scales` and `%input_zeros` are the step's rows of two tables:

    %5: int8[4,8] = quantized_decomposed.quantize_per_tensor.tensor(%x, %scale, %zero, -128, 127, …)
    %6: float32[4,8] = quantized_decomposed.dequantize_per_tensor.tensor(%5, %scale, %zero, …)
    %9: float32[16,8] = quantized_decomposed.dequantize_per_channel(%w_int8, %w_scales, None, 0, …)
    %10: float32[4,16] = aten.linear(%6, %9, %b)

The first word is the format of the weights: int8, int4 or fp8 (E4M3). `activations` says where the
scales of layers' inputs come from: `static` ones are calibrated over the whole trajectory and both
guidance branches, for groups of steps with similar ranges; `dynamic` ones are computed from the
tensor, and `rows` from each row of it; `none` leaves activations alone. Layers of the sampling loop
are quantized like that; of those in front of it (where `hoist` moved them) weights alone. The dtype
that layers compute in does not change: run `cast(bf16)` for the rest.

With `auto` each layer has the format of least cost (`goal`) of those in `formats`, with its input
quantized or not, such that the error on held-out requests is within the budget.

A layer that reads a concatenation is split, so that each operand has scales of its own
(Q-Diffusion). Weights of 4 bits have a scale for each group of 64 inputs, and are rounded to int8
again for integer kernels. With int4, tables of embeddings have 8 bits, and so have weights in front
of the loop, unless their component is named: they are few, and read once.

Not rewritten when
- a layer's module matches `skip`, or none of `layers`;
- it is the first or the last of the denoiser, unless `ends`;
- its step is one of `keep`: those steps read the original weights, which are kept beside;
- its weight is computed, or a layer's type is none of linear and conv1d to conv3d.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, fx

from diffopt.analysis.scope import Scope, boundary_weights, choose_scope
from diffopt.core import Context, Needs, Pass, option
from diffopt.core.module_filter import ModuleFilter
from diffopt.errors import DiffoptError
from diffopt.execution.calibration_inputs import representative, requests
from diffopt.ir import nodes, qdq
from diffopt.ir.program import Program
from diffopt.quantization import format_search, layer_preparation, quantize_body, ranges
from diffopt.quantization.quantize_body import (
    Activations,
    Calibration,
    Format,
    Formats,
    RangeOf,
    WeightStore,
)
from diffopt.quantization.simulate import Simulator
from diffopt.quantization.tensor_memo import TensorMemo

HELD_SEED = 1 << 20
"""The offset of the seeds of held-out requests from those of calibration."""

_SEARCH_RUNS = 10
"""What a search of formats or of roundings takes, in runs for each request; measured."""


@dataclass(frozen=True)
class Quantize(Pass):
    """Quantize weights and activations of layers, by step."""

    exact = False

    format: Literal["int8", "int4", "fp8", "auto"] = option(
        "int8", "what weights are stored as; auto: chosen for each layer, within the budget"
    )
    activations: Activations = option(  # noqa: RUF009 (a string)
        "static", "where scales of inputs come from: static, dynamic, rows (tokens), none"
    )
    group: int | None = option(
        None, "inputs that share a weight scale; 0: all. By default 64 for int4, else all"
    )
    keep: tuple[str, ...] = option((), "steps that are not quantized: first:2,last:2,7")
    layers: tuple[str, ...] = option(("*",), "patterns of the modules to quantize")
    skip: tuple[str, ...] = option((), "patterns of modules to leave alone")
    ends: bool = option(False, "quantize the first and the last layers as well")
    split: bool = option(True, "give operands of a concatenation layers of their own")
    observer: ranges.Observer = option(  # noqa: RUF009 (a string)
        "minmax", "how static ranges are chosen: minmax, percentile, mse, entropy"
    )
    groups: int = option(0, "groups of steps with ranges of their own; 0: as many as differ")
    scale: Literal["max", "mse"] = option("mse", "how weight scales are chosen")
    smooth: bool = option(False, "move the range of inputs into weights (SmoothQuant)")
    rank: int = option(0, "of a branch beside each layer, for what is hard to round (SVDQuant)")
    rounding: Literal["nearest", "adaround"] = option(
        "nearest", "adaround learns, block by block, which weights to round up (BRECQ)"
    )
    samples: int = option(8, "requests to calibrate with")
    tables: bool = option(True, "quantize tables of embeddings as well, in the same components")
    components: tuple[str, ...] = option(
        ("loop",), "loop; all: weights of the others too; or names, which may be patterns"
    )
    budget: float | None = option(
        None, "largest relative error that the pass may add; auto: 0.02 by default"
    )
    formats: tuple[str, ...] = option(("int8", "int4"), "what auto chooses from")
    goal: format_search.Goal = option(  # noqa: RUF009 (a string)
        "both", "what auto makes little of: size, speed, both"
    )

    def __post_init__(self) -> None:
        if min(self.group or 0, self.groups, self.rank, self.samples, self.budget or 0) < 0:
            raise DiffoptError(
                "quantize wants group, groups, rank, samples and budget to be 0 or more"
            )
        if self.format == "fp8" and self.group:
            raise DiffoptError("fp8 weights have a scale for each output: leave group out")
        if self.activations == "static" and self.samples == 0:
            raise DiffoptError(
                "static scales are calibrated: ask for samples=1 or more, or write"
                " activations=dynamic"
            )
        if self.format == "auto" and self.samples == 0:
            raise DiffoptError("auto measures what formats cost: ask for samples=1 or more")
        format_search.formats_to_try(self.formats, self.activations)
        for text in self.keep:
            read_steps(text, 1 << 30)

    def needs(self) -> Needs:
        """Return that ranges are calibrated, where they or the rounding follow from values."""
        measures = self.smooth or self.rounding != "nearest" or self.format == "auto"
        return "calibration" if measures or self.activations == "static" else "nothing"

    def runs(self, program: Program) -> float:
        """Return a run for each request, and several where formats or roundings are searched."""
        searched = _SEARCH_RUNS if self.format == "auto" or self.rounding != "nearest" else 1
        return super().runs(program) * (searched + self.smooth)

    def run(self, program: Program, ctx: Context) -> None:
        """Choose layers, make them easier to quantize, calibrate, and write Q/DQ."""
        scope = choose_scope(program, self.components)
        for name in scope.calls:
            layer_preparation.restore_linears(program.components[name])
        memo, store = TensorMemo(), WeightStore(self.scale)
        notes: dict[str, Any] = {}
        if self.split:
            bodies = [program.components[name] for name in scope.loop]
            notes["layers split"] = sum(layer_preparation.split_concats(gm, memo) for gm in bodies)
        scope = quantize_body.keep_steps(program, scope, self._kept(scope))
        formats = self._formats(program, scope, ctx)
        inputs: list[list[Tensor]] = []
        if self.needs() == "calibration":
            inputs = representative(str(self), program, ctx.prompts, self.samples, ctx.seed)
        job = Calibration(program, scope, formats, inputs, ctx.progress)
        if self.smooth:
            notes["layers smoothed"] = layer_preparation.smooth_layers(job, self.scale, memo)
        if self.rank:
            notes["branches"] = layer_preparation.add_low_rank_branches(
                job, self.rank, self.scale, memo
            )
            if not notes["branches"]:
                wanted = f"a branch of rank {self.rank} wants {4 * self.rank} inputs and outputs"
                ctx.skip("rank", f"{wanted}, which no weight has")
        range_of, groups = quantize_body.calibrate_ranges(job, self.observer, self.groups)
        if self.format == "auto":
            formats, notes["auto"] = self._search_formats(job, range_of, ctx)
            job = replace(job, formats=formats)
        if self.rounding == "adaround":
            notes["rounding learned"] = quantize_body.learn_rounding(job, range_of, store, ctx.seed)
        for name, chosen in formats.items():
            calls = scope.calls[name]
            quantize_body.quantize_body(program, name, chosen, calls, range_of.get(name), store)
        lookups = self._tables(program, scope)
        for name, node in lookups:
            # 4 bits are too few: no sum over inputs averages the errors of a row.
            fmt = self._weights(is_beside=True)
            quantize_body.quantize_embedding(program.components[name], node, fmt, store)
        notes["tables"] = len(lookups)
        notes["layers"] = {name: len(chosen) for name, chosen in formats.items()}
        notes["groups of steps"] = {n: list(map(len, chosen)) for n, chosen in groups.items()}
        notes["weight bytes"] = {"before": store.before, "after": store.after}
        for what, value in notes.items():
            if value:
                ctx.note(what, value)

    def _search_formats(
        self, job: Calibration, range_of: Mapping[str, RangeOf], ctx: Context
    ) -> tuple[Formats, dict[str, Any]]:
        """Return the formats of layers within the budget, and notes on the choice."""
        store, seed = WeightStore(self.scale), ctx.seed + HELD_SEED
        held_out = requests(job.program, ctx.prompts, format_search.HELD_OUT_REQUESTS, seed)
        return format_search.FormatSearch(
            Simulator(job.program, job.scope, range_of, store),
            {name: list(chosen) for name, chosen in job.formats.items()},
            format_search.formats_to_try(self.formats, self.activations, self.group),
            self.goal,
            format_search.BUDGET if ctx.budget is None else ctx.budget,
            job.inputs[: format_search.SENSITIVITY_REQUESTS],
            [list(ctx.inputs), *held_out],
            store,
            ctx.progress,
        ).run()

    def _kept(self, scope: Scope) -> set[int]:
        """Return the steps that are not quantized."""
        steps = sorted({step for name in scope.loop for _, step in scope.calls[name]})
        kept = {steps[i] for text in self.keep for i in read_steps(text, len(steps))}
        if steps and kept == set(steps):
            raise DiffoptError(f"keep={','.join(self.keep)} leaves no step to quantize")
        return kept

    def _formats(self, program: Program, scope: Scope, ctx: Context) -> Formats:
        """Return the format of each layer to quantize, by component."""
        ends = [] if self.ends else boundary_weights(program, scope)
        patterns = ModuleFilter(self.layers, self.skip)
        formats: Formats = {}
        for name in scope.calls:
            body, chosen = program.components[name], dict[fx.Node, Format]()
            for layer in qdq.layers(body):
                module = nodes.module_path(layer.node)
                path = f"{name}.{module}"
                if not patterns.matches(name, module):
                    continue
                if layer.weight.op != "get_attr":
                    ctx.skip(path, "its weight is quantized already")
                elif name in scope.loop and any(
                    nodes.stored_tensor(body, layer.weight) is t for t in ends
                ):
                    ctx.skip(path, "one of the first or the last layers")
                else:
                    chosen[layer.node] = self._format(name in scope.weights, layer)
            if chosen:
                formats[name] = chosen
        patterns.check("layer", scope.calls)
        if not formats and (self.format == "auto" or not self._tables(program, scope)):
            raise DiffoptError(
                f"there is no layer to quantize in {', '.join(scope.calls)}: its layers are"
                " skipped, or quantized already"
            )
        return formats

    def _tables(self, program: Program, scope: Scope) -> list[tuple[str, fx.Node]]:
        """Return the lookups of tables to quantize, each with its component."""
        patterns = ModuleFilter(self.layers, self.skip)
        return [
            (name, node)
            for name in (scope.calls if self.tables else ())
            for node in quantize_body.embedding_lookups(program.components[name])
            if patterns.matches(name, nodes.module_path(node))
        ]

    def _format(self, weights_only: bool, layer: qdq.Layer) -> Format:
        how = self._weights(weights_only)
        if not weights_only:
            how = replace(how, activations=self.activations)
        return how.for_layer(layer)

    def _weights(self, is_beside: bool) -> Format:
        """Return the format of weights; with `auto`, a placeholder for the format chosen later.

        Weights outside of the loop are read once: 4 bits would save little and cost accuracy.
        """
        if self.format == "auto" or (self.format == "int4" and is_beside):
            return Format("int8", "none")
        group = self.group or None
        if self.group is None and self.format == "int4":
            group = quantize_body.INT4_GROUP
        return Format(self.format, "none", group)


def read_steps(text: str, count: int) -> range:
    """Return the steps that `first:2`, `last:2`, `7` or `3-6` mean, of `count`."""
    match = re.fullmatch(r"(first|last):(\d+)|(\d+)(?:-(\d+))?", text)
    if not match:
        raise DiffoptError(f"keep={text}: write first:2, last:2, 7 or 3-6")
    where, number, low, high = match.groups()
    if where == "first":
        return range(min(int(number), count))
    if where == "last":
        return range(max(0, count - int(number)), count)
    if int(high or low) >= count:
        raise DiffoptError(f"keep={text}: there are only the steps 0 to {count - 1}")
    return range(int(low), int(high or low) + 1)
