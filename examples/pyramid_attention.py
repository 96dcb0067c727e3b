"""A cache policy of your own: pyramid attention broadcast, which no file of diffopt knows.

The kinds of attention change at different speeds, so each has an interval of its own, in the
middle of the loop (Xuanlei Zhao et al., 2024, 2408.12588). A package that is installed with

    [project.entry-points."diffopt.policies"]
    pyramid-attention = "examples.pyramid_attention:PyramidAttention"

makes `cache(pyramid-attention,cross=6)` a pass like any other. Without it, from Python:

python examples/pyramid_attention.py examples/models/fashion-dit
"""

import sys
from dataclasses import dataclass
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline

import diffopt
from diffopt.analysis.denoiser_structure import DenoiserStructure
from diffopt.caching.apply_plan import Loop, Plan
from diffopt.caching.policy import Needs, Policy, branch_values, hold, merge, option
from diffopt.core import Context
from diffopt.passes.cache import Cache


@dataclass(frozen=True)
class PyramidAttention(Policy):
    """Take each kind of attention from an earlier step, at an interval of its own."""

    needs: ClassVar[Needs] = "branches"

    own: int = option(2, "compute self-attention every so many steps")
    cross: int = option(6, "compute cross-attention every so many steps")
    start: float = option(0.2, "fraction of the steps at the beginning that compute everything")
    end: float = option(0.1, "fraction of the steps at the end that compute everything")

    def plan(self, loop: Loop, structure: DenoiserStructure, ctx: Context) -> Plan:
        """Take the outputs of both kinds, each by its own schedule."""
        first, last = loop.steps * self.start, loop.steps * (1 - self.end)
        always = {i for i in range(loop.steps) if not first <= i < last}
        kinds = {"attention": self.own, "cross-attention": self.cross}
        return merge(
            hold(branch_values(structure, [kind]), {*always, *range(0, loop.steps, n)}, loop.steps)
            for kind, n in kinds.items()
        )


def main(model: str, steps: int = 10) -> None:
    """Trace a class-conditional pipeline, cache with the policy, and say what that did."""
    pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    program = diffopt.trace(pipe, class_labels=[9], num_inference_steps=steps, generator=seed)
    program = diffopt.Pipeline.parse("unroll,hoist").run(program)
    program = diffopt.Pipeline((Cache(PyramidAttention(own=3)),)).run(program)
    record = program.history[-1]
    print(f"{record['text']}: relative error {record['relative']:.1e}")
    for name, notes in record["notes"].items():
        print(f"{name}: {notes}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
