"""DeepCache: compute only the outermost levels of a UNet, on deep features of an earlier step.

Xinyin Ma et al., DeepCache: Accelerating Diffusion Models for Free, CVPR 2024 (2312.00858).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from diffopt.analysis.denoiser_structure import DenoiserStructure
from diffopt.caching.apply_plan import Loop, Plan
from diffopt.caching.policy import Needs, Policy, hold, option
from diffopt.core import Context
from diffopt.errors import DiffoptError


@dataclass(frozen=True)
class Deepcache(Policy):
    """Compute the outermost levels of a UNet on deep features of an earlier step."""

    needs: ClassVar[Needs] = "skips"

    interval: int = option(3, "compute everything every N steps")
    branch: int = option(0, "the skip connection to start from, counted from the output")
    nonuniform: bool = option(False, "more full steps where features change fast, near `center`")
    center: int = option(15, "the step with most full steps around it, if nonuniform")
    pow: float = option(1.4, "how uneven the full steps are, if nonuniform; over 1")

    def __post_init__(self) -> None:
        if self.interval < 1 or self.branch < 0 or self.center < 0 or self.pow <= 1:
            raise DiffoptError("deepcache wants interval >= 1, branch >= 0, center >= 0, pow > 1")

    def plan(self, loop: Loop, structure: DenoiserStructure, ctx: Context) -> Plan:
        """Reuse the deep operand of the chosen skip connection."""
        if self.branch >= len(structure.skips):
            raise DiffoptError(
                f"branch={self.branch}: {loop.name} has {len(structure.skips)} skip connections,"
                f" 0 to {len(structure.skips) - 1}"
            )
        deep = structure.skips[self.branch].deep
        return hold([(deep, None)], self.schedule(loop.steps), loop.steps)

    def schedule(self, steps: int) -> list[int]:
        """Return the steps that compute everything."""
        if self.nonuniform and self.interval > 1:
            return nonuniform(steps, self.interval, self.center, self.pow)
        return list(range(0, steps, self.interval))


def nonuniform(steps: int, interval: int, center: int, power: float) -> list[int]:
    """Return ceil(steps / interval) steps, densest near the center."""
    count = math.ceil(steps / interval)
    used = power
    while used > 1:
        # Roots of negative numbers are complex: the points are on a line between the roots of both
        # ends, and the real part of their powers counts, as in the authors' code.
        points = np.linspace((-center) ** (1 / used), (steps - center) ** (1 / used), count + 1)
        inner = sorted({int(place) for place in (points**used).real})[1:-1]
        if len(inner) == count - 1:
            return [0, *(center + place for place in inner)]
        used -= 0.02  # too uneven for distinct steps
    raise DiffoptError(
        f"no {count} of {steps} steps are as uneven as pow={power:g} about center={center};"
        " use another center"
    )
