"""Runs an engine's graphs operator by operator, without compiling anything.

It is the reference that other targets are compared with. It runs wherever torch does, and can open
engines of other targets, unless their kernels contain the weights:
`diffopt.load(path, target="eager")`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from diffopt.core import Progress
from diffopt.ir.program import Program
from diffopt.lowering.executor import ComponentFunction
from diffopt.lowering.target import EngineContents, Lowered, Target


@dataclass(frozen=True)
class Eager(Target):
    """Run the graphs as they are, for debugging and as the reference."""

    def compile(self, program: Program, progress: Progress) -> Lowered:
        """Compile nothing: the engine's graphs and weights are enough."""
        return Lowered()

    def load(self, engine: EngineContents) -> dict[str, ComponentFunction]:
        """Return the components' graphs as functions."""
        return {name: _body(gm) for name, gm in engine.program().components.items()}


def _body(gm: fx.GraphModule) -> ComponentFunction:
    def run(tensors: list[Tensor]) -> Sequence[Tensor]:
        outputs: Sequence[Tensor] = gm.forward(*tensors)
        return outputs

    return run
