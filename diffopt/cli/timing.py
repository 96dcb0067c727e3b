"""Times several implementations of the same sampling against each other; compares their images."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffopt.progress import Progress, silent

Sampler = Callable[[int], Tensor]
"""Samples images, with values from 0 to 1, from a seed."""


@dataclass(frozen=True)
class Result:
    """The times of one contender, and the distance of its images from the reference's.

    Attributes:
        first: Seconds of the first call, which compiles where something compiles late.
        seconds: Seconds of every timed call.
        max_abs: Largest difference of any pixel in any round.
        psnr: Peak signal-to-noise ratio over all rounds, in decibels; infinite for equal images.
    """

    first: float
    seconds: list[float]
    max_abs: float
    psnr: float

    @property
    def median(self) -> float:
        """The median of the timed calls, in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """The interquartile range of the timed calls, in seconds."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return high - low


def measure(
    contenders: Mapping[str, Sampler],
    reference: str,
    *,
    rounds: int = 10,
    warmup: int = 2,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Result]:
    """Time the contenders in turn, so that a slow minute of the machine meets all of them.

    Every round has its own seed, the same for all; images are compared with `reference`'s.
    """
    first, seconds = {}, {name: list[float]() for name in contenders}
    for name, sampler in contenders.items():
        progress(f"warming up {name}", None)
        first[name] = _timed(sampler, seed)[0]
        for _ in range(warmup - 1):
            sampler(seed)
    errors = {name: list[Tensor]() for name in contenders}
    for index in range(rounds):
        progress(f"round {index + 1} of {rounds}", index / rounds)
        images = {}
        for name, sampler in contenders.items():
            elapsed, images[name] = _timed(sampler, seed + index)
            seconds[name].append(elapsed)
        for name in contenders:
            errors[name].append((images[name].double() - images[reference].double()).abs())
    return {
        name: Result(
            first[name],
            seconds[name],
            max(float(error.max()) for error in errors[name]),
            psnr(torch.stack(errors[name])),
        )
        for name in contenders
    }


def _timed(sampler: Sampler, seed: int) -> tuple[float, Tensor]:
    _wait()
    started = time.perf_counter()
    images = sampler(seed)
    _wait()
    return time.perf_counter() - started, images


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def psnr(errors: Tensor) -> float:
    """Return the peak signal-to-noise ratio, in decibels, of differences of values from 0 to 1."""
    mean = float(errors.square().mean())
    return math.inf if mean == 0 else -10 * math.log10(mean)


def compile_pipeline(pipe: Any, mode: str | None) -> None:
    """Compile a diffusers pipeline's models in place, as its users do.

    Text encoders are not compiled: they run once, and are not part of diffusers.
    """
    for module in pipe.components.values():
        if type(module).__module__.partition(".")[0] != "diffusers":
            continue
        if not isinstance(module, torch.nn.Module):
            continue
        decode = getattr(module, "decode", None)
        if callable(decode):
            vars(module)["decode"] = torch.compile(decode, mode=mode)
        else:
            module.compile(mode=mode)
