"""Learn whether each weight is rounded up or down, block by block.

AdaRound (Nagel et al. 2020, arXiv 2004.10568) learns the rounding of layers, BRECQ (Li et al. 2021,
arXiv 2102.05426) of blocks. A block ends where one of a residual stream does
(`denoiser_structure`), or at each layer where there are none. The inputs of each block are those
that the quantized blocks before it return; its results should be those without quantization:

    w = s * clamp(floor(w0 / s) + h(v), low, high),  h(v) = clamp(1.2 * sigmoid(v) - 0.1, 0, 1)

with the rectified sigmoid h. The loss is the squared error plus the mean of 1 - |2 h - 1|^b, which
draws h to 0 or 1 ever more as b falls. A block's rounding is kept if its error on held-out samples
is less than that of the nearest numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx

from diffopt.analysis.denoiser_structure import analyze_denoiser
from diffopt.errors import DiffoptError
from diffopt.execution import straight_through
from diffopt.execution.segments import Sample, Segment, cut
from diffopt.ir import graph as g
from diffopt.ir import qdq
from diffopt.ir.interpreter import Hook, Values
from diffopt.ir.nodes import stored_tensor
from diffopt.progress import Progress, silent, within
from diffopt.quantization import weight_rounding

qd = torch.ops.quantized_decomposed


STEPS = 300
"""Optimizer steps for each block."""

_ROWS = 32  # of a batch: calls are stacked until their leading dimensions add up to it
_RATE = 20.0  # how far Adam can move v in all steps
_STRENGTH = 5.0  # of the rounding loss, relative to the error of the nearest numbers
_BETA = 20.0, 2.0  # b at the beginning and at the end
_WARM_UP = 0.2  # of the steps are without the rounding loss
_HELD_OUT = 5  # one sample in so many


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
    """Return better roundings of integer weights, by the names of their layers.

    Layers of blocks that learning does not improve are left out.

    Args:
        body: Before quantization.
        quantized: The same with quantized layers; common nodes have the same names.
        samples: Arguments of `quantized`; those that `body` lacks are the last.
        steps: Optimizer steps for each block.
        seed: Of the batches.
        max_mb: Memory for samples between blocks; fewer samples are used if it is too little.
        progress: Called with what is being done and the fraction done.
    """
    if len(samples) < 2:
        raise DiffoptError(
            f"rounding is learned from two samples or more, got {len(samples)}: calibrate on more"
        )
    roundings = _roundings(body, quantized)
    exact_blocks, blocks = _cut_both(body, quantized, [r.layer for r in roundings])
    samples = _fitting(samples, [*exact_blocks, *blocks], max_mb)
    count = len(g.placeholders(body))
    exact_samples = [Sample(body, sample[:count]) for sample in samples]
    quantized_samples = [Sample(quantized, sample) for sample in samples]
    generator = torch.Generator().manual_seed(seed)
    settled: dict[str, qdq.Packed | None] = {}
    for index, (exact, segment) in enumerate(zip(exact_blocks, blocks, strict=True)):
        constants = exact.constants()
        targets = [sample.advance(exact, constants) for sample in exact_samples]
        constants = segment.constants()
        inside = [r for r in roundings if r.layer in segment.nodes]
        # A weight that an earlier block shares is already learned there.
        constants |= _learned_weights(inside, settled)
        told = within(progress, index, len(blocks), f"rounding: block {index + 1} of {len(blocks)}")
        block = _Block(
            segment, constants, [sample.inputs(segment) for sample in quantized_samples], targets
        )
        new = [r for r in inside if r.values not in settled]
        is_better = block.learn(new, steps, generator, told)
        settled |= {r.values: r.packed() if is_better else None for r in new}
        constants |= _learned_weights(inside, settled)
        for sample in quantized_samples:
            sample.advance(segment, constants)
    packed_by_layer = ((r.layer.name, settled[r.values]) for r in roundings)
    return {name: packed for name, packed in packed_by_layer if packed is not None}


# Weights


class _Rounding:
    """The learned rounding of one layer's weight.

    Attributes:
        layer: The layer's node.
        weight: The node of the weight that it reads.
        values: The name of the stored numbers, which layers may share.
        v: The learned parameter, in the weight's shape.
    """

    def __init__(
        self, gm: fx.GraphModule, layer: qdq.Layer, stored: qdq.Weight, to: Tensor
    ) -> None:
        self.layer, self.weight = layer.node, layer.weight
        self.values = weight_rounding.stored_name(stored.values)
        self.dtype = layer.weight.meta["val"].dtype
        self._is_wide = stored.node is not layer.weight
        self._nearest = weight_rounding.packed_weight(gm, stored, to.shape)
        self._scale = weight_rounding.broadcast_scales(self._nearest)
        self._limits = qdq.LIMITS[stored.number]
        scaled = to.detach().float() / self._scale
        self._floor = scaled.floor()
        share = (scaled - self._floor + 0.1) / 1.2
        self.v = share.logit().requires_grad_()

    @property
    def share(self) -> Tensor:
        """The rectified sigmoid h(v): 0 rounds a weight down, 1 up."""
        return (self.v.sigmoid() * 1.2 - 0.1).clamp(0, 1)

    def soft(self, share: Tensor) -> Tensor:
        """Return the weight s * clamp(floor(w0 / s) + h) while h is learned."""
        return ((self._floor + share).clamp(*self._limits) * self._scale).to(self.dtype)

    def packed(self) -> qdq.Packed:
        """Return the learned weight with h rounded to 0 or 1."""
        up = self._floor + (self.share.detach() > 0.5)
        values = up.clamp(*self._limits).to(torch.int8)
        old = self._nearest
        packed = qdq.Packed.of(old.number, values, old.scales, old.group)
        return weight_rounding.rounded_to_int8(packed) if self._is_wide else packed


def _roundings(body: fx.GraphModule, quantized: fx.GraphModule) -> list[_Rounding]:
    """Return the learnable roundings: of integer weights whose exact ones `body` has."""
    exact = {layer.node.name: stored_tensor(body, layer.weight) for layer in qdq.layers(body)}
    roundings = []
    for layer in qdq.layers(quantized):
        weight, to = weight_rounding.stored_weight(layer.weight), exact.get(layer.node.name)
        if weight is not None and weight.number != "fp8" and to is not None:
            roundings.append(_Rounding(quantized, layer, weight, to))
    return roundings


def _learned_weights(
    roundings: Sequence[_Rounding], settled: Mapping[str, qdq.Packed | None]
) -> Values:
    """Return the learned weights of layers, by the nodes that they read."""
    values: Values = {}
    for rounding in roundings:
        packed = settled.get(rounding.values)
        if packed is not None:
            values[rounding.weight] = weight_rounding.dequantized(packed).to(rounding.dtype)
    return values


# Blocks


def _cut_both(
    body: fx.GraphModule, quantized: fx.GraphModule, layers: Sequence[fx.Node]
) -> tuple[list[Segment], list[Segment]]:
    """Return the blocks of both bodies, each with at least one of `layers` of the second."""
    names = {node.name: node for node in body.graph.nodes}
    twins = {n: names[n.name] for n in quantized.graph.nodes if n.name in names}
    last = {block.last for block in analyze_denoiser(body, g.placeholders(body)).blocks}
    ends = [n for n, twin in twins.items() if twin in last] or list(layers)
    groups = [([n], [twins[n]]) for n in ends]
    groups.append((g.outputs(quantized), g.outputs(body)))
    waiting, cuts = set(layers), []
    for end, twin in groups:
        inside = waiting & g.ancestors(end)
        if inside:
            cuts.append((end, twin))
            waiting -= inside
    return cut(body, [twin for _, twin in cuts]), cut(quantized, [t for t, _ in cuts])


def _fitting(
    samples: Sequence[Sequence[Tensor]], segments: Sequence[Segment], max_mb: float
) -> list[Sequence[Tensor]]:
    """Return as many samples, evenly spaced, as fit into memory."""
    most = max((_bytes(s.kept) + _bytes(s.reads) for s in segments), default=0)
    count = max(2, min(len(samples), int(max_mb * 2**20 / max(1, 2 * most))))
    return [samples[i * len(samples) // count] for i in range(count)]


def _bytes(nodes: Iterable[fx.Node]) -> int:
    return g.tensor_bytes([n.meta["val"] for n in nodes])


class _Block:
    """A block with its inputs and target results for each sample."""

    def __init__(
        self,
        segment: Segment,
        constants: Values,
        inputs: Sequence[list[Tensor]],
        targets: Sequence[list[Tensor]],
    ) -> None:
        self._segment, self._constants = segment, constants
        self._inputs, self._targets = inputs, targets
        held_out = range(_HELD_OUT - 1, len(inputs), _HELD_OUT) or [len(inputs) - 1]
        self._held_out = list(held_out)
        self._learned_on = [i for i in range(len(inputs)) if i not in held_out]

    def learn(
        self,
        roundings: Sequence[_Rounding],
        steps: int,
        source: torch.Generator,
        progress: Progress,
    ) -> bool:
        """Learn roundings; return whether the block is better with them on held-out samples."""
        unit = self._error(self._learned_on, {})
        if not roundings or unit == 0:
            return False
        optimizer = torch.optim.Adam([r.v for r in roundings], lr=_RATE / steps)
        count = max(1, _ROWS // self._rows)
        is_stacked = self._stacks()
        for step in range(steps):
            progress("", step / steps)
            drawn = torch.randint(len(self._learned_on), (count,), generator=source).tolist()
            shares = [r.share for r in roundings]
            soft = {r.weight: r.soft(s) for r, s in zip(roundings, shares, strict=True)}
            loss = self._loss([self._learned_on[i] for i in drawn], soft, is_stacked) / unit
            loss = loss + _STRENGTH * _rounding_loss(shares, step / steps)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        new = {r.weight: weight_rounding.dequantized(r.packed()).to(r.dtype) for r in roundings}
        return self._error(self._held_out, new) < self._error(self._held_out, {})

    @property
    def _rows(self) -> int:
        """The leading dimension of the block's first result in one call."""
        return int(self._targets[0][0].shape[0]) if self._targets[0][0].dim() else 1

    def _error(self, samples: Sequence[int], fixed: Values) -> float:
        """Return the mean squared error of samples, with the graph's operators."""
        total = 0.0
        for i in samples:
            with torch.no_grad():
                outputs = self._run(fixed, self._inputs[i])
            total += float(_distance(outputs, self._targets[i]))
        return total / len(samples)

    def _loss(self, samples: Sequence[int], fixed: Values, is_stacked: bool) -> Tensor:
        """Return the same with gradients."""
        if not is_stacked:
            ones = [_distance(self._one(fixed, self._inputs[i]), self._targets[i]) for i in samples]
            return torch.stack(ones).mean()
        return _distance(self._many(fixed, samples), _stack(self._targets, samples)) / len(samples)

    def _one(self, fixed: Values, inputs: Sequence[Tensor]) -> list[Tensor]:
        return self._run(fixed, inputs, straight_through.estimate)

    def _run(
        self, fixed: Values, inputs: Sequence[Tensor], hook: Hook | None = None
    ) -> list[Tensor]:
        """Return the block's results for some inputs, with other values of some constants."""
        values = self._segment.run(inputs, {**self._constants, **fixed}, hook)
        return [values[end] for end in self._segment.ends]

    def _many(self, fixed: Values, samples: Sequence[int]) -> list[Tensor]:
        stacked = _stack(self._inputs, samples)
        return list(torch.vmap(lambda *inputs: self._one(fixed, inputs))(*stacked))

    def _stacks(self) -> bool:
        """Tell whether the block computes stacked calls as it computes single ones."""
        pair = self._learned_on[0], self._learned_on[-1]
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


def _rounding_loss(shares: Sequence[Tensor], done: float) -> Tensor | float:
    """Return the mean of 1 - |2 h - 1|^b, with b annealed linearly over `progress` in 0…1."""
    if done < _WARM_UP:
        return 0.0
    high, low = _BETA
    power = high + (low - high) * (done - _WARM_UP) / (1 - _WARM_UP)
    total = torch.stack([(1 - (2 * s - 1).abs() ** power).sum() for s in shares]).sum()
    return total / sum(s.numel() for s in shares)
