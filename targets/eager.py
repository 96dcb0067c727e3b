"""Runs an engine's graphs operator by operator, without compiling anything.

It is the reference that other targets are compared with. It runs wherever torch does, and can open
engines of other targets, unless their kernels contain the weights:
`diffopt.load(path, target="eager")`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffopt.core import Progress
from diffopt.ir.program import Program
from diffopt.lowering.executor import ComponentFunction, SlotExecutor
from diffopt.lowering.target import EngineContents, Lowered, Target


@dataclass(frozen=True)
class Eager(Target):
    """Run the graphs as they are, for debugging and as the reference."""

    is_native: ClassVar[bool] = False

    def compile(self, program: Program, progress: Progress) -> Lowered:
        """Compile nothing: the engine's graphs and weights are enough."""
        return Lowered()

    def load(self, engine: EngineContents) -> dict[str, ComponentFunction]:
        """Return the components' graphs as functions."""
        bodies = engine.program().components
        return {name: SlotExecutor(gm, {}).run for name, gm in bodies.items()}
