"""Measures which layer, in which format and at which step, costs a program how much accuracy.

Three things are measured on a few requests, each against the unquantized program:

- errors: how far the results of the loop's body go astray if one layer alone is quantized;
- effects: how much an error of the body's results at one step changes the program's outputs;
- growth: how much more (or less) the outputs change when all layers are quantized at all steps than
  the sum over them says, which takes their errors for independent. That of a rounded weight is the
  same at each step, so they are not.

Errors and effects are measured at a few steps of the trajectory and interpolated between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from diffopt.core.equivalence import squared_relative_error
from diffopt.execution import trajectories
from diffopt.execution.partial_evaluation import Evaluator, rerun
from diffopt.ir import graph as g
from diffopt.ir.nodes import args
from diffopt.progress import Progress, silent
from diffopt.quantization.quantize_body import Format
from diffopt.quantization.simulate import Simulator

Candidates = Mapping[str, Mapping[fx.Node, Sequence[Format]]]
"""The formats to try of each layer, by component: as many, in the same order, of each."""


PROBES = 5
"""At how many steps errors and effects are measured."""

_LEAST = 1e-30  # of a squared error: it has to have a logarithm


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """What quantizing the layers of one component costs.

    Attributes:
        nodes: The layers.
        steps: Of the component's calls.
        errors: Squared relative error of the body's results, [layers, formats, steps].
        effects: What that is multiplied with, for that of the program's outputs: [steps].
        growth: By how much to multiply what is summed: [formats].
    """

    nodes: Sequence[fx.Node]
    steps: Sequence[int]
    errors: Tensor
    effects: Tensor
    growth: Tensor

    @property
    def parts(self) -> Tensor:
        """The squared relative error of the outputs that each layer adds at each step."""
        return self.errors * self.effects * self.growth[:, None]


def measure(
    simulator: Simulator,
    candidates: Candidates,
    inputs: Sequence[Sequence[Tensor]],
    settings: Mapping[str, Any],
    progress: Progress = silent,
) -> dict[str, Sensitivity]:
    """Return what quantizing layers costs, by component.

    Args:
        simulator: Of the unquantized program.
        candidates: What to try.
        inputs: The flat inputs of each request.
        settings: What the numbers depend on beside all that, as JSON: how weights are rounded.
        progress: Called with what is being done and the fraction done.
    """
    bodies = {name: simulator.program.components[name] for name in candidates}
    place = {n: i for body in bodies.values() for i, n in enumerate(body.graph.nodes)}
    key = {
        "sensitivity": 1,
        **trajectories.identity(simulator.program, inputs),
        "layers": {
            name: {str(place[n]): list(map(str, own)) for n, own in layers.items()}
            for name, layers in candidates.items()
        },
        "steps": simulator.steps,
        "ranges": {name: _ranges(simulator, name, own) for name, own in candidates.items()},
        "settings": dict(settings),
    }
    made = trajectories.cached(
        key, lambda: _Bench(simulator, candidates, inputs, progress).measure()
    )
    return {
        name: Sensitivity(
            list(layers),
            simulator.steps[name],
            made[f"{name} errors"],
            made[f"{name} effects"],
            made["growth"],
        )
        for name, layers in candidates.items()
    }


def _ranges(
    simulator: Simulator, name: str, own: Mapping[fx.Node, Sequence[Format]]
) -> list[list[tuple[float, float]]]:
    """Return the ranges of what layers with static scales read: for each layer, of each step."""
    layers = simulator.layers[name]
    nodes = [n for n, formats in own.items() if any(f.activations == "static" for f in formats)]
    found = layers.found
    if found is None:
        return []
    return [[found(layers.own[n].x, step) for step in simulator.steps[name]] for n in nodes]


class _Bench:
    """All measurements on some requests."""

    def __init__(
        self,
        simulator: Simulator,
        candidates: Candidates,
        inputs: Sequence[Sequence[Tensor]],
        progress: Progress,
    ) -> None:
        self._sim, self._candidates, self._inputs = simulator, candidates, inputs
        self._bodies = {n: Evaluator(simulator.program.components[n]) for n in candidates}
        self._probes = {n: _probes(len(simulator.steps[n])) for n in candidates}
        self._columns = len(next(iter(next(iter(candidates.values())).values())))
        self._progress = progress
        self._done = 0

    def measure(self) -> dict[str, Tensor]:
        """Return the tensors of `Sensitivity`, by component and name."""
        sizes = {n: (len(own), self._columns, len(self._probes[n])) for n, own in self._layers()}
        errors = {n: torch.zeros(size, dtype=torch.float64) for n, size in sizes.items()}
        moved = {n: torch.zeros(size[-1], dtype=torch.float64) for n, size in sizes.items()}
        changed = {n: torch.zeros_like(own) for n, own in moved.items()}
        whole = torch.zeros(self._columns, dtype=torch.float64)
        for index, request in enumerate(self._inputs):
            known: dict[fx.Node, Any] = {}
            exact = trajectories.run_root(
                self._sim.program, request, lambda call, given: None, known
            )
            for name, at, step in self._visits():
                if (at - index) % len(self._inputs) == 0:  # requests take turns: this takes long
                    errors[name][:, :, at] = self._errors(name, step, known)
                more = self._disturb(name, step, known, exact)
                changed[name][at] += more[0]
                moved[name][at] += more[1]
            for column in range(self._columns):
                self._tell(f"running the program with format {column + 1} of {self._columns}")
                made = self._sim.run(request, _column(self._candidates, column))
                whole[column] += squared_relative_error(made, exact) / len(self._inputs)
        result: dict[str, Tensor] = {}
        predicted = torch.zeros_like(whole)
        for name, own in errors.items():
            effects = torch.where(changed[name] > _LEAST, moved[name] / changed[name], 0.0)
            result[f"{name} errors"] = self._everywhere(name, own)
            result[f"{name} effects"] = self._everywhere(name, effects)
            sums = result[f"{name} errors"] * result[f"{name} effects"]
            predicted += sums.sum((0, 2))
        result["growth"] = torch.where(predicted > _LEAST, whole / predicted, 1.0)
        return result

    def _layers(self) -> Iterator[tuple[str, Mapping[fx.Node, Sequence[Format]]]]:
        yield from self._candidates.items()

    def _visits(self) -> Iterator[tuple[str, int, int]]:
        """Yield each component, and its probes: their number and their step."""
        for name, probes in self._probes.items():
            for at, place in enumerate(probes):
                yield name, at, self._sim.steps[name][place]

    def _tell(self, what: str) -> None:
        own = sum(len(own) * len(self._probes[n]) for n, own in self._layers())
        self._progress(what, min(1.0, self._done / max(1, own)))

    def _everywhere(self, name: str, values: Tensor) -> Tensor:
        """Return numbers for all steps from those at the probes, with the logarithm linear."""
        logs = values.clamp_min(_LEAST).log().reshape(-1, values.shape[-1])
        steps = np.arange(len(self._sim.steps[name]))
        rows = [np.interp(steps, self._probes[name], row) for row in logs.numpy()]
        return torch.tensor(np.array(rows)).exp().reshape(*values.shape[:-1], len(steps))

    def _calls(self, name: str, step: int) -> list[fx.Node]:
        return [call for call, own in self._sim.scope.calls[name] if own == step]

    def _errors(self, name: str, step: int, known: Mapping[fx.Node, Any]) -> Tensor:
        """Return the squared relative error of the results, [layers, formats], in a step."""
        total = torch.zeros(len(self._candidates[name]), self._columns, dtype=torch.float64)
        calls, body = self._calls(name, step), self._bodies[name]
        layers = self._sim.layers[name]
        for call in calls:
            given = [known[n] for n in args(call)]
            with torch.no_grad():
                values = body.everything(given)
                takes = g.placeholders(self._sim.program.components[name])
                values.update(zip(takes, given, strict=True))
                exact = [values[r] for r in body.results]
                for row, (node, formats) in enumerate(self._candidates[name].items()):
                    self._done += 1
                    self._tell(f"measuring {name}, step {step}, layer {row + 1} of {len(total)}")
                    for column, how in enumerate(formats):
                        y = layers.value(node, how, step, values.__getitem__)
                        made = body.run(given, {node: y}, known=values)
                        error = squared_relative_error([made[r] for r in body.results], exact)
                        total[row, column] += error / len(calls)
        return total

    def _disturb(
        self, name: str, step: int, known: Mapping[fx.Node, Any], exact: Sequence[Tensor]
    ) -> tuple[float, float]:
        """Quantize a step's calls; return the squared relative change of results and outputs."""
        own = {node: formats[0] for node, formats in self._candidates[name].items()}
        made = {
            call: self._sim.call(name, own, step, [known[n] for n in args(call)])
            for call in self._calls(name, step)
        }
        changes = [squared_relative_error(results, known[call]) for call, results in made.items()]
        outputs = rerun(self._sim.program, known, made)
        return sum(changes) / len(changes), squared_relative_error(outputs, exact)


def _column(candidates: Candidates, column: int) -> dict[str, dict[fx.Node, Format]]:
    """Return the formats of all layers if each has the one with this number."""
    return {
        name: {node: formats[column] for node, formats in own.items()}
        for name, own in candidates.items()
    }


def _probes(count: int) -> list[int]:
    """Return a few of `count` places, spread evenly, the first and the last among them."""
    few = min(PROBES, count)
    return sorted({round(k * (count - 1) / max(1, few - 1)) for k in range(few)})
