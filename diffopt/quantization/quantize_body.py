"""Insert Q/DQ into the bodies of a program, for layers whose formats are decided elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, fx

from diffopt.analysis.scope import Scope, by_step
from diffopt.execution import trajectories
from diffopt.ir import graph as g
from diffopt.ir import qdq, step_tables
from diffopt.ir.flops import graph_flops
from diffopt.ir.nodes import args, module_path, stored_tensor
from diffopt.ir.program import Program
from diffopt.progress import Progress
from diffopt.quantization import adaround, ranges, weight_rounding
from diffopt.quantization.tensor_memo import TensorMemo

aten = torch.ops.aten

Activations = Literal["static", "dynamic", "rows", "none"]

MIN_GROUP = 16
"""The least group size: a row that no size from it to the format's divides has one scale."""
INT4_GROUP = 64
"""The default group size of 4-bit weights."""
ROUNDING_CALLS = 64
"""Calls of the denoiser that rounding is learned on."""


@dataclass(frozen=True)
class Format:
    """How a layer is quantized.

    Attributes:
        number: The number format of its weight.
        activations: How its input's scales are determined; "none": the input is not quantized.
        group: How many weights of a row share a scale; None: all of an output.
    """

    number: qdq.Number
    activations: Activations
    group: int | None = None

    @property
    def input(self) -> qdq.Number:
        """The number format of its input, if that is quantized."""
        return "fp8" if self.number == "fp8" else "int8"

    def for_layer(self, layer: qdq.Layer) -> Format:
        """Return the nearest format that a layer supports: inputs of convolutions have no rows."""
        rows = self.activations == "rows" and layer.convolution
        fmt = replace(self, activations="dynamic") if rows else self
        return fmt.that_fits(layer.weight.meta["val"])

    def that_fits(self, weight: Tensor) -> Format:
        """Return the format with the largest group size, up to its own, that divides a row."""
        if self.group is None:
            return self
        row, least = weight[0].numel(), min(self.group, MIN_GROUP)
        sizes = range(self.group, least - 1, -1)
        return replace(self, group=next((n for n in sizes if row % n == 0), None))

    def __str__(self) -> str:
        weights = self.number if self.group is None else f"{self.number} by {self.group}"
        return weights if self.activations == "none" else f"{weights}, {self.activations}"


Formats = dict[str, dict[fx.Node, Format]]
"""The formats of layers' nodes, by component."""

RangeOf = Callable[[fx.Node, int], tuple[float, float]]
"""Returns the (low, high) range of a node's value in a step, or in its group of steps."""


def quantize_body(
    program: Program,
    name: str,
    formats: Mapping[fx.Node, Format],
    calls: Sequence[tuple[fx.Node, int]],
    range_of: RangeOf | None,
    store: WeightStore,
) -> None:
    """Quantize layers of a component in place.

    Args:
        program: Where it is.
        name: The component.
        formats: Of the layers to quantize, by their nodes.
        calls: Its calls, each with its step.
        range_of: The ranges of inputs with static scales.
        store: Quantizes weights, each once.
    """
    gm = program.components[name]
    layers = [layer for layer in qdq.layers(gm) if layer.node in formats]
    static_index: dict[tuple[fx.Node, qdq.Number], int] = {}
    for layer in layers:
        if formats[layer.node].activations == "static":
            static_index.setdefault((layer.x, formats[layer.node].input), len(static_index))
    scales: _StaticScales | None = None
    if range_of and static_index:
        scales = _StaticScales(program, name, list(static_index), calls, range_of)
    inputs: dict[tuple[fx.Node, Activations, qdq.Number], fx.Node] = {}
    weights: dict[tuple[fx.Node, Format], fx.Node] = {}
    for layer in layers:
        fmt, x = formats[layer.node], layer.x
        with gm.graph.inserting_before(layer.node):
            if (layer.weight, fmt) not in weights:
                tensor = stored_tensor(gm, layer.weight)
                assert tensor is not None
                weights[layer.weight, fmt] = qdq.place_weight(
                    gm, str(layer.weight.target), store(tensor, fmt), tensor.dtype
                )
            key = x, fmt.activations, fmt.input
            if key not in inputs and fmt.activations != "none":
                index = static_index.get((x, fmt.input)) if fmt.activations == "static" else None
                qparams = scales.at(index, fmt.input) if scales and index is not None else ()
                inputs[key] = qdq.quantize(gm, x, fmt.activations, *qparams, number=fmt.input)
        layer.node.args = (inputs.get(key, x), weights[layer.weight, fmt], *args(layer.node)[2:])


def embedding_lookups(gm: fx.GraphModule) -> list[fx.Node]:
    """Return the operators that look up rows of floating-point embedding tables."""
    return [
        node
        for node in gm.graph.find_nodes(op="call_function", target=aten.embedding.default)
        if (tensor := stored_tensor(gm, args(node)[0])) is not None and tensor.is_floating_point()
    ]


def quantize_embedding(gm: fx.GraphModule, node: fx.Node, fmt: Format, store: WeightStore) -> None:
    """Quantize the table of an embedding lookup."""
    source = args(node)[0]
    tensor = stored_tensor(gm, source)
    assert tensor is not None
    packed = store(tensor, fmt.that_fits(tensor))
    with gm.graph.inserting_before(node):
        table = qdq.place_weight(gm, str(source.target), packed, tensor.dtype)
    node.update_arg(0, table)


class _StaticScales:
    """A body's static scales and zero points: constants, or a row of a table for each call."""

    def __init__(
        self,
        program: Program,
        name: str,
        sites: Sequence[tuple[fx.Node, qdq.Number]],
        calls: Sequence[tuple[fx.Node, int]],
        range_of: RangeOf,
    ) -> None:
        self._gm = gm = program.components[name]
        scales, zeros = [], []
        for _, step in calls:
            pairs = [range_qparams(number, *range_of(node, step)) for node, number in sites]
            scales.append(torch.tensor([scale for scale, _ in pairs], dtype=torch.float32))
            zeros.append(torch.tensor([zero for _, zero in pairs], dtype=torch.int32))
        self._nodes = []
        for rows, what in ((scales, "scales"), (zeros, "zeros")):
            if all(torch.equal(row, rows[0]) for row in rows):
                with gm.graph.inserting_before(step_tables.first_after_arguments(gm)):
                    self._nodes.append(g.get_attr(gm, f"input_{what}", rows[0]))
                continue
            node = step_tables.add_placeholder(gm, f"input_{what}")
            node.meta["val"] = g.fake(rows[0])
            step_tables.pass_rows(program.root, [call for call, _ in calls], rows, f"{name}_{what}")
            self._nodes.append(node)

    def at(self, index: int, number: qdq.Number) -> tuple[fx.Node, ...]:
        """Insert and return the scale (and zero point) of the input at an index."""
        wanted = self._nodes[:1] if number == "fp8" else self._nodes
        return tuple(g.call(self._gm.graph, aten.select.int, n, 0, index) for n in wanted)


def range_qparams(number: qdq.Number, low: float, high: float) -> tuple[float, int]:
    """Return the scale and zero point that quantize a range."""
    if number == "fp8":
        return max(-low, high, qdq.EPS) / qdq.FP8_MAX, 0
    return ranges.affine(low, high)


def keep_steps(program: Program, scope: Scope, steps: Collection[int]) -> Scope:
    """Retarget the loop's calls of some steps to copies of their bodies; return all other calls."""
    calls = dict(scope.calls)
    for name in scope.loop:
        kept = [call for call, step in calls[name] if step in steps]
        calls[name] = [(call, step) for call, step in calls[name] if step not in steps]
        if not calls[name]:
            del calls[name]
        elif kept:
            copy = program.add_component(f"{name}_kept", g.clone(program.components[name]))
            for call in kept:
                call.target = copy
    return Scope(calls, [name for name in scope.loop if name in calls], scope.weights)


class WeightStore:
    """Quantize weights, each once, however many bodies read it.

    Attributes:
        scale: How the scales of weights are chosen.
        before: Bytes of the weights that were quantized.
        after: Bytes of their numbers and scales.
    """

    def __init__(self, scale: weight_rounding.Scale, is_wide: bool = True) -> None:
        """Choose how.

        Args:
            scale: How the scales of weights are chosen.
            is_wide: Whether weights in groups are rounded to int8 again for integer kernels.
        """
        self.before = self.after = 0
        self.scale = scale
        self._is_wide = is_wide
        self._memo = TensorMemo()
        self._learned: dict[int, tuple[Tensor, qdq.Packed]] = {}

    def prefer(self, tensor: Tensor, packed: qdq.Packed) -> None:
        """Use these numbers for a weight, in place of the nearest ones."""
        self._learned[id(tensor)] = tensor, packed

    def __call__(self, tensor: Tensor, fmt: Format) -> qdq.Packed:
        """Return a weight [out, in, …] in a format."""
        is_wide = fmt.activations != "none" and fmt.number != "fp8" and fmt.group is not None
        key = fmt.number, fmt.group, is_wide and self._is_wide
        return self._memo.get(tensor, key, lambda: self._make(tensor, *key))

    def _make(
        self, tensor: Tensor, number: qdq.Number, group: int | None, is_wide: bool
    ) -> qdq.Packed:
        if id(tensor) in self._learned:
            packed = self._learned[id(tensor)][1]
        else:
            plain = tensor.detach().float()
            packed = weight_rounding.quantize_weight(plain, number, group, self.scale)
        if is_wide:
            packed = weight_rounding.rounded_to_int8(packed)
        self.before += tensor.nbytes
        self.after += packed.bytes
        return packed


# Calibration


@dataclass(frozen=True, eq=False)
class Calibration:
    """The layers to quantize, and the requests to calibrate them on.

    Attributes:
        program: Where the layers are.
        scope: The components' calls.
        formats: Of the layers.
        inputs: The flat inputs of requests.
        progress: Called with what is being done and the fraction done.
    """

    program: Program
    scope: Scope
    formats: Formats
    inputs: Sequence[Sequence[Tensor]]
    progress: Progress

    def layers(self, names: Iterable[str]) -> list[tuple[fx.GraphModule, qdq.Layer, Format]]:
        """Return the layers to quantize of some components, each with its body and format."""
        bodies = [(self.program.components[n], self.formats.get(n, {})) for n in names]
        return [(gm, x, own[x.node]) for gm, own in bodies for x in qdq.layers(gm) if x.node in own]


def calibrate_ranges(
    job: Calibration, observer: ranges.Observer, groups: int
) -> tuple[dict[str, RangeOf], dict[str, list[list[int]]]]:
    """Return the ranges of inputs with static scales, and the groups of steps, by component.

    Args:
        job: The layers and requests.
        observer: How a range is chosen.
        groups: How many groups of steps have ranges of their own; 0: as many as differ.
    """
    sites: dict[str, dict[fx.Node, str]] = {}
    for name, layer_formats in job.formats.items():
        for layer in qdq.layers(job.program.components[name]):
            if layer.node in layer_formats and layer_formats[layer.node].activations == "static":
                sites.setdefault(name, {})[layer.x] = f"{name}.{module_path(layer.node)}"
    if not sites:
        return {}, {}
    labels = {node: label for nodes in sites.values() for node, label in nodes.items()}
    calls = by_step(job.scope)
    measured = ranges.measure(job.program, calls, job.inputs, labels, observer, job.progress)
    range_of: dict[str, RangeOf] = {}
    grouped: dict[str, list[list[int]]] = {}
    for name, nodes in sites.items():
        steps = sorted({step for _, step in job.scope.calls[name]})
        grouped[name] = ranges.group_steps([measured[node] for node in nodes], steps, groups)
        range_of[name] = _by_group(measured, grouped[name])
    return range_of, grouped


def _by_group(measured: Mapping[fx.Node, ranges.Ranges], groups: list[list[int]]) -> RangeOf:
    group = {step: members for members in groups for step in members}
    return lambda node, step: measured[node].over(group[step])


def learn_rounding(
    job: Calibration, range_of: Mapping[str, RangeOf], store: WeightStore, seed: int
) -> int:
    """Put learned roundings of weights into `store`; return of how many layers.

    They are learned on the loop's body with most FLOPs; others share its weights.
    """
    program, scope = job.program, job.scope
    names = [name for name in scope.loop if name in job.formats]
    name = max(names, key=lambda n: graph_flops(program.components[n]), default=None)
    if name is None:
        return 0
    body, trial = program.components[name], program.clone()
    copy, root = (
        {n.name: n for n in gm.graph.nodes} for gm in (trial.components[name], trial.root)
    )
    formats = {copy[node.name]: fmt for node, fmt in job.formats[name].items()}
    calls = [(root[call.name], step) for call, step in scope.calls[name]]
    original = {copy[node.name]: node for node in body.graph.nodes}

    def range_of_copy(node: fx.Node, step: int) -> tuple[float, float]:
        return range_of[name](original[node], step)

    plain = WeightStore(store.scale, is_wide=False)
    quantize_body(trial, name, formats, calls, range_of_copy, plain)
    trial.refresh()
    steps = {(step, number): call for number, (call, step) in enumerate(calls)}
    visits = [v for tensors in job.inputs for v in trajectories.steps(trial, steps, tensors)]
    stride = -(-len(visits) // ROUNDING_CALLS)
    samples = [visit.arguments for visit in visits[::stride]]
    better = adaround.reconstruct(
        body, trial.components[name], samples, seed=seed, progress=job.progress
    )
    for layer in qdq.layers(body):
        tensor = stored_tensor(body, layer.weight)
        if layer.node.name in better and tensor is not None:
            store.prefer(tensor, better[layer.node.name])
    return len(better)
