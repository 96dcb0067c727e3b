"""Faster Diffusion: run a UNet's encoder at key steps only, and the decoders in between at once.

Senmao Li et al., Faster Diffusion: Rethinking the Role of UNet Encoder in Diffusion Models,
NeurIPS 2024 (2312.09608).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from diffopt.anatomy import Anatomy
from diffopt.core import Context
from diffopt.errors import DiffoptError
from diffopt.policy import Part, Policy, hold, option
from diffopt.reuse import Loop, Plan, merge_calls

KEYS = (0, 1, 2, 3, 5, 10, 15, 25, 35)  # of 50 steps


@dataclass(frozen=True)
class FasterDiffusion(Policy):
    """Run a UNet's encoder at key steps only, and the decoders in between at once."""

    needs: ClassVar[Part] = "skips"

    key_steps: tuple[int, ...] | None = option(
        None, f"steps that run the encoder; none: {KEYS} of 50 steps, scaled to the loop's"
    )

    def __post_init__(self) -> None:
        keys = self.key_steps
        if keys is not None and (not keys or keys[0] != 0 or list(keys) != sorted(set(keys))):
            raise DiffoptError("faster-diffusion wants key-steps that go up and begin with 0")

    def plan(self, loop: Loop, parts: Anatomy, ctx: Context) -> Plan:
        """Take the encoder's outputs: the middle, and what skip connections bring over."""
        keys = key_steps(loop.steps) if self.key_steps is None else self.key_steps
        if keys[-1] >= loop.steps:
            raise DiffoptError(
                f"key-steps has {keys[-1]}: the loop has {loop.steps} steps, 0 to {loop.steps - 1}"
            )
        values = dict.fromkeys([parts.middle, *(skip.shallow for skip in parts.skips)])
        return hold([(value, None) for value in values if value], keys, loop.steps)

    def finish(self, loop: Loop, ctx: Context) -> None:
        """Run the decoders of the steps between two key steps as one batch: no latents in them."""
        saved = 0
        for branch in range(loop.branches):
            calls = [call for (_, own), call in loop.calls.items() if own == branch]
            saved += merge_calls(loop.program, calls)
        ctx.note("calls saved by batching decoders", saved)


def key_steps(steps: int) -> Sequence[int]:
    """Return the paper's key steps for 50 steps, or as early ones of another number."""
    return sorted({key * steps // 50 for key in KEYS})
