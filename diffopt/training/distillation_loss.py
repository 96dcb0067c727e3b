"""The error of a program's calls against its reference, on the same latents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx

from diffopt.execution.differentiable import FLOATS, DifferentiableBody, DifferentiableCalls
from diffopt.ir import graph as g
from diffopt.ir.program import Program
from diffopt.training import call_pairs
from diffopt.training.call_pairs import CallPair, FeaturePair
from diffopt.training.trainable_weights import TrainableWeights

TOGETHER = 2**29
"""Bytes of values that calls which are run at once may have, but for the first."""

At = tuple[str, str]
"""A component, and the one of the reference that it replaces."""


class DistillationLoss:
    """The error of a program's calls against those of its reference.

    Attributes:
        blocks: How many blocks' results are compared.
    """

    def __init__(
        self,
        program: Program,
        reference: Program,
        pairs: Sequence[CallPair],
        trained: TrainableWeights,
        features: float,
        where: torch.device,
    ) -> None:
        """Prepare to run them.

        Args:
            program: What is trained.
            reference: What it should do.
            pairs: Calls of all components that are to be compared.
            trained: The program's weights.
            features: How much blocks' results weigh next to components'.
            where: What to compute on.
        """
        self._trained, self._features = trained, features
        first = {_at(pair): pair for pair in reversed(pairs)}
        self._taps = {
            at: _taps(program, reference, pair, where) if features else []
            for at, pair in first.items()
        }
        self.blocks = sum(map(len, self._taps.values()))
        self._student = {
            at: DifferentiableCalls(
                program.components[at[0]], trained.nodes[at[0]], [t.node for t in taps], where
            )
            for at, taps in self._taps.items()
        }
        self._results = {at: g.outputs(program.components[at[0]]) for at in first}
        self._teacher = {
            at: DifferentiableCalls(
                reference.components[at[1]], (), [t.reference for t in taps], where
            )
            for at, taps in self._taps.items()
            if taps
        }
        self._together = {at: _fitting(program.components[at[0]]) for at in first}

    def chunks(self, pairs: Sequence[CallPair]) -> Iterator[list[CallPair]]:
        """Yield calls that are run at once: of the same components, as many as fit."""
        alike: dict[At, list[CallPair]] = {}
        for pair in pairs:
            alike.setdefault(_at(pair), []).append(pair)
        for at, same in alike.items():
            size = self._together[at]
            yield from (same[start : start + size] for start in range(0, len(same), size))

    def losses(self, chunk: Sequence[CallPair]) -> Tensor:
        """Return the loss of each call, with gradients to the weights.

        Args:
            chunk: One of `chunks`.
        """
        at = _at(chunk[0])
        values = self._student[at]([p.arguments for p in chunk], self._trained.values(at[0]))
        loss = self._errors(chunk, values)
        taps = self._taps[at]
        if not taps:
            return loss
        with torch.no_grad():
            wanted = self._teacher[at]([p.reference_arguments for p in chunk], straight=False)
        matched = [error(values[t.node], t.targets(wanted[t.reference])) for t in taps]
        return loss + self._features * torch.stack(matched).mean(0)

    @torch.no_grad()
    def errors(self, chunk: Sequence[CallPair]) -> Tensor:
        """Return the squared relative error of what each call returns."""
        at = _at(chunk[0])
        weights, arguments = self._trained.values(at[0]), [p.arguments for p in chunk]
        return self._errors(chunk, self._student[at](arguments, weights, straight=False))

    def _errors(self, chunk: Sequence[CallPair], values: Mapping[fx.Node, Tensor]) -> Tensor:
        # The program may return more, for later steps.
        targets = [torch.stack(column) for column in zip(*(p.targets for p in chunk), strict=True)]
        pairs = zip(self._results[_at(chunk[0])], targets, strict=False)
        return torch.stack([error(values[n], t) for n, t in pairs if t.dtype in FLOATS]).mean(0)


def error(values: Tensor, targets: Tensor) -> Tensor:
    """Return the squared relative errors of values [calls, ...]."""
    wanted = targets.to(values.device, torch.float32).flatten(1)
    size = wanted.square().mean(1).clamp_min(1e-12)
    return (values.float().flatten(1) - wanted).square().mean(1) / size


def _at(pair: CallPair) -> At:
    return pair.name, pair.reference


def _taps(
    program: Program, reference: Program, pair: CallPair, where: torch.device
) -> list[FeaturePair]:
    """Return the blocks' results to match."""
    body, other = program.components[pair.name], reference.components[pair.reference]
    taps = call_pairs.matching_blocks(body, other)
    with torch.no_grad():
        mine = DifferentiableBody(body, (), [t.node for t in taps], where)(
            pair.arguments, straight=False
        )
        theirs = DifferentiableBody(other, (), [t.reference for t in taps], where)(
            pair.reference_arguments, straight=False
        )
    taps = [t.aligned(mine[t.node], theirs[t.reference]) for t in taps]
    # Blocks of one name whose results have nothing in common are others.
    return [
        t
        for t in taps
        if float(error(mine[t.node][None], t.targets(theirs[t.reference][None]))) < 1
    ]


def _fitting(body: fx.GraphModule) -> int:
    """Return how many calls of a body are run at once: gradients need all their values."""
    values = (n.meta.get("val") for n in body.graph.nodes if n.op == "call_function")
    size = sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))
    return max(1, TOGETHER // max(1, size))
