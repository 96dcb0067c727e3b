"""Learns whether each weight is rounded up or down, block by block: AdaRound and BRECQ.

A block ends where one of a residual stream does (`anatomy`), or at each layer where there are none.
Each in turn gets its inputs from the quantized blocks before it, and its weights' rounding is
learned so that it returns what it does without quantization:

    w = s * clamp(floor(w0 / s) + h(v), low, high),  h(v) = clamp(1.2 * sigmoid(v) - 0.1, 0, 1)

The loss is the squared error, and 1 - |2 h - 1|^b which draws h to 0 or 1 ever more as b falls. A
block's rounding is kept if its error on held-out samples is less than that of the nearest numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx

from diffopt.analysis.denoiser_structure import analyze_denoiser
from diffopt.errors import DiffoptError
from diffopt.execution import straight_through
from diffopt.execution.segments import Part, Run, cut, results_of
from diffopt.ir import graph as g
from diffopt.ir import qdq
from diffopt.ir.nodes import args, stored_tensor
from diffopt.progress import Progress, silent, within
from diffopt.quantization import weight_rounding

qd = torch.ops.quantized_decomposed


STEPS = 300
"""Of learning a block."""

_ROWS = 32  # of a batch: so many calls are stacked that their leading dimensions add up to it
_RATE = 20.0  # how far Adam can move v in all steps
_STRENGTH = 5.0  # of what draws h to 0 or 1, next to the error of the nearest numbers
_BETA = 20.0, 2.0
_WARM_UP = 0.2  # of the steps are without it
_HELD_OUT = 5  # one sample of so many


def reconstruct(
    body: fx.GraphModule,
    quantized: fx.GraphModule,
    samples: Sequence[Sequence[Tensor]],
    *,
    steps: int = STEPS,
    seed: int = 0,
    max_mb: float = 2048,
    progress: Progress = silent,
) -> dict[str, qdq.Packed]:
    """Return better roundings of whole-number weights, by the names of their layers.

    Layers of blocks that learning does not improve are left out.

    Args:
        body: Before quantization.
        quantized: The same with quantized layers; what both have is called the same.
        samples: Arguments of `quantized`; those that `body` lacks are the last.
        steps: How long a block is learned.
        seed: Of what is drawn.
        max_mb: Memory for what the samples are between blocks; fewer are used if it is too little.
        progress: Called with what is being done and the fraction done.
    """
    if len(samples) < 2:
        raise DiffoptError(
            f"rounding is learned from two samples or more, got {len(samples)}: calibrate on more"
        )
    roundings = _roundings(body, quantized)
    plain, parts = _cut_both(body, quantized, [r.layer for r in roundings])
    samples = _fitting(samples, [*plain, *parts], max_mb)
    count = len(g.placeholders(body))
    before = [Run(body, sample[:count]) for sample in samples]
    after = [Run(quantized, sample) for sample in samples]
    generator = torch.Generator().manual_seed(seed)
    settled: dict[str, qdq.Packed | None] = {}
    for index, (own, part) in enumerate(zip(plain, parts, strict=True)):
        constants = own.constants()
        targets = [run.advance(own, constants) for run in before]
        constants = part.constants()
        here = [r for r in roundings if r.layer in part.nodes]
        # A weight that an earlier block has too is what it became there.
        constants |= _chosen(here, settled)
        told = within(progress, index, len(parts), f"rounding: block {index + 1} of {len(parts)}")
        block = _Block(part, constants, [run.inputs(part) for run in after], targets)
        new = [r for r in here if r.values not in settled]
        is_better = block.learn(new, steps, generator, told)
        settled |= {r.values: r.packed() if is_better else None for r in new}
        constants |= _chosen(here, settled)
        for run in after:
            run.advance(part, constants)
    found = ((r.layer.name, settled[r.values]) for r in roundings)
    return {name: packed for name, packed in found if packed is not None}


# Weights


class _Rounding:
    """What is learned of one layer's weight.

    Attributes:
        layer: The layer's node.
        weight: The node that it reads.
        values: Which stored numbers it has: layers may share them.
        v: What is learned.
    """

    def __init__(self, gm: fx.GraphModule, layer: qdq.Layer, own: qdq.Weight, to: Tensor) -> None:
        self.layer, self.weight = layer.node, layer.weight
        self.values = _root(own.values)
        self.dtype = layer.weight.meta["val"].dtype
        self._is_wide = own.node is not layer.weight
        values, scales = (g.attribute(gm, _root(n)) for n in (own.values, own.scales))
        self._nearest = qdq.Packed(own.number, values, scales, tuple(to.shape), own.group)
        self._scale = weight_rounding.spread(self._nearest)
        self._limits = qdq.LIMITS[own.number]
        exact = to.detach().float() / self._scale
        self._floor = exact.floor()
        share = (exact - self._floor + 0.1) / 1.2
        self.v = share.logit().requires_grad_()

    @property
    def share(self) -> Tensor:
        """How far each weight is on its way up, from 0 to 1."""
        return (self.v.sigmoid() * 1.2 - 0.1).clamp(0, 1)

    def soft(self, share: Tensor) -> Tensor:
        """Return the weight that the layer reads while it is learned."""
        return ((self._floor + share).clamp(*self._limits) * self._scale).to(self.dtype)

    def packed(self) -> qdq.Packed:
        """Return the weight as it was learned."""
        up = self._floor + (self.share.detach() > 0.5)
        values = up.clamp(*self._limits).to(torch.int8)
        old = self._nearest
        packed = qdq.Packed.of(old.number, values, old.scales, old.group)
        return weight_rounding.widened(packed) if self._is_wide else packed


def _roundings(body: fx.GraphModule, quantized: fx.GraphModule) -> list[_Rounding]:
    """Return what can be learned: weights in whole numbers, of which `body` has the exact ones."""
    exact = {layer.node.name: stored_tensor(body, layer.weight) for layer in qdq.layers(body)}
    found = []
    for layer in qdq.layers(quantized):
        own, to = _finest(layer.weight), exact.get(layer.node.name)
        if own is not None and own.number != "fp8" and to is not None:
            found.append(_Rounding(quantized, layer, own, to))
    return found


def _root(node: fx.Node) -> str:
    """Return the name of the stored tensor that a node widens."""
    while node.op != "get_attr":
        node = node.all_input_nodes[0]
    return str(node.target)


def _finest(node: fx.Node) -> qdq.Weight | None:
    """Return a quantized weight as it is stored: what is rounded again was finer before."""
    own = qdq.weight(node)
    if own is None or own.values.target is not qd.quantize_per_channel.default:
        return own
    return qdq.weight(args(own.values)[0])


def _chosen(
    here: Sequence[_Rounding], settled: Mapping[str, qdq.Packed | None]
) -> straight_through.Values:
    """Return the learned weights of layers, by the nodes that they read."""
    found: straight_through.Values = {}
    for rounding in here:
        packed = settled.get(rounding.values)
        if packed is not None:
            found[rounding.weight] = weight_rounding.dequantized(packed).to(rounding.dtype)
    return found


# Blocks


def _cut_both(
    body: fx.GraphModule, quantized: fx.GraphModule, layers: Sequence[fx.Node]
) -> tuple[list[Part], list[Part]]:
    """Return the blocks of both bodies; each has at least one of some layers of the second."""
    names = {node.name: node for node in body.graph.nodes}
    twins = {n: names[n.name] for n in quantized.graph.nodes if n.name in names}
    last = {block.last for block in analyze_denoiser(body, g.placeholders(body)).blocks}
    ends = [n for n, twin in twins.items() if twin in last] or list(layers)
    groups = [([n], [twins[n]]) for n in ends]
    groups.append((g.outputs(quantized), g.outputs(body)))
    waiting, chosen = set(layers), []
    for theirs, own in groups:
        inside = waiting & g.ancestors(theirs)
        if inside:
            chosen.append((theirs, own))
            waiting -= inside
    return cut(body, [own for _, own in chosen]), cut(quantized, [t for t, _ in chosen])


def _fitting(
    samples: Sequence[Sequence[Tensor]], parts: Sequence[Part], max_mb: float
) -> list[Sequence[Tensor]]:
    """Return as many samples, evenly spaced, as there is memory for."""
    most = max((_bytes(part.kept) + _bytes(part.takes) for part in parts), default=0)
    count = max(2, min(len(samples), int(max_mb * 2**20 / max(1, 2 * most))))
    return [samples[i * len(samples) // count] for i in range(count)]


def _bytes(nodes: Iterable[fx.Node]) -> int:
    return g.tensor_bytes([n.meta["val"] for n in nodes])


class _Block:
    """A block, and what it gets and should return for each sample."""

    def __init__(
        self,
        part: Part,
        constants: straight_through.Values,
        inputs: Sequence[list[Tensor]],
        targets: Sequence[list[Tensor]],
    ) -> None:
        self._part, self._constants = part, constants
        self._inputs, self._targets = inputs, targets
        held_out = range(_HELD_OUT - 1, len(inputs), _HELD_OUT) or [len(inputs) - 1]
        self._held_out = list(held_out)
        self._own = [i for i in range(len(inputs)) if i not in held_out]

    def learn(
        self,
        roundings: Sequence[_Rounding],
        steps: int,
        source: torch.Generator,
        progress: Progress,
    ) -> bool:
        """Learn roundings; return whether the block is better with them on held-out samples."""
        unit = self._error(self._own, {})
        if not roundings or unit == 0:
            return False
        optimizer = torch.optim.Adam([r.v for r in roundings], lr=_RATE / steps)
        count = max(1, _ROWS // self._rows)
        is_stacked = self._stacks()
        for step in range(steps):
            progress("", step / steps)
            drawn = torch.randint(len(self._own), (count,), generator=source).tolist()
            shares = [r.share for r in roundings]
            soft = {r.weight: r.soft(s) for r, s in zip(roundings, shares, strict=True)}
            loss = self._loss([self._own[i] for i in drawn], soft, is_stacked) / unit
            loss = loss + _STRENGTH * _undecided(shares, step / steps)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        new = {r.weight: weight_rounding.dequantized(r.packed()).to(r.dtype) for r in roundings}
        return self._error(self._held_out, new) < self._error(self._held_out, {})

    @property
    def _rows(self) -> int:
        """The leading dimension of what the block returns for a call."""
        return int(self._targets[0][0].shape[0]) if self._targets[0][0].dim() else 1

    def _error(self, samples: Sequence[int], own: straight_through.Values) -> float:
        """Return the mean squared error of samples, with the graph's own operators."""
        total = 0.0
        for i in samples:
            values = results_of(self._part, self._inputs[i], {**self._constants, **own})
            outputs = [values[end] for end in self._part.ends]
            total += float(_distance(outputs, self._targets[i]))
        return total / len(samples)

    def _loss(
        self, samples: Sequence[int], own: straight_through.Values, is_stacked: bool
    ) -> Tensor:
        """Return the same with gradients."""
        if not is_stacked:
            made = (_distance(self._one(own, self._inputs[i]), self._targets[i]) for i in samples)
            return torch.stack(list(made)).mean()
        return _distance(self._many(own, samples), _stack(self._targets, samples)) / len(samples)

    def _one(self, own: straight_through.Values, inputs: Sequence[Tensor]) -> list[Tensor]:
        values = {**self._constants, **own, **dict(zip(self._part.takes, inputs, strict=True))}
        straight_through.run(self._part.nodes, values, straight=True)
        return [values[end] for end in self._part.ends]

    def _many(self, own: straight_through.Values, samples: Sequence[int]) -> list[Tensor]:
        stacked = _stack(self._inputs, samples)
        return list(torch.vmap(lambda *inputs: self._one(own, inputs))(*stacked))

    def _stacks(self) -> bool:
        """Tell whether the block does for many calls at once what it does for each."""
        pair = self._own[0], self._own[-1]
        try:
            with torch.no_grad():
                many = self._many({}, pair)
        except (RuntimeError, ValueError, NotImplementedError):
            return False
        ones = (self._one({}, self._inputs[i]) for i in pair)
        each = (torch.stack(column) for column in zip(*ones, strict=True))
        return all(torch.allclose(m, e, 1e-3, 1e-3) for m, e in zip(many, each, strict=True))


def _stack(rows: Sequence[Sequence[Tensor]], samples: Sequence[int]) -> list[Tensor]:
    return [torch.stack(column) for column in zip(*(rows[i] for i in samples), strict=True)]


def _distance(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    pairs = zip(outputs, targets, strict=True)
    return torch.stack([(o.float() - t.float()).square().sum() for o, t in pairs]).sum()


def _undecided(shares: Sequence[Tensor], done: float) -> Tensor | float:
    """Return the mean of 1 - |2 h - 1|^b at some point of the learning."""
    if done < _WARM_UP:
        return 0.0
    high, low = _BETA
    power = high + (low - high) * (done - _WARM_UP) / (1 - _WARM_UP)
    total = torch.stack([(1 - (2 * s - 1).abs() ** power).sum() for s in shares]).sum()
    return total / sum(s.numel() for s in shares)
