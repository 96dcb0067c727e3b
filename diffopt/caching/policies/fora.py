"""FORA: reuse every attention's and MLP's output of the last computed step.

Pratheba Selvaraju et al., FORA: Fast-Forward Caching in Diffusion Transformer Acceleration, 2024
(2407.01425).
"""

from dataclasses import dataclass
from typing import ClassVar

from diffopt.analysis.denoiser_structure import DenoiserStructure
from diffopt.caching.apply_plan import Loop, Plan
from diffopt.caching.policy import ATTENTION_AND_MLP, Needs, Policy, branch_values, hold, option
from diffopt.core import Context
from diffopt.errors import DiffoptError


@dataclass(frozen=True)
class Fora(Policy):
    """Take every attention's and MLP's output from the last computed step."""

    needs: ClassVar[Needs] = "branches"

    interval: int = option(3, "compute every N steps")
    start: int = option(0, "compute this many steps at the beginning as well")

    def __post_init__(self) -> None:
        if self.interval < 1 or self.start < 0:
            raise DiffoptError("fora wants interval >= 1 and start >= 0")

    def plan(self, loop: Loop, structure: DenoiserStructure, ctx: Context) -> Plan:
        """Reuse the branches' outputs in front of their gates."""
        values = branch_values(structure, ATTENTION_AND_MLP)
        return hold(values, computed(loop.steps, self.interval, self.start), loop.steps)


def computed(steps: int, interval: int, start: int = 0) -> list[int]:
    """Return the steps that compute: the first ones, then one an interval."""
    return [*range(min(start, steps)), *range(start, steps, interval)]
