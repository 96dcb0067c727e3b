"""Delta-DiT: skip the rear blocks in early steps and the front blocks in late ones.

The difference that a run of blocks makes to its input is reused from the last full step.

Pengtao Chen et al., Delta-DiT: A Training-Free Acceleration Method Tailored for Diffusion
Transformers, 2024 (2406.01125).
"""

from dataclasses import dataclass
from typing import ClassVar

from diffopt.analysis.denoiser_structure import DenoiserStructure
from diffopt.caching.apply_plan import Loop, Plan, Reuse, Term
from diffopt.caching.policy import Needs, Policy, block_residuals, option, transformer_blocks
from diffopt.core import Context
from diffopt.errors import DiffoptError


@dataclass(frozen=True)
class DeltaDit(Policy):
    """Skip the rear blocks in early steps and the front blocks in late ones."""

    needs: ClassVar[Needs] = "blocks"

    interval: int = option(2, "compute everything every N steps")
    bound: int | None = option(None, "first late step (b); none: half of the steps")
    range: int | None = option(None, "how many blocks to skip; none: three quarters of them")

    def __post_init__(self) -> None:
        if (
            self.interval < 1
            or (self.bound or 0) < 0
            or (self.range is not None and self.range < 1)
        ):
            raise DiffoptError("delta-dit wants interval >= 1, bound >= 0 and range >= 1")

    def plan(self, loop: Loop, structure: DenoiserStructure, ctx: Context) -> Plan:
        """Reuse the differences that the skipped blocks make to their streams."""
        blocks = transformer_blocks(structure)
        count = len(blocks)
        size = max(1, count * 3 // 4) if self.range is None else self.range
        if size > count:
            raise DiffoptError(f"range={size}: {loop.name} has {count} transformer blocks")
        bound = loop.steps // 2 if self.bound is None else self.bound
        plan: dict[int, list[Reuse]] = {}
        for step, side in enumerate(schedule(loop.steps, self.interval, bound)):
            if side != "all":
                first = count - size if side == "front" else 0
                last = (Term(step - step % self.interval),)
                values = block_residuals(blocks[first : first + size])
                plan[step] = [Reuse(value, last, base) for value, base in values]
        return plan


def schedule(steps: int, interval: int, bound: int) -> list[str]:
    """Return which blocks each step computes: "all", the "front" or the "rear" ones."""
    sides = ["front" if step < bound else "rear" for step in range(steps)]
    return ["all" if step % interval == 0 else side for step, side in enumerate(sides)]
