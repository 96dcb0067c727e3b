"""Writes Q/DQ into the bodies of a program; which layer gets which format is others' choice."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, fx

from diffopt.analysis.scope import Scope, by_step
from diffopt.execution import trajectories
from diffopt.ir import graph as g
from diffopt.ir import qdq, step_tables
from diffopt.ir.flops import graph_flops
from diffopt.ir.nodes import args, stored_tensor
from diffopt.ir.program import Program
from diffopt.progress import Progress
from diffopt.quantization import adaround, ranges, weight_rounding
from diffopt.quantization.tensor_memo import Shared

aten = torch.ops.aten

Activations = Literal["static", "dynamic", "rows", "none"]

LEAST_GROUP = 16
"""A row that no group from this on divides has one scale: 54 inputs share one where 9 x 96 are."""
INT4_GROUP = 64
"""How many inputs share a scale of 4-bit weights, unless one says otherwise."""
CALLS = 64
"""On how many calls of the denoiser rounding is learned."""


@dataclass(frozen=True)
class Format:
    """How a layer is quantized.

    Attributes:
        number: What its weight is stored as.
        activations: Where its input's scales come from; "none": the input is not quantized.
        group: How many weights of a row share a scale; None: all of an output.
    """

    number: qdq.Number
    activations: Activations
    group: int | None = None

    @property
    def input(self) -> qdq.Number:
        """What its input is quantized to, if it is."""
        return "fp8" if self.number == "fp8" else "int8"

    def for_layer(self, layer: qdq.Layer) -> Format:
        """Return the format as far as a layer can have it: convolutions have no rows."""
        rows = self.activations == "rows" and layer.convolution
        how = replace(self, activations="dynamic") if rows else self
        return how.that_fits(layer.weight.meta["val"])

    def that_fits(self, weight: Tensor) -> Format:
        """Return the format with the largest group of at most its own that divides a row."""
        if self.group is None:
            return self
        row, least = weight[0].numel(), min(self.group, LEAST_GROUP)
        sizes = range(self.group, least - 1, -1)
        return replace(self, group=next((n for n in sizes if row % n == 0), None))

    def __str__(self) -> str:
        weights = self.number if self.group is None else f"{self.number} by {self.group}"
        return weights if self.activations == "none" else f"{weights}, {self.activations}"


Formats = dict[str, dict[fx.Node, Format]]
"""Of layers' nodes, by component."""

Range = Callable[[fx.Node, int], tuple[float, float]]
"""Returns the range that a value has in a step (or in its group of steps)."""


def module(node: fx.Node) -> str:
    """Return what the user calls a layer's node: the path of its module, or its own name."""
    return str(node.meta.get("module") or node.name)


def quantize_body(
    program: Program,
    name: str,
    formats: Mapping[fx.Node, Format],
    at: Sequence[tuple[fx.Node, int]],
    found: Range | None,
    store: Store,
) -> None:
    """Quantize layers of a component in place.

    Args:
        program: Where it is.
        name: The component.
        formats: Of the layers to quantize, by their nodes.
        at: Its calls, each with its step.
        found: The ranges of inputs with static scales.
        store: Quantizes weights; asked for the same weight again, it returns the same.
    """
    gm = program.components[name]
    own = [layer for layer in qdq.layers(gm) if layer.node in formats]
    static: dict[tuple[fx.Node, qdq.Number], int] = {}
    for layer in own:
        if formats[layer.node].activations == "static":
            static.setdefault((layer.x, formats[layer.node].input), len(static))
    rows = _Rows(program, name, list(static), at, found) if found and static else None
    inputs: dict[tuple[fx.Node, Activations, qdq.Number], fx.Node] = {}
    placed: dict[tuple[fx.Node, Format], fx.Node] = {}
    for layer in own:
        how, x = formats[layer.node], layer.x
        with gm.graph.inserting_before(layer.node):
            if (layer.weight, how) not in placed:
                tensor = stored_tensor(gm, layer.weight)
                assert tensor is not None
                placed[layer.weight, how] = qdq.place_weight(
                    gm, str(layer.weight.target), store(tensor, how), tensor.dtype
                )
            key = x, how.activations, how.input
            if key not in inputs and how.activations != "none":
                at_step = static.get((x, how.input)) if how.activations == "static" else None
                given = rows.at(at_step, how.input) if rows and at_step is not None else ()
                inputs[key] = qdq.quantize(gm, x, how.activations, *given, number=how.input)
        layer.node.args = (inputs.get(key, x), placed[layer.weight, how], *args(layer.node)[2:])


def readers_of_tables(gm: fx.GraphModule) -> list[fx.Node]:
    """Return the operators that read rows of tables of embeddings in floating point."""
    return [
        node
        for node in gm.graph.find_nodes(op="call_function", target=aten.embedding.default)
        if (tensor := stored_tensor(gm, args(node)[0])) is not None and tensor.is_floating_point()
    ]


def quantize_table(gm: fx.GraphModule, node: fx.Node, how: Format, store: Store) -> None:
    """Quantize the table that an operator reads rows of."""
    source = args(node)[0]
    tensor = stored_tensor(gm, source)
    assert tensor is not None
    packed = store(tensor, how.that_fits(tensor))
    with gm.graph.inserting_before(node):
        table = qdq.place_weight(gm, str(source.target), packed, tensor.dtype)
    node.update_arg(0, table)


class _Rows:
    """A body's static scales and zero points: constants, or one row of a table for each call."""

    def __init__(
        self,
        program: Program,
        name: str,
        sites: Sequence[tuple[fx.Node, qdq.Number]],
        at: Sequence[tuple[fx.Node, int]],
        found: Range,
    ) -> None:
        self._gm = gm = program.components[name]
        scales, zeros = [], []
        for _, step in at:
            pairs = [qparams(number, *found(node, step)) for node, number in sites]
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
            step_tables.pass_rows(program.root, [call for call, _ in at], rows, f"{name}_{what}")
            self._nodes.append(node)

    def at(self, index: int, number: qdq.Number) -> tuple[fx.Node, ...]:
        """Insert what a layer's input is scaled with."""
        wanted = self._nodes[:1] if number == "fp8" else self._nodes
        return tuple(g.call(self._gm.graph, aten.select.int, n, 0, index) for n in wanted)


def qparams(number: qdq.Number, low: float, high: float) -> tuple[float, int]:
    """Return the scale and zero point with which a range is quantized."""
    if number == "fp8":
        return max(-low, high, qdq.EPS) / qdq.FP8_MAX, 0
    return ranges.affine(low, high)


def keep_steps(program: Program, scope: Scope, steps: Collection[int]) -> Scope:
    """Let the loop's calls of some steps go to bodies that stay as they are; return the others."""
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


class Store:
    """Quantizes weights, each once, however many bodies use it.

    Attributes:
        scale: How the ranges of weights are chosen.
        before: Bytes of the weights that were quantized.
        after: What they take now.
    """

    def __init__(self, scale: weight_rounding.Scale, is_wide: bool = True) -> None:
        """Choose how.

        Args:
            scale: How the ranges of weights are chosen.
            is_wide: Whether weights in groups are rounded again for kernels for integers.
        """
        self.before = self.after = 0
        self.scale = scale
        self._is_wide = is_wide
        self._shared = Shared()
        self._better: dict[int, tuple[Tensor, qdq.Packed]] = {}

    def prefer(self, tensor: Tensor, packed: qdq.Packed) -> None:
        """Take these numbers for a weight, in place of the nearest ones."""
        self._better[id(tensor)] = tensor, packed

    def __call__(self, tensor: Tensor, how: Format) -> qdq.Packed:
        """Return a weight [out, in, …] in a format."""
        is_wide = how.activations != "none" and how.number != "fp8" and how.group is not None
        key = how.number, how.group, is_wide and self._is_wide
        return self._shared.get(tensor, key, lambda: self._make(tensor, *key))

    def _make(
        self, tensor: Tensor, number: qdq.Number, group: int | None, is_wide: bool
    ) -> qdq.Packed:
        if id(tensor) in self._better:
            packed = self._better[id(tensor)][1]
        else:
            plain = tensor.detach().float()
            packed = weight_rounding.quantize_weight(plain, number, group, self.scale)
        if is_wide:
            packed = weight_rounding.widened(packed)
        self.before += tensor.nbytes
        self.after += packed.bytes
        return packed


# Calibration


def calibrated(
    program: Program,
    scope: Scope,
    formats: Formats,
    inputs: Sequence[Sequence[Tensor]],
    observer: ranges.Observer,
    groups: int,
    progress: Progress,
) -> tuple[dict[str, Range], dict[str, list[list[int]]]]:
    """Return the ranges of what layers with static scales read, and the groups of steps of each.

    Args:
        program: Where the layers are.
        scope: The components' calls.
        formats: Of the layers.
        inputs: The flat inputs of requests.
        observer: How a range is chosen.
        groups: How many groups of steps have their own; 0: as many as differ.
        progress: Called with what is being done and the fraction done.
    """
    sites: dict[str, dict[fx.Node, str]] = {}
    for name, own in formats.items():
        for layer in qdq.layers(program.components[name]):
            if layer.node in own and own[layer.node].activations == "static":
                sites.setdefault(name, {})[layer.x] = f"{name}.{module(layer.node)}"
    if not sites:
        return {}, {}
    every = {node: text for own in sites.values() for node, text in own.items()}
    found = ranges.measure(program, by_step(scope), inputs, every, observer, progress)
    made: dict[str, Range] = {}
    grouped: dict[str, list[list[int]]] = {}
    for name, nodes in sites.items():
        steps = sorted({step for _, step in scope.calls[name]})
        grouped[name] = ranges.group_steps([found[node] for node in nodes], steps, groups)
        made[name] = _by_group(found, grouped[name])
    return made, grouped


def _by_group(found: Mapping[fx.Node, ranges.Ranges], groups: list[list[int]]) -> Range:
    group = {step: members for members in groups for step in members}
    return lambda node, step: found[node].over(group[step])


def learn_rounding(
    program: Program,
    scope: Scope,
    formats: Formats,
    found: Mapping[str, Range],
    inputs: Sequence[Sequence[Tensor]],
    store: Store,
    seed: int,
    progress: Progress,
) -> int:
    """Let `store` have better numbers than the nearest; return of how many layers.

    They are learned on the body on which most is spent; others share its weights.
    """
    names = [name for name in scope.loop if name in formats]
    name = max(names, key=lambda n: graph_flops(program.components[n]), default=None)
    if name is None:
        return 0
    body, trial = program.components[name], program.clone()
    copy, root = (
        {n.name: n for n in gm.graph.nodes} for gm in (trial.components[name], trial.root)
    )
    own = {copy[node.name]: how for node, how in formats[name].items()}
    at = [(root[call.name], step) for call, step in scope.calls[name]]
    original = {copy[node.name]: node for node in body.graph.nodes}
    given = found.get(name)

    def here(node: fx.Node, step: int) -> tuple[float, float]:
        assert given is not None
        return given(original[node], step)

    plain = Store(store.scale, is_wide=False)
    quantize_body(trial, name, own, at, here, plain)
    trial.refresh()
    steps = {(step, number): call for number, (call, step) in enumerate(at)}
    visits = [v for tensors in inputs for v in trajectories.steps(trial, steps, tensors)]
    stride = -(-len(visits) // CALLS)
    samples = [visit.arguments for visit in visits[::stride]]
    better = adaround.reconstruct(
        body, trial.components[name], samples, seed=seed, progress=progress
    )
    for layer in qdq.layers(body):
        tensor = stored_tensor(body, layer.weight)
        if layer.node.name in better and tensor is not None:
            store.prefer(tensor, better[layer.node.name])
    return len(better)
