"""Choose formats by error and cost: `quantize(auto)`, and the report of `diffopt sensitivity`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx

from diffopt.core.equivalence import squared_relative_error
from diffopt.errors import DiffoptError
from diffopt.execution.trajectories import run_root
from diffopt.ir import qdq
from diffopt.ir.flops import node_flops
from diffopt.ir.nodes import module_path, stored_tensor
from diffopt.progress import Progress
from diffopt.quantization import knapsack, sensitivity
from diffopt.quantization.quantize_body import (
    INT4_GROUP,
    Activations,
    Format,
    Formats,
    WeightStore,
)
from diffopt.quantization.sensitivity import Sensitivity
from diffopt.quantization.simulate import Simulator
from diffopt.spec import suggest

Goal = Literal["size", "speed", "both"]

BUDGET = 0.02

SENSITIVITY_REQUESTS = 2
"""How many requests sensitivity is measured on."""

HELD_OUT_REQUESTS = 3
"""How many requests, apart from those of calibration, a choice is measured on."""

INT8_COST = 0.5
"""The cost of an 8-bit matrix product relative to a 16-bit one."""


def format_label(fmt: Format) -> str:
    """Return what users call a format, without the group size, which depends on the layer."""
    inputs = "weights alone" if fmt.activations == "none" else fmt.activations
    return f"{fmt.number}, {inputs}"


def formats_to_try(
    numbers: Sequence[str], activations: Activations, group: int | None = None
) -> list[Format]:
    """Return the formats to try: each with quantized inputs, and of weights alone."""
    if not numbers:
        raise DiffoptError("there is no format to try: write some of int8, int4, fp8")
    ways: list[Activations] = list(dict.fromkeys((activations, "none")))
    known: tuple[qdq.Number, ...] = get_args(qdq.Number)
    formats = []
    for text in dict.fromkeys(numbers):
        if text not in known:
            raise DiffoptError(f"there is no format '{text}'{suggest(text, known)}")
        number = known[known.index(text)]
        group_size = (INT4_GROUP if group is None else group or None) if number == "int4" else None
        formats += [Format(number, way, group_size) for way in ways]
    return formats


def layer_candidates(
    simulator: Simulator, nodes: Mapping[str, Sequence[fx.Node]], tried: Sequence[Format]
) -> dict[str, dict[fx.Node, list[Format]]]:
    """Return, for each layer, the formats nearest to `tried` that it supports, by component."""
    candidates: dict[str, dict[fx.Node, list[Format]]] = {}
    for name, own in nodes.items():
        plain = list(tried)
        if name in simulator.scope.weights:
            plain = [replace(fmt, activations="none") for fmt in tried]
        layers = simulator.layers[name].by_node
        candidates[name] = {node: [fmt.for_layer(layers[node]) for fmt in plain] for node in own}
    return candidates


@dataclass(frozen=True, eq=False)
class WeightChoice:
    """The formats to choose from for one weight and the layers, in all bodies, that read it.

    Attributes:
        layers: Each with its component.
        label: The first layer's component and module.
        formats: The candidates, [layers][formats].
        errors: Predicted squared relative error of the outputs, [formats, steps].
        sizes: Bytes of the weight unquantized, then in each format.
        flops: Of all calls unquantized, then in each format, in terms of 16-bit FLOPs.
    """

    layers: list[tuple[str, fx.Node]]
    label: str
    formats: list[list[Format]]
    errors: Tensor
    sizes: list[int]
    flops: list[float]


def weight_choices(
    simulator: Simulator,
    tried: Mapping[str, Mapping[fx.Node, Sequence[Format]]],
    measured: Mapping[str, Sensitivity],
    store: WeightStore,
) -> list[WeightChoice]:
    """Return the weights to choose formats for, in the order of the graphs."""
    choices: dict[int, WeightChoice] = {}
    count = 1 + max(step for by_layer in simulator.steps.values() for step in by_layer)
    for name, by_layer in tried.items():
        body, calls = simulator.program.components[name], len(simulator.scope.calls[name])
        parts = measured[name].output_errors
        for row, (node, formats) in enumerate(by_layer.items()):
            layer = simulator.layers[name].by_node[node]
            tensor = stored_tensor(body, layer.weight)
            assert tensor is not None
            if id(tensor) not in choices:
                sizes = [tensor.nbytes, *(store(tensor, fmt).bytes for fmt in formats)]
                errors = torch.zeros(len(formats), count, dtype=torch.float64)
                path = f"{name}.{module_path(layer.node)}"
                choices[id(tensor)] = WeightChoice([], path, [], errors, sizes, [0.0] * len(sizes))
            item = choices[id(tensor)]
            item.layers.append((name, node))
            item.formats.append(list(formats))
            item.errors[:, list(measured[name].steps)] += parts[row]
            cost = float(calls * node_flops(node))
            for index, fmt in enumerate((None, *formats)):
                is_fast = fmt is not None and fmt.activations != "none"
                item.flops[index] += cost * (INT8_COST if is_fast else 1.0)
    return list(choices.values())


def choice_costs(choices: Sequence[WeightChoice], goal: Goal) -> Tensor:
    """Return the cost of each format of each weight, unquantized first: [weights, 1 + formats]."""
    sizes = torch.tensor([item.sizes for item in choices], dtype=torch.float64)
    flops = torch.tensor([item.flops for item in choices], dtype=torch.float64)
    sizes, flops = (t / t[:, 0].sum().clamp_min(1) for t in (sizes, flops))
    return {"size": sizes, "speed": flops, "both": sizes + flops}[goal]


@dataclass(frozen=True, eq=False)
class FormatSearch:
    """A search for the formats of layers.

    Attributes:
        simulator: Of the program.
        nodes: The layers to choose for, by component.
        tried: The formats to choose from.
        goal: What to minimise.
        budget: The largest relative error of the outputs of any request.
        inputs: The requests to measure sensitivity with.
        held_out: The requests to measure choices on.
        store: Quantizes weights.
        progress: Called with what is being done and the fraction done.
    """

    simulator: Simulator
    nodes: Mapping[str, Sequence[fx.Node]]
    tried: Sequence[Format]
    goal: Goal
    budget: float
    inputs: Sequence[Sequence[Tensor]]
    held_out: Sequence[Sequence[Tensor]]
    store: WeightStore
    progress: Progress

    def run(self) -> tuple[Formats, dict[str, Any]]:
        """Return the formats of least cost within the budget, and the notes of the pass."""
        # Quantized inputs save no bytes.
        tried = [c for c in self.tried if self.goal != "size" or c.activations == "none"]
        formats = layer_candidates(self.simulator, self.nodes, tried)
        settings = {"scale": self.store.scale}
        measured = sensitivity.measure(
            self.simulator, formats, self.inputs, settings, self.progress
        )
        choices = weight_choices(self.simulator, formats, measured, self.store)
        errors = torch.stack([torch.cat([torch.zeros(1), item.errors.sum(1)]) for item in choices])
        program, tries = self.simulator.program, 0
        exact = [run_root(program, request) for request in self.held_out]

        def measure(indices: Sequence[int]) -> float:
            nonlocal tries
            tries += 1
            return self._worst_error(_formats_of(choices, indices), exact, tries)

        costs = choice_costs(choices, self.goal)
        best = knapsack.search_within(errors, costs, self.budget, measure)
        if best is None:
            least = float(errors[:, 1:].min()) ** 0.5
            raise DiffoptError(
                f"no format of any layer is within budget={self.budget:g}: the least error that one"
                f" adds is {least:.2g}; allow more, or leave quantize out"
            )
        chosen = _formats_of(choices, best.choice)
        every = [fmt for layers in chosen.values() for fmt in layers.values()]
        counts = Counter(map(format_label, every))
        counts["as it was"] = sum(map(len, self.nodes.values())) - len(every)
        return chosen, {
            "budget": self.budget,
            "predicted error": best.predicted,
            "measured error": best.measured,
            "tries": tries,
            "layers": {name: count for name, count in sorted(counts.items()) if count},
        }

    def _worst_error(
        self, formats: Formats, exact: Sequence[Sequence[Tensor]], number: int
    ) -> float:
        """Return the largest relative error of any held-out request."""
        worst = 0.0
        for index, request in enumerate(self.held_out):
            fraction = index / len(self.held_out)
            self.progress(f"trying formats, {number}: request {index + 1}", fraction)
            outputs = self.simulator.run(request, formats)
            worst = max(worst, squared_relative_error(outputs, exact[index]) ** 0.5)
            if worst > 1.5 * self.budget:
                break  # the exact error of a choice this far over the budget is not needed
        return worst


def _formats_of(choices: Sequence[WeightChoice], indices: Sequence[int]) -> Formats:
    formats_of: Formats = {}
    for item, index in zip(choices, indices, strict=True):
        for (name, node), formats in zip(item.layers, item.formats, strict=True):
            if index:
                formats_of.setdefault(name, {})[node] = formats[index - 1]
    return formats_of
