"""The rows that are measured, the most important first, as the time of a run is limited."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from examples.gpu.models import Model

EXACT = "unroll,hoist,simplify,fuse"
CACHED = "unroll,hoist,cache({cache}),simplify,fuse"
FP8 = ",quantize(fp8,activations=rows,scale=max,split=false,layers={products})"


@dataclass(frozen=True)
class Row:
    """One way to run a model.

    Attributes:
        title: Its name in tables.
        kind: diffusers in bfloat16, in float32, compiled by torch, or an engine.
        minutes: The limit of its time, building included.
        passes: The passes of an engine; the model's values replace braces.
        options: Options of the engine's target.
        needs_gpu: Whether the options need a GPU.
        tuned: Whether to compile with the settings that search longest for fast kernels.
    """

    title: str
    kind: Literal["eager", "float32", "compiled", "engine"]
    minutes: float
    passes: str = ""
    options: str = ""
    needs_gpu: bool = False
    tuned: bool = False

    def pipeline(self, model: Model) -> str:
        """Return the passes for a model."""
        return self.passes.format(cache=model.cache, products=model.products)


REFERENCE = "eager"
BASELINE = "compile"
FLOAT32 = "float32"
ALL = "all"

ROWS = {
    REFERENCE: Row("diffusers, eager", "eager", 3),
    "exact": Row("exact passes", "engine", 5, EXACT),
    BASELINE: Row("torch.compile, max-autotune", "compiled", 6),
    ALL: Row("exact passes, cache, fp8", "engine", 7, CACHED + FP8),
    "no-graph": Row(
        "exact passes, no CUDA graph", "engine", 4, EXACT, "cuda-graph=false", needs_gpu=True
    ),
    "cache": Row("exact passes, cache", "engine", 6, CACHED),
    "fp8": Row("exact passes, fp8", "engine", 6, EXACT + FP8),
    FLOAT32: Row("diffusers, eager, float32", "float32", 3),
    "autotune": Row(
        "exact passes, max-autotune", "engine", 8, EXACT, "max-autotune=true", needs_gpu=True
    ),
    "compile-tuned": Row(
        "torch.compile, max-autotune, QKV fused, coordinate descent", "compiled", 8, tuned=True
    ),
}
"""By name, in the order in which they are measured."""
