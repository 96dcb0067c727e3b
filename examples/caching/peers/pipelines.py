"""The pipelines whose caches are compared, and the programs traced from them."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

import diffopt
from diffopt.cli import timing
from diffopt.ir.program import Program
from examples.benchmarks import report
from examples.study.models import GUIDANCE, load

REQUESTS: dict[str, dict[str, Any]] = {
    "fashion-sd": {"prompt": "ankle boot"},
    "fashion-dit": {"class_labels": [9]},
}
Begin = Callable[[], None]
"""What a peer wants called before each image."""


def denoiser(pipe: Any) -> Any:
    """Return the model that the sampling loop calls."""
    return getattr(pipe, "unet", None) or pipe.transformer


def images_of(model: str, pipe: Any, steps: int, begin: Begin = lambda: None) -> timing.Sampler:
    """Return the pipeline as a function from a seed to images."""

    def make(seed: int) -> torch.Tensor:
        begin()
        generator = torch.Generator().manual_seed(seed)
        images: torch.Tensor = pipe(
            **REQUESTS[model],
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            generator=generator,
            output_type="pt",
        ).images
        return images

    return make


@cache
def unrolled(model: str, steps: int) -> Program:
    """Return the program of a pipeline's call as the cache pass gets it."""
    report(f"tracing {model}")
    program = diffopt.trace(
        load(model),
        **REQUESTS[model],
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(0),
    )
    return diffopt.Pipeline.parse("unroll,hoist").run(program)
