"""Measure the error that each layer, format and step of a quantized program adds to its outputs.

Three factors are measured on a few requests, relative to the unquantized program:

- errors: the error of the body's results if one layer alone is quantized;
- output sensitivity: how much an error of the body's results at one step changes the outputs;
- growth: the ratio of the outputs' error with all layers quantized at all steps to the sum over
  them, which assumes independent errors. That of a rounded weight is the same at each step.

    squared relative error of the outputs ≈ growth * sum over layers, steps of errors * sensitivity

Errors and sensitivities are measured at a few steps of the trajectory and interpolated in between.
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
from diffopt.execution.partial_evaluation import PartialEvaluator, rerun
from diffopt.ir import graph as g
from diffopt.ir.nodes import args
from diffopt.progress import Progress, silent
from diffopt.quantization.quantize_body import Format
from diffopt.quantization.simulate import Simulator

Candidates = Mapping[str, Mapping[fx.Node, Sequence[Format]]]
"""The formats to try of each layer, by component: equally many, in the same order, for each."""


PROBES = 5
"""How many steps errors and sensitivities are measured at."""

_LEAST = 1e-30  # of a squared error, so that its logarithm is finite


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """The error of quantizing the layers of one component.

    Attributes:
        nodes: The layers.
        steps: Of the component's calls.
        errors: Squared relative error of the body's results, [layers, formats, steps].
        output_sensitivity: Squared relative error of the outputs over that of the results, [steps].
        growth: The factor of the sum of errors, [formats].
    """

    nodes: Sequence[fx.Node]
    steps: Sequence[int]
    errors: Tensor
    output_sensitivity: Tensor
    growth: Tensor

    @property
    def output_errors(self) -> Tensor:
        """The squared relative error of the outputs that each layer adds at each step."""
        return self.errors * self.output_sensitivity * self.growth[:, None]


def measure(
    simulator: Simulator,
    candidates: Candidates,
    inputs: Sequence[Sequence[Tensor]],
    settings: Mapping[str, Any],
    progress: Progress = silent,
) -> dict[str, Sensitivity]:
    """Return the sensitivity of each component.

    Args:
        simulator: Of the unquantized program.
        candidates: The formats of each layer.
        inputs: The flat inputs of each request.
        settings: What the numbers depend on besides, as JSON: how weights are rounded.
        progress: Called with what is being done and the fraction done.
    """
    bodies = {name: simulator.program.components[name] for name in candidates}
    position = {n: i for body in bodies.values() for i, n in enumerate(body.graph.nodes)}
    key = {
        "sensitivity": 1,
        **trajectories.identity(simulator.program, inputs),
        "layers": {
            name: {str(position[n]): list(map(str, own)) for n, own in layers.items()}
            for name, layers in candidates.items()
        },
        "steps": simulator.steps,
        "ranges": {name: _ranges(simulator, name, own) for name, own in candidates.items()},
        "settings": dict(settings),
    }
    tensors = trajectories.cached(
        key, lambda: _Profiler(simulator, candidates, inputs, progress).measure()
    )
    return {
        name: Sensitivity(
            list(layers),
            simulator.steps[name],
            tensors[f"{name} errors"],
            tensors[f"{name} effects"],
            tensors["growth"],
        )
        for name, layers in candidates.items()
    }


def _ranges(
    simulator: Simulator, name: str, candidates: Mapping[fx.Node, Sequence[Format]]
) -> list[list[tuple[float, float]]]:
    """Return the (low, high) ranges of inputs with static scales, [layers][steps]."""
    layers = simulator.layers[name]
    nodes = [
        n for n, formats in candidates.items() if any(f.activations == "static" for f in formats)
    ]
    range_of = layers.ranges
    if range_of is None:
        return []
    return [[range_of(layers.by_node[n].x, step) for step in simulator.steps[name]] for n in nodes]


class _Profiler:
    """All measurements, on some requests."""

    def __init__(
        self,
        simulator: Simulator,
        candidates: Candidates,
        inputs: Sequence[Sequence[Tensor]],
        progress: Progress,
    ) -> None:
        self._sim, self._candidates, self._inputs = simulator, candidates, inputs
        self._bodies = {n: PartialEvaluator(simulator.program.components[n]) for n in candidates}
        self._probes = {n: _probes(len(simulator.steps[n])) for n in candidates}
        self._columns = len(next(iter(next(iter(candidates.values())).values())))
        self._progress = progress
        self._done = 0

    def measure(self) -> dict[str, Tensor]:
        """Return the tensors of `Sensitivity`, by component and name."""
        sizes = {
            n: (len(measured), self._columns, len(self._probes[n]))
            for n, measured in self._candidates.items()
        }
        errors = {n: torch.zeros(size, dtype=torch.float64) for n, size in sizes.items()}
        moved = {n: torch.zeros(size[-1], dtype=torch.float64) for n, size in sizes.items()}
        changed = {n: torch.zeros_like(measured) for n, measured in moved.items()}
        whole = torch.zeros(self._columns, dtype=torch.float64)
        for index, request in enumerate(self._inputs):
            values = trajectories.root_values(self._sim.program, request)
            exact = [values[n] for n in g.outputs(self._sim.program.root)]
            for name, at, step in self._visits():
                if (at - index) % len(self._inputs) == 0:  # takes long: one request a probe
                    errors[name][:, :, at] = self._errors(name, step, values)
                change = self._disturb(name, step, values, exact)
                changed[name][at] += change[0]
                moved[name][at] += change[1]
            for column in range(self._columns):
                self._tell(f"running the program with format {column + 1} of {self._columns}")
                outputs = self._sim.run(request, _column(self._candidates, column))
                whole[column] += squared_relative_error(outputs, exact) / len(self._inputs)
        result: dict[str, Tensor] = {}
        predicted = torch.zeros_like(whole)
        for name, measured in errors.items():
            effects = torch.where(changed[name] > _LEAST, moved[name] / changed[name], 0.0)
            result[f"{name} errors"] = self._everywhere(name, measured)
            result[f"{name} effects"] = self._everywhere(name, effects)
            sums = result[f"{name} errors"] * result[f"{name} effects"]
            predicted += sums.sum((0, 2))
        result["growth"] = torch.where(predicted > _LEAST, whole / predicted, 1.0)
        return result

    def _visits(self) -> Iterator[tuple[str, int, int]]:
        """Yield (component, number, step) of each probe."""
        for name, probes in self._probes.items():
            for at, place in enumerate(probes):
                yield name, at, self._sim.steps[name][place]

    def _tell(self, what: str) -> None:
        total = sum(len(x) * len(self._probes[n]) for n, x in self._candidates.items())
        self._progress(what, min(1.0, self._done / max(1, total)))

    def _everywhere(self, name: str, values: Tensor) -> Tensor:
        """Interpolate the logarithm linearly from the probes to all steps."""
        logs = values.clamp_min(_LEAST).log().reshape(-1, values.shape[-1])
        steps = np.arange(len(self._sim.steps[name]))
        rows = [np.interp(steps, self._probes[name], row) for row in logs.numpy()]
        return torch.tensor(np.array(rows)).exp().reshape(*values.shape[:-1], len(steps))

    def _calls(self, name: str, step: int) -> list[fx.Node]:
        return [call for call, at in self._sim.scope.calls[name] if at == step]

    def _errors(self, name: str, step: int, outer: Mapping[fx.Node, Any]) -> Tensor:
        """Return the squared relative error of the results in a step, [layers, formats]."""
        total = torch.zeros(len(self._candidates[name]), self._columns, dtype=torch.float64)
        calls, body = self._calls(name, step), self._bodies[name]
        layers = self._sim.layers[name]
        for call in calls:
            arguments = [outer[n] for n in args(call)]
            with torch.no_grad():
                values = body.everything(arguments)
                parameters = g.placeholders(self._sim.program.components[name])
                values.update(zip(parameters, arguments, strict=True))
                exact = [values[r] for r in body.results]
                for row, (node, formats) in enumerate(self._candidates[name].items()):
                    self._done += 1
                    self._tell(f"measuring {name}, step {step}, layer {row + 1} of {len(total)}")
                    for column, fmt in enumerate(formats):
                        y = layers.value(node, fmt, step, values.__getitem__)
                        changed = body.run(arguments, {node: y}, known=values)
                        error = squared_relative_error([changed[r] for r in body.results], exact)
                        total[row, column] += error / len(calls)
        return total

    def _disturb(
        self, name: str, step: int, known: Mapping[fx.Node, Any], exact: Sequence[Tensor]
    ) -> tuple[float, float]:
        """Quantize a step's calls; return the squared relative errors of results and of outputs."""
        first_formats = {node: formats[0] for node, formats in self._candidates[name].items()}
        changed = {
            call: self._sim.call(name, first_formats, step, [known[n] for n in args(call)])
            for call in self._calls(name, step)
        }
        changes = [
            squared_relative_error(results, known[call]) for call, results in changed.items()
        ]
        outputs = rerun(self._sim.program, known, changed)
        return sum(changes) / len(changes), squared_relative_error(outputs, exact)


def _column(candidates: Candidates, column: int) -> dict[str, dict[fx.Node, Format]]:
    """Return one column of the candidates as the format of each layer."""
    return {
        name: {node: formats[column] for node, formats in layers.items()}
        for name, layers in candidates.items()
    }


def _probes(count: int) -> list[int]:
    """Return a few of `count` places, evenly spread, with the first and the last."""
    few = min(PROBES, count)
    return sorted({round(k * (count - 1) / max(1, few - 1)) for k in range(few)})
