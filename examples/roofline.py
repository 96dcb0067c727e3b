"""Predicts what engines take on this CPU from its own peak rates, and measures them.

    python -m examples.roofline fashion-dit.engine fashion-sd.engine

Build the engines with `--target "cpu(threads=1)"`. The rates are those of large matrix products and
of a large copy, by one thread.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch

import diffopt
from diffopt.lowering.hardware import Hardware, hardware
from diffopt.lowering.roofline import roofline


def seconds(run: Callable[[], object], times: int) -> float:
    """Return the median seconds of so many runs, or of fewer where these take two seconds."""
    run()
    samples: list[float] = []
    while len(samples) < times and sum(samples) < 2:
        begin = time.perf_counter()
        run()
        samples.append(time.perf_counter() - begin)
    return statistics.median(samples)


def here(size: int = 1024) -> Hardware:
    """Describe one core of this CPU by its measured rates."""
    wide = torch.randn(size, size)
    low = wide.bfloat16()
    whole = wide.clamp(-3, 3).mul(40).to(torch.int8)
    products: dict[str, Callable[[], object]] = {
        "fp32": lambda: wide @ wide,
        "bf16": lambda: low @ low,
        "int8": lambda: torch._int_mm(whole, whole),
    }
    peak = {name: 2 * size**3 / seconds(run, 20) for name, run in products.items()}
    large = torch.ones(64 * size * size)
    copy = torch.empty_like(large)
    bandwidth = 2 * large.nbytes / seconds(lambda: copy.copy_(large), 5)
    return replace(hardware("cpu-amx").with_cores(1), peak=peak, bandwidth=bandwidth)


def main(*paths: str) -> None:
    """Print the predicted and the measured time of each engine."""
    torch.set_num_threads(1)
    core = here()
    rates = ", ".join(f"{name} {rate / 1e9:.0f} G" for name, rate in core.peak.items())
    print(f"one core: {rates} operations a second, {core.bandwidth / 1e9:.1f} GB/s\n")
    print("| engine | limit, ms | predicted, ms | measured, ms | measured / predicted |")
    print("| --- | --- | --- | --- | --- |")
    for path in paths:
        engine = diffopt.load(path)
        inputs = engine.program.sample_inputs()
        measured = seconds(lambda run=engine.run, inputs=inputs: run(inputs), 10)
        predicted = roofline(engine.program, core)
        times = [f"{1e3 * t:.1f}" for t in (predicted.limit, predicted.seconds, measured)]
        print(f"| {path} | {' | '.join(times)} | {measured / predicted.seconds:.1f} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
