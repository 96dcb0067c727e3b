"""Static mask: a step with digit 1 computes, with 0 reuses values of the last computed step.

As in cache-dit's steps_computation_mask with its policy "static".
"""

from dataclasses import dataclass
from typing import Literal

from diffopt.analysis.denoiser_structure import DenoiserStructure
from diffopt.caching.apply_plan import Loop, Plan
from diffopt.caching.policy import (
    ATTENTION_AND_MLP,
    Policy,
    ReusedValue,
    block_residuals,
    branch_values,
    hold,
    option,
    transformer_blocks,
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

    def plan(self, loop: Loop, structure: DenoiserStructure, ctx: Context) -> Plan:
        """Reuse the values in every step whose digit is 0."""
        if len(self.steps) != loop.steps:
            raise DiffoptError(
                f"the mask has {len(self.steps)} digits, and the loop has {loop.steps} steps"
            )
        computed = [step for step, digit in enumerate(self.steps) if digit == "1"]
        return hold(self._chosen(loop, structure), computed, loop.steps)

    def _chosen(self, loop: Loop, structure: DenoiserStructure) -> list[ReusedValue]:
        values: dict[str, list[ReusedValue]] = {
            "deep": [(skip.deep, None) for skip in structure.skips[:1]],
            "blocks": block_residuals(transformer_blocks(structure)),
            "branches": branch_values(structure, ATTENTION_AND_MLP),
        }
        present = [name for name, values in values.items() if values]
        if not present or (self.values and self.values not in present):
            raise DiffoptError(
                f"{loop.name} has no values={self.values or 'deep, blocks or branches'}; "
                f"it has {', '.join(present) or 'none of those that mask knows'}"
            )
        return values[self.values or present[0]]
