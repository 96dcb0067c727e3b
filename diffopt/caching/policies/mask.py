"""A mask of steps, written out: 1 computes, 0 takes the values of the last computed step.

As in cache-dit's steps_computation_mask with its policy "static".
"""

from dataclasses import dataclass
from typing import Literal

from diffopt.analysis.denoiser_structure import DenoiserStructure
from diffopt.caching.apply_plan import Loop, Plan
from diffopt.caching.policy import (
    ATTENTION_AND_MLP,
    Policy,
    Value,
    branch_values,
    hold,
    option,
    residuals,
    stack,
)
from diffopt.core import Context
from diffopt.errors import DiffoptError


@dataclass(frozen=True)
class Mask(Policy):
    """Compute in the steps that a mask of 0 and 1 names, and reuse in the others."""

    steps: str = option("", "one digit a step: 1 computes, 0 reuses; the first is 1")
    values: Literal["blocks", "branches", "deep"] | None = option(
        None,
        "what is reused: what all blocks add, each attention's and MLP's output, or a UNet's deep "
        "features; none: the first that the denoiser has of deep, blocks, branches",
    )

    def __post_init__(self) -> None:
        if self.steps.strip("01") or self.steps.startswith("0"):
            raise DiffoptError("mask wants digits 0 and 1, the first a 1: cache(mask,1100101)")

    def plan(self, loop: Loop, parts: DenoiserStructure, ctx: Context) -> Plan:
        """Take the values in every step whose digit is 0."""
        if len(self.steps) != loop.steps:
            raise DiffoptError(
                f"the mask has {len(self.steps)} digits, and the loop has {loop.steps} steps"
            )
        computed = [step for step, digit in enumerate(self.steps) if digit == "1"]
        return hold(self._chosen(loop, parts), computed, loop.steps)

    def _chosen(self, loop: Loop, parts: DenoiserStructure) -> list[Value]:
        found: dict[str, list[Value]] = {
            "deep": [(skip.deep, None) for skip in parts.skips[:1]],
            "blocks": residuals(stack(parts)),
            "branches": branch_values(parts, ATTENTION_AND_MLP),
        }
        there = [name for name, values in found.items() if values]
        if not there or (self.values and self.values not in there):
            raise DiffoptError(
                f"{loop.name} has no values={self.values or 'deep, blocks or branches'}; "
                f"it has {', '.join(there) or 'none of those that mask knows'}"
            )
        return found[self.values or there[0]]
