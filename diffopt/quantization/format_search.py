"""Chooses formats by what they cost: `quantize(auto)`, and the report of `diffopt sensitivity`."""

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
from diffopt.ir.nodes import stored_tensor
from diffopt.progress import Progress
from diffopt.quantization import knapsack, sensitivity
from diffopt.quantization.quantize_body import (
    INT4_GROUP,
    Activations,
    Format,
    Formats,
    Store,
    module,
)
from diffopt.quantization.sensitivity import Sensitivity
from diffopt.quantization.simulate import Simulator
from diffopt.spec import suggest

Goal = Literal["size", "speed", "both"]

BUDGET = 0.02

FEW = 2
"""On how many requests sensitivity is measured."""

HELD = 3
"""On how many requests, none of which was calibrated with, a choice is tried."""

FASTER = 0.5
"""What a matrix product of 8-bit numbers costs, of one of 16-bit numbers."""


def label(how: Format) -> str:
    """Return what the user calls a format to try of every layer, whatever fits into its rows."""
    inputs = "weights alone" if how.activations == "none" else how.activations
    return f"{how.number}, {inputs}"


def columns(
    numbers: Sequence[str], activations: Activations, group: int | None = None
) -> list[Format]:
    """Return the formats to try: each with quantized inputs, and of weights alone."""
    if not numbers:
        raise DiffoptError("there is no format to try: write some of int8, int4, fp8")
    ways: list[Activations] = list(dict.fromkeys((activations, "none")))
    known: tuple[qdq.Number, ...] = get_args(qdq.Number)
    made = []
    for text in dict.fromkeys(numbers):
        if text not in known:
            raise DiffoptError(f"there is no format '{text}'{suggest(text, known)}")
        number = known[known.index(text)]
        own = (INT4_GROUP if group is None else group or None) if number == "int4" else None
        made += [Format(number, way, own) for way in ways]
    return made


def candidates(
    simulator: Simulator, nodes: Mapping[str, Sequence[fx.Node]], tried: Sequence[Format]
) -> dict[str, dict[fx.Node, list[Format]]]:
    """Return the formats of each layer, by component, that are nearest to those to be tried."""
    made: dict[str, dict[fx.Node, list[Format]]] = {}
    for name, own in nodes.items():
        plain = list(tried)
        if name in simulator.scope.weights:
            plain = [replace(how, activations="none") for how in tried]
        layers = simulator.layers[name].own
        made[name] = {node: [how.for_layer(layers[node]) for how in plain] for node in own}
    return made


@dataclass(frozen=True, eq=False)
class Item:
    """Layers with one weight, in however many bodies: what gets one format.

    Attributes:
        layers: By component.
        label: What the user calls the first of them.
        formats: That can be chosen, of each layer: [layers][formats].
        errors: Squared relative error of the outputs, [formats, steps]: how much is predicted.
        sizes: Bytes of the weight as it is, then in each format.
        flops: Of all calls, as they are, then in each format.
    """

    layers: list[tuple[str, fx.Node]]
    label: str
    formats: list[list[Format]]
    errors: Tensor
    sizes: list[int]
    flops: list[float]


def items(
    simulator: Simulator,
    tried: Mapping[str, Mapping[fx.Node, Sequence[Format]]],
    measured: Mapping[str, Sensitivity],
    store: Store,
) -> list[Item]:
    """Return what there is to choose for, in the order of the graphs."""
    found: dict[int, Item] = {}
    count = 1 + max(step for own in simulator.steps.values() for step in own)
    for name, own in tried.items():
        body, calls = simulator.program.components[name], len(simulator.scope.calls[name])
        parts = measured[name].parts
        for row, (node, formats) in enumerate(own.items()):
            layer = simulator.layers[name].own[node]
            tensor = stored_tensor(body, layer.weight)
            assert tensor is not None
            if id(tensor) not in found:
                sizes = [tensor.nbytes, *(store(tensor, how).bytes for how in formats)]
                errors = torch.zeros(len(formats), count, dtype=torch.float64)
                path = f"{name}.{module(layer.node)}"
                found[id(tensor)] = Item([], path, [], errors, sizes, [0.0] * len(sizes))
            item = found[id(tensor)]
            item.layers.append((name, node))
            item.formats.append(list(formats))
            item.errors[:, list(measured[name].steps)] += parts[row]
            cost = float(calls * node_flops(node))
            for index, how in enumerate((None, *formats)):
                is_fast = how is not None and how.activations != "none"
                item.flops[index] += cost * (FASTER if is_fast else 1.0)
    return list(found.values())


def costs(own: Sequence[Item], goal: Goal) -> Tensor:
    """Return what each format of each item costs, the first one being none: [items, formats]."""
    sizes = torch.tensor([item.sizes for item in own], dtype=torch.float64)
    flops = torch.tensor([item.flops for item in own], dtype=torch.float64)
    sizes, flops = (t / t[:, 0].sum().clamp_min(1) for t in (sizes, flops))
    return {"size": sizes, "speed": flops, "both": sizes + flops}[goal]


def choose(
    simulator: Simulator,
    nodes: Mapping[str, Sequence[fx.Node]],
    tried: Sequence[Format],
    goal: Goal,
    budget: float,
    inputs: Sequence[Sequence[Tensor]],
    held: Sequence[Sequence[Tensor]],
    store: Store,
    progress: Progress,
) -> tuple[Formats, dict[str, Any]]:
    """Return the formats of layers, and what is worth knowing about the choice.

    Args:
        simulator: Of the program.
        nodes: The layers to choose for, by component.
        tried: What there is to choose from.
        goal: What to make little of.
        budget: The relative error of the outputs that no request may be over.
        inputs: The requests to measure sensitivity with.
        held: The requests to try choices on.
        store: Quantizes weights.
        progress: Called with what is being done and the fraction done.
    """
    if goal == "size":
        tried = [c for c in tried if c.activations == "none"]  # quantized inputs save no bytes
    formats = candidates(simulator, nodes, tried)
    measured = sensitivity.measure(simulator, formats, inputs, {"scale": store.scale}, progress)
    own = items(simulator, formats, measured, store)
    exact = [run_root(simulator.program, request, lambda call, given: None) for request in held]
    tries = 0

    def error(choice: Sequence[int]) -> float:
        nonlocal tries
        tries += 1
        worst = 0.0
        for index, request in enumerate(held):
            progress(f"trying formats, {tries}: request {index + 1}", index / len(held))
            made = simulator.run(request, _chosen(own, choice))
            worst = max(worst, squared_relative_error(made, exact[index]) ** 0.5)
            if worst > 1.5 * budget:
                break  # how far it is over the budget need not be known well
        return worst

    errors = torch.stack([torch.cat([torch.zeros(1), item.errors.sum(1)]) for item in own])
    found = knapsack.search(errors, costs(own, goal), budget, error)
    if found is None:
        least = float(errors[:, 1:].min()) ** 0.5
        raise DiffoptError(
            f"no format of any layer is within budget={budget:g}: the least error that one adds is"
            f" {least:.2g}; allow more, or leave quantize out"
        )
    chosen = _chosen(own, found.choice)
    every = [how for layers in chosen.values() for how in layers.values()]
    counts = Counter(map(label, every))
    counts["as it was"] = sum(map(len, nodes.values())) - len(every)
    notes = {
        "budget": budget,
        "predicted error": found.predicted,
        "measured error": found.measured,
        "tries": tries,
        "layers": {name: count for name, count in sorted(counts.items()) if count},
    }
    return chosen, notes


def _chosen(own: Sequence[Item], choice: Sequence[int]) -> Formats:
    made: Formats = {}
    for item, index in zip(own, choice, strict=True):
        for (name, node), formats in zip(item.layers, item.formats, strict=True):
            if index:
                made.setdefault(name, {})[node] = formats[index - 1]
    return made
