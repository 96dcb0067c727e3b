"""Times engines of models in which matrix products take most of the time."""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel

import diffopt
from diffopt.analysis import weight_memory
from diffopt.cli import timing
from diffopt.core import Pipeline, Size
from diffopt.ir.program import Program
from examples.benchmarks import PROMPT, larger, report
from examples.models.fashion import NULL_CLASS
from examples.study.measure import refusals
from examples.study.models import GUIDANCE, load
from examples.study.results import Results
from examples.study.study import REFERENCE


def transformer() -> Any:
    """Make a pipeline around a transformer of 512 channels, 256 tokens and random weights."""
    pipe = load("fashion-dit")
    torch.manual_seed(0)
    pipe.register_modules(
        transformer=DiTTransformer2DModel(
            num_attention_heads=8,
            attention_head_dim=64,
            in_channels=4,
            out_channels=4,
            num_layers=10,
            patch_size=2,
            sample_size=32,
            num_embeds_ada_norm=NULL_CLASS,
        ).eval()
    )
    return pipe


MAKE: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "unet": (larger, {"prompt": PROMPT}),
    "wide-unet": (partial(larger, (128, 256, 512), (2, 4, 8)), {"prompt": PROMPT}),
    "transformer": (transformer, {"class_labels": [9]}),
}
"""The models: a function that builds the pipeline, and the argument that says what to draw."""


def base(name: str, steps: int, passes: str) -> tuple[Program, int]:
    """Return a model's program after exact passes, and its denoiser's parameters."""
    report(f"tracing {name}")
    make, request = MAKE[name]
    pipe = make()
    denoiser = pipe.components.get("unet") or pipe.components["transformer"]
    program = diffopt.trace(
        pipe,
        **request,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(0),
    )
    program = Pipeline.parse(passes).run(program, verify=False)
    return program, sum(p.numel() for p in denoiser.parameters())


def rewritten(program: Program, config: str) -> Program:
    """Return a program after the passes of a configuration."""
    if config == REFERENCE:
        return program
    report(f"{config}: passes")
    return Pipeline.parse(config).run(program, verify=False, enforce=False)


def measure(
    name: str,
    configs: Sequence[str],
    options: argparse.Namespace,
    results: Results,
    passes: str = "unroll,hoist,simplify,fuse",
) -> None:
    """Time some pipelines on all targets, in turn, if that has not been done.

    Images are compared with those of the first pipeline; `passes` come before each.
    """
    steps, targets = options.large_steps, options.large_targets
    keys = "large", f"{name}, {steps} steps"
    if results.get(*keys, "times") is not None and not options.again:
        return
    program, parameters = base(name, steps, passes)
    request = MAKE[name][1]
    engines: dict[str, diffopt.Engine] = {}
    sizes: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for config in configs:
            with refusals(results, keys, config):
                final = rewritten(program, config)
                for target in targets:
                    report(f"building {config} for {target}")
                    engine = f"{config} on {target}"
                    path = Path(folder) / f"{len(engines)}.engine"
                    engines[engine] = diffopt.build(final, target, path)
                    weights = weight_memory.of_program(final).to_json()
                    flops = Size.of(final).flops
                    sizes[engine] = {
                        "file": path.stat().st_size,
                        "weights": weights,
                        "flops": flops,
                    }
        contenders: dict[str, timing.Sampler] = {
            key: lambda seed, e=engine: e(**request, seed=seed, output_type="pt")[0]
            for key, engine in engines.items()
        }
        baseline = next(iter(contenders))
        timings = timing.measure(contenders, baseline, rounds=options.rounds, progress=report)
    times = {
        key: {"seconds": row.seconds, "psnr": row.psnr, "max_abs": row.max_abs, **sizes[key]}
        for key, row in timings.items()
    }
    results.put(parameters, *keys, "parameters")
    results.put(times, *keys, "times")
