"""Factor the weights of linears and convolutions into two smaller ones.

Before:

    %1: float32[2,64,96] = aten.linear(%x, %w, %b)

After `low-rank(rank=16)`:

    %1: float32[2,64,16] = aten.linear(%x, %w_down)
    %2: float32[2,64,96] = aten.linear(%1, %w_up, %b)

A convolution becomes one with `rank` outputs and one of a single pixel, or one with a kernel of
kh x 1 and one of 1 x kw, whichever keeps more for its FLOPs. `rank` from 1 on is the number of
values between the two; below 1 it is a share of the weight's full rank, and the cost of such a rank
in the channel form is the budget in either form. With `energy`, each layer has the least rank that
keeps such a share of its squared singular values. A weight that several bodies read is factored
once.

With W = U S V^T, the first `rank` columns of U make the second layer, and U^T W the first one. With
`data=true`, U are the directions in which the outputs of the layer are largest on calibration
inputs x, the eigenvectors of W E[x x^T] W^T, and energy is that of the outputs.

Not rewritten when
- that would not save both FLOPs and parameters;
- a layer's module matches `skip`, or none of `layers`;
- it is the first or the last of the denoiser, unless `ends`;
- it is a convolution in groups;
- its weight is quantized, computed, or also read by something that is not rewritten.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, fx

from diffopt.analysis.scope import Scope, boundary_weights, choose_scope
from diffopt.core import Context, Needs, Pass, option
from diffopt.core.module_filter import ModuleFilter
from diffopt.errors import DiffoptError
from diffopt.execution import trajectories
from diffopt.execution.calibration_inputs import representative
from diffopt.ir import graph as g
from diffopt.ir import nodes, qdq
from diffopt.ir.program import Program
from diffopt.pruning import low_rank_factors
from diffopt.pruning.low_rank_factors import Spectrum
from diffopt.quantization import layer_preparation

ENERGY = 0.9
"""The share of energy that is kept where neither `rank` nor `energy` is given."""

ENOUGH = 4
"""How many input rows calibration needs for each dimension of them: the directions of fewer do not
generalize, as in layers of the timestep and the prompt."""

Use = tuple[str, qdq.Layer]
"""A layer, and the component that it is in."""


@dataclass(frozen=True)
class LowRank(Pass):
    """Factor weights of layers into two smaller ones, where that saves FLOPs."""

    exact = False

    rank: float | None = option(
        None, "values between the two layers; below 1: as a share of the weight's rank"
    )
    energy: float | None = option(
        None, "share of the squared singular values that each layer keeps; by default 0.9"
    )
    multiple: int = option(8, "ranks that are not given are rounded up to a multiple of this")
    form: Literal["auto", "channel", "spatial"] = option(
        "auto", "of convolutions: channel (k x k, then 1 x 1), spatial (k x 1, then 1 x k)"
    )
    data: bool = option(False, "weigh directions by what layers read on calibration requests")
    samples: int = option(4, "requests to calibrate with")
    layers: tuple[str, ...] = option(("*",), "patterns of the modules to factor")
    skip: tuple[str, ...] = option((), "patterns of modules to leave alone")
    ends: bool = option(False, "factor the first and the last layers as well")
    components: tuple[str, ...] = option(
        ("loop",), "loop; all; or names of components, which may be patterns"
    )
    budget: float | None = option(None, "largest relative error that the pass may add")

    def __post_init__(self) -> None:
        if self.rank is not None and self.energy is not None:
            raise DiffoptError("low-rank wants rank or energy, not both")
        if self.rank is not None and (self.rank <= 0 or (self.rank > 1 and self.rank % 1)):
            raise DiffoptError(
                f"low-rank has rank={self.rank:g}; write a whole number, or a share below 1"
            )
        if self.energy is not None and not 0 < self.energy < 1:
            raise DiffoptError(f"low-rank has energy={self.energy:g}; write a number from 0 to 1")
        if self.multiple < 1 or self.samples < 1:
            raise DiffoptError("low-rank wants multiple and samples to be 1 or more")

    def needs(self) -> Needs:
        """Return that directions are weighed on calls, with `data`."""
        return "calibration" if self.data else "nothing"

    def run(self, program: Program, ctx: Context) -> None:
        """Find layers, calibrate, choose ranks, and replace each layer by two."""
        scope = choose_scope(program, self.components)
        for name in scope.calls:
            layer_preparation.restore_linears(program.components[name])
            g.prune_unused(program.components[name])  # dead readers of weights must not count
        todo = self._layers(program, scope, ctx)
        moments = self._moments(program, scope, todo, ctx) if self.data else {}
        ranks: dict[str, str] = {}
        before = after = 0
        for index, (key, uses) in enumerate(todo.items()):
            component, layer = uses[0]
            path = f"{component}.{nodes.module_path(layer.node)}"
            ctx.progress(f"low-rank: {path}", index / len(todo))
            weight = nodes.stored_tensor(program.components[component], layer.weight)
            assert weight is not None
            if not bool(weight.isfinite().all()):
                raise DiffoptError(f"the weight of {path} has values that are not finite")
            spectrum = self._spectrum(layer, weight, moments.get(key))
            rank = self._rank(spectrum, low_rank_factors.cost(layer, spectrum.form))
            most = min(low_rank_factors.cost(use, spectrum.form).most for _, use in uses)
            if rank > most:
                ctx.skip(path, f"rank {rank} saves nothing: it has to be {most} or less")
                continue
            both = low_rank_factors.factorize(spectrum, rank, weight.dtype)
            for name, use in uses:
                low_rank_factors.place_factors(program.components[name], use, spectrum.form, *both)
            before += weight.numel()
            after += sum(tensor.numel() for tensor in both)
            full = low_rank_factors.full_rank(weight)
            form = f" ({spectrum.form})" if layer.convolution else ""
            ranks[path] = f"{rank} of {full}{form}, keeps {spectrum.kept(rank):.1%}"
        ctx.note("ranks", ranks)
        ctx.note("parameters of these", {"before": before, "after": after})
        why = collections.Counter(_kind(reason) for reason in ctx.skipped)
        ctx.note("left alone", dict(why.most_common()))

    def _spectrum(self, layer: qdq.Layer, weight: Tensor, moments: Tensor | None) -> Spectrum:
        """Decompose a weight in the form that keeps most energy for its FLOPs, or costs least."""
        allowed = [f for f in low_rank_factors.forms(layer) if self.form in ("auto", f)]
        spectra = [
            low_rank_factors.spectrum(weight, form, moments) for form in allowed or ["channel"]
        ]

        def merit(spectrum: Spectrum) -> float:
            cost = low_rank_factors.cost(layer, spectrum.form)
            rank = self._rank(spectrum, cost)
            return -rank * cost.flops if self.rank is None else spectrum.kept(rank)

        return max(spectra, key=merit)

    def _rank(self, spectrum: Spectrum, cost: low_rank_factors.FormCost) -> int:
        """Return the rank of a weight in a form."""
        full = min(spectrum.shape[0], cost.whole_parameters // spectrum.shape[0])
        if self.rank is None:
            rank = spectrum.rank_for(ENERGY if self.energy is None else self.energy)
        elif self.rank >= 1:
            return min(int(self.rank), len(spectrum.energy))
        else:
            channel = spectrum.shape[0] + cost.whole_parameters // spectrum.shape[0]
            rank = max(1, round(self.rank * full * channel / cost.parameters))
        return min(-(-rank // self.multiple) * self.multiple, len(spectrum.energy))

    def _layers(self, program: Program, scope: Scope, ctx: Context) -> dict[int, list[Use]]:
        """Return the layers to factor, by their weight's id."""
        ends = {id(t) for t in ([] if self.ends else boundary_weights(program, scope))}
        patterns = ModuleFilter(self.layers, self.skip)
        by_weight: dict[int, list[Use]] = {}
        for name in scope.calls:
            gm = program.components[name]
            for layer in qdq.layers(gm):
                path = nodes.module_path(layer.node)
                if not patterns.matches(name, path):
                    continue
                weight = nodes.stored_tensor(gm, layer.weight)
                if reason := self._refused(layer, weight, ends):
                    ctx.skip(f"{name}.{path}", reason)
                else:
                    by_weight.setdefault(id(weight), []).append((name, layer))
        patterns.check("layer", scope.calls)
        uses = nodes.weight_uses(program)
        for key in [key for key, layers in by_weight.items() if len(layers) != uses[key]]:
            name, layer = by_weight.pop(key)[0]
            ctx.skip(
                f"{name}.{nodes.module_path(layer.node)}",
                "its weight is also used elsewhere",
            )
        return by_weight

    def _refused(self, layer: qdq.Layer, weight: Tensor | None, ends: set[int]) -> str | None:
        if weight is None:
            return "its weight is quantized: run low-rank before quantize"
        if id(weight) in ends:
            return "one of the first or the last layers"
        forms = low_rank_factors.forms(layer)
        if not forms:
            return "it is a convolution in groups"
        if qdq.activation(layer.x) is not None:
            return "its input is quantized: run low-rank before quantize"
        return None

    def _moments(
        self,
        program: Program,
        scope: Scope,
        todo: Mapping[int, Sequence[Use]],
        ctx: Context,
    ) -> dict[int, Tensor]:
        """Return the second moments of layers' inputs, by their weight's id."""
        inputs = representative(str(self), program, ctx.prompts, self.samples, ctx.seed)
        readers: dict[fx.Node, list[tuple[int, qdq.Layer]]] = {}
        for key, uses in todo.items():
            for _, layer in uses:
                readers.setdefault(layer.x, []).append((key, layer))
        every = [call for calls in scope.calls.values() for call in calls]
        by_step = {(step, number): call for number, (call, step) in enumerate(every)}
        moments: dict[int, Tensor] = {}
        rows = collections.Counter[int]()
        for index, tensors in enumerate(inputs):
            ctx.progress("low-rank: calibrating", index / len(inputs))
            for visit in trajectories.steps(program, by_step, tensors, readers):
                for node, value in visit.values.items():
                    for key, layer in readers[node]:
                        m, count = low_rank_factors.second_moments(layer, value)
                        moments[key] = moments[key] + m if key in moments else m
                        rows[key] += count
        return {key: m for key, m in moments.items() if rows[key] >= ENOUGH * len(m)}


def _kind(skipped: str) -> str:
    """Return the reason of a skip without its subject and its numbers."""
    reason = skipped.partition(": ")[2]
    return "that would save nothing" if "saves nothing" in reason else reason
