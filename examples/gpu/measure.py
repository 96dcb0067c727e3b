"""Measures one row: times of runs and of building, memory, the error of the latents."""

from __future__ import annotations

import gc
import itertools
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import diffopt
from diffopt.core import Pipeline
from diffopt.errors import DiffoptError
from diffopt.ir import call_tags
from diffopt.ir.flops import graph_flops
from diffopt.ir.program import Program
from diffopt.lowering.roofline import roofline
from diffopt.lowering.target import parse_target
from examples.benchmarks import report
from examples.gpu.models import DTYPE, MODELS
from examples.gpu.rows import Row

SEEDS = (0, 1)
"""The seeds of calls, which take turns: state that a kernel or CUDA graph keeps would show."""

Run = Callable[[int], Tensor]
"""Returns the latents of a seed."""


@dataclass(frozen=True)
class Settings:
    """The settings of all rows of a model.

    Attributes:
        model: The model's name.
        tiny: Whether it has sizes that a CPU can run.
        steps: The number of sampling steps.
        target: The target of the engines, to which rows add options.
        device: The device of pipelines and engines.
        rounds: The number of timed runs.
        work: A folder for engines and for the reference's latents.
    """

    model: str
    tiny: bool
    steps: int
    target: str
    device: str
    rounds: int
    work: Path

    @property
    def reference(self) -> Path:
        """The file of the reference's latents."""
        return self.work / f"{self.model}-latents.pt"

    def arguments(self, seed: int, device: str, dtype: torch.dtype = DTYPE) -> dict[str, Any]:
        """Return the arguments of a call."""
        arguments = MODELS[self.model].arguments(self.tiny, self.steps, seed)
        return {
            name: value.to(device, dtype) if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }


def capture(settings: Settings) -> Program:
    """Capture a model on the CPU, with fake tensors."""
    model = MODELS[settings.model]
    report(f"{settings.model}: capturing")
    pipe = model.build(settings.tiny, "cpu")
    return diffopt.trace(pipe, **settings.arguments(0, "cpu"))


def rewrite(program: Program, passes: str) -> Program:
    """Run passes without comparing programs, for which a CPU would take hours.

    Instead, the latents are compared with those of diffusers.
    """
    return Pipeline.parse(passes).run(program, compare=False)


def reference(settings: Settings) -> dict[str, Any]:
    """Save the latents that others are compared with."""
    _save(settings, _latents(_run_of(settings, _pipe(settings))))
    return {}


def eager(settings: Settings) -> dict[str, Any]:
    """Time the original pipeline."""
    started = time.perf_counter()
    pipe = _pipe(settings)
    build = {"weights": _since(started)}
    run = _run_of(settings, pipe)
    _save(settings, _latents(run))
    return {**timed(settings, run, build), "seconds of steps": step_seconds(settings, pipe)}


def float32(settings: Settings) -> dict[str, Any]:
    """Compare with the pipeline in float32: the error of the types alone."""
    torch.backends.cudnn.allow_tf32 = False
    pipe = _pipe(settings, torch.float32)
    return errors(settings, _latents(_run_of(settings, pipe, torch.float32)))


def compiled(settings: Settings, row: Row) -> dict[str, Any]:
    """Time the pipeline with its denoiser compiled as the documentation of diffusers advises."""
    import torch._inductor.config as inductor

    started = time.perf_counter()
    pipe = _pipe(settings)
    net = _denoiser(settings, pipe)
    net.to(memory_format=torch.channels_last)
    inductor.conv_1x1_as_mm = True
    if row.tuned:
        inductor.coordinate_descent_tuning = True
        inductor.coordinate_descent_check_all_directions = True
        inductor.epilogue_fusion = False
        net.fuse_qkv_projections()
    if settings.device == "cuda":
        net.compile(mode="max-autotune", fullgraph=True)
    else:  # only checks that the denoiser is one graph
        net.compile(backend="aot_eager", fullgraph=True)
    return timed(settings, _run_of(settings, pipe), {"weights": _since(started)})


def engine(settings: Settings, row: Row, captured: Program) -> dict[str, Any]:
    """Time an engine of the captured program."""
    _clean(settings)  # of the previous engine
    started = time.perf_counter()
    passes = row.pipeline(MODELS[settings.model])
    report(f"{settings.model}: {passes}")
    program = rewrite(captured, passes)
    build = {"passes": _since(started)}
    target = f"{settings.target}({row.options})" if row.options else settings.target
    report(f"{settings.model}: building for {target}")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=settings.work) as folder:
        built = diffopt.build(program, target, Path(folder) / "gpu.engine")
        build["compile"] = _since(started)
        times = timed(settings, _run_of(settings, built), build)
    layers = {n: b["layers"] for n, b in built.manifest["components"].items() if "layers" in b}
    return {**times, "passes": passes, "target": target, "layers": layers, **cost(program, target)}


def cost(program: Program, target: str) -> dict[str, Any]:
    """Return the operations of each step, and the roofline's times for a run."""
    flops = {name: graph_flops(gm) for name, gm in program.components.items()}
    steps: dict[int, int] = {}
    before = 0
    for call in program.calls():
        tag = call_tags.tag(call)
        if tag is None:
            before += flops[str(call.target)]
        else:
            steps[tag.step] = steps.get(tag.step, 0) + flops[str(call.target)]
    cost = {"flops before": before, "flops of steps": [steps[step] for step in sorted(steps)]}
    device = parse_target(target).hardware
    if device is None:
        return cost
    predicted = roofline(program, device)
    return {**cost, "predicted": predicted.seconds, "limit": predicted.limit}


def timed(settings: Settings, run: Run, build: dict[str, float]) -> dict[str, Any]:
    """Time runs after the first ones, which compile and record; compare their latents."""
    first = _seconds(settings, run, SEEDS[0])
    for seed in SEEDS:
        run(seed)
    _clean(settings)
    report(f"{settings.model}: {settings.rounds} runs")
    seconds = [
        _seconds(settings, run, SEEDS[index % len(SEEDS)]) for index in range(settings.rounds)
    ]
    memory = torch.cuda.max_memory_reserved() if settings.device == "cuda" else None
    return {
        "build": build,
        "first": first,
        "seconds": seconds,
        "memory": memory,
        "load": os.getloadavg()[0],
        **errors(settings, _latents(run)),
    }


def step_seconds(settings: Settings, pipe: Any) -> list[float]:
    """Return the seconds of each step of a pipeline's run, with the device synchronized."""
    _synchronize(settings)
    times = [time.perf_counter()]

    def after(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        _synchronize(settings)
        times.append(time.perf_counter())
        return values

    with torch.no_grad():
        pipe(**settings.arguments(SEEDS[0], settings.device), callback_on_step_end=after)
    return [after - before for before, after in itertools.pairwise(times)]


def errors(settings: Settings, latents: Tensor) -> dict[str, Any]:
    """Return the relative error of latents against the reference's, for each seed."""
    if not latents.isfinite().all():
        raise DiffoptError("its latents are not finite")
    expected = torch.load(settings.reference)
    norm = torch.linalg.vector_norm
    relative = norm((latents - expected).flatten(1), dim=1) / norm(expected.flatten(1), dim=1)
    return {"errors": relative.tolist()}


def _pipe(settings: Settings, dtype: torch.dtype = DTYPE) -> Any:
    pipe = MODELS[settings.model].build(settings.tiny, settings.device)
    if dtype != DTYPE:
        _denoiser(settings, pipe).to(dtype)
    return pipe


def _denoiser(settings: Settings, pipe: Any) -> Any:
    return getattr(pipe, MODELS[settings.model].denoiser)


def _run_of(settings: Settings, call: Callable[..., Any], dtype: torch.dtype = DTYPE) -> Run:
    """Return a pipeline or an engine as a function of the seed, with inputs made beforehand."""
    arguments = {seed: settings.arguments(seed, settings.device, dtype) for seed in SEEDS}

    def run(seed: int) -> Tensor:
        latents: Tensor = call(**arguments[seed]).images
        return latents

    return run


def _latents(run: Run) -> Tensor:
    return torch.stack([run(seed).float().cpu() for seed in SEEDS])


def _save(settings: Settings, latents: Tensor) -> None:
    torch.save(latents, settings.reference)


def _seconds(settings: Settings, run: Run, seed: int) -> float:
    _synchronize(settings)
    started = time.perf_counter()
    run(seed)
    _synchronize(settings)
    return time.perf_counter() - started


def _synchronize(settings: Settings) -> None:
    if settings.device == "cuda":
        torch.cuda.synchronize()


def _clean(settings: Settings) -> None:
    """Free memory that only building needed, so that the peak is that of runs."""
    gc.collect()
    if settings.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _since(started: float) -> float:
    return time.perf_counter() - started
