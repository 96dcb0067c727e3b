"""MagCache: skip all blocks while the difference that they make keeps its magnitude.

Zehong Ma et al., MagCache: Fast Video Generation with Magnitude-Aware Cache, NeurIPS 2025
(2506.09045).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffopt.analysis.denoiser_structure import DenoiserStructure
from diffopt.caching.apply_plan import Loop, Plan
from diffopt.caching.policy import (
    Needs,
    Policy,
    ReusedValue,
    block_residuals,
    hold,
    option,
    transformer_blocks,
)
from diffopt.core import Context
from diffopt.errors import DiffoptError
from diffopt.execution import trajectories
from diffopt.execution.calibration_inputs import representative


@dataclass(frozen=True)
class Magcache(Policy):
    """Skip all blocks while what they add keeps its magnitude."""

    needs: ClassVar[Needs] = "blocks"

    threshold: float = option(0.06, "largest error, added up since the last computed step")
    max_skip: int = option(3, "most steps in a row that skip (K)")
    retain: float = option(0.2, "fraction of steps at the beginning that compute")
    calls: int = option(4, "calibration calls to measure ratios on")
    ratios: tuple[float, ...] = option(
        (), "magnitude of what the blocks add at each step over that of the step before, instead"
    )

    def __post_init__(self) -> None:
        if self.threshold < 0 or self.max_skip < 0 or not 0 <= self.retain <= 1 or self.calls < 1:
            raise DiffoptError(
                "magcache wants threshold >= 0, max-skip >= 0, retain in 0…1 and calls >= 1"
            )

    def runs(self) -> float:
        """Return a run for each call, unless ratios are given."""
        return 0.0 if self.ratios else float(self.calls)

    def plan(self, loop: Loop, structure: DenoiserStructure, ctx: Context) -> Plan:
        """Reuse the difference that all blocks together make to their streams."""
        values = block_residuals(transformer_blocks(structure))
        if self.ratios:
            ratios = nearest(self.ratios, loop.steps)
        else:
            inputs = representative(
                f"cache({self.name})", loop.program, ctx.prompts, self.calls, ctx.seed
            )
            key = {
                "magnitudes": 1,
                **trajectories.loop_identity(loop.program, loop.calls, inputs),
                "values": [loop.positions[node] for node in values[0] if node is not None],
            }
            measured = trajectories.cached(key, lambda: {"ratios": measure(loop, values, inputs)})
            ratios = measured["ratios"].tolist()
        computed = schedule(ratios, self.threshold, self.max_skip, self.retain)
        return hold(values, computed, loop.steps)


def measure(
    loop: Loop, values: Sequence[ReusedValue], inputs: Sequence[Sequence[Tensor]]
) -> Tensor:
    """Return, by step, the mean ratio |r@i| / |r@(i-1)| of r, the difference that blocks make.

    As in the authors' calibration it is that of the first stream; norms are over the last
    dimension, the mean over tokens and calls.
    """
    value, base = values[0]
    assert base is not None
    total, count = torch.zeros(loop.steps), torch.zeros(loop.steps)
    for tensors in inputs:
        past: dict[int, Tensor] = {}
        for visit in trajectories.steps(loop.program, loop.calls, tensors, (value, base)):
            norm = (visit.values[value] - visit.values[base]).float().norm(dim=-1)
            if visit.branch in past:
                total[visit.step] += (norm / (past[visit.branch] + 1e-8)).mean()
                count[visit.step] += 1
            past[visit.branch] = norm
    return torch.where(count > 0, total / count, torch.ones(loop.steps))


def schedule(ratios: Sequence[float], threshold: float, max_skip: int, retain: float) -> list[int]:
    """Return the steps that compute, of as many steps as there are ratios.

    A step is skipped while the sum over skipped steps of |1 - product of their ratios| is at most
    the threshold.
    """
    computed: list[int] = []
    retained = int(retain * len(ratios) + 0.5)
    magnitude, error, skipped = 1.0, 0.0, 0
    for step, ratio in enumerate(ratios):
        if step >= retained:
            magnitude, skipped = magnitude * ratio, skipped + 1
            error += abs(1 - magnitude)
            if computed and error <= threshold and skipped <= max_skip:
                continue
            magnitude, error, skipped = 1.0, 0.0, 0
        computed.append(step)
    return computed


def nearest(ratios: Sequence[float], steps: int) -> list[float]:
    """Resample ratios to another number of steps: each step has that of the nearest one."""
    if steps == 1:
        return [ratios[-1]]
    scale = (len(ratios) - 1) / (steps - 1)
    return [ratios[round(step * scale)] for step in range(steps)]
