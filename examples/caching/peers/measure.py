"""Measures a package's cache next to an engine's: schedules, images and times."""

import argparse
import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

import diffopt
from diffopt.cli import timing
from examples.benchmarks import report
from examples.caching.peers.pairs import Peer
from examples.caching.peers.pipelines import REQUESTS, denoiser, images_of, unrolled
from examples.caching.peers.schedules import computed_by_engine, computed_by_peer, layers, signs
from examples.study.models import load

SEEDS = 4
UNCACHED, EAGER, COMPILED, ENGINE = (
    "no cache, eager",
    "peer, eager",
    "peer, torch.compile",
    "engine",
)
UNCACHED_COMPILED = "no cache, torch.compile"
# torch's default of 8 makes a cache whose Python counts steps fall back to eager.
RECOMPILE_LIMIT = 64


def compare(peer: Peer, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Check that the schedules are the same, compare the images, take the times in turns."""
    steps, load_before = options.steps, os.getloadavg()[0]
    pass_ = peer.pass_(steps)
    cached = diffopt.Pipeline((pass_,)).run(unrolled(peer.model, steps))
    pipe = load(peer.model)
    eager = images_of(peer.model, pipe, steps, peer.install(pipe, steps))
    schedules = (
        computed_by_peer(pipe, eager, layers(peer, steps)),
        computed_by_engine(cached, peer, steps),
    )
    report(f"building for {options.target}")
    final = diffopt.Pipeline.parse("simplify,fuse").run(cached)
    built = diffopt.build(final, options.target, folder / f"{len([*folder.iterdir()])}.engine")
    contenders = {
        UNCACHED: images_of(peer.model, load(peer.model), steps),
        EAGER: eager,
        ENGINE: lambda seed: built(**REQUESTS[peer.model], seed=seed, output_type="pt").images,
    }
    row = {
        "package": peer.package,
        "version": peer.version,
        "call": peer.call,
        "model": peer.model,
        "cache": str(pass_),
        "passes": f"unroll,hoist,{pass_},simplify,fuse",
        "target": options.target,
        "steps": steps,
        "rounds": options.rounds,
        "load before": load_before,
        "schedule": [signs(schedule) for schedule in schedules],
        "same layers": schedules[0] == schedules[1],
        "seeds": SEEDS,
        **differences(contenders),
    }
    with compiling():
        if options.compile:
            contenders |= compiled_contenders(peer, steps, row)
        results = timing.measure(contenders, EAGER, rounds=options.rounds, progress=report)
    row["contenders"] = {
        name: {
            "seconds": result.seconds,
            "median": result.median,
            "spread": result.spread,
            "max_abs": result.max_abs,
        }
        for name, result in results.items()
    }
    return row


def differences(contenders: Mapping[str, timing.Sampler]) -> dict[str, float]:
    """Return how far the engine's images are from the peer's, and those from uncached ones."""
    images = {
        name: torch.stack([make(s) for s in range(SEEDS)]) for name, make in contenders.items()
    }
    engine, cached = ((images[EAGER] - images[name]).abs().double() for name in (ENGINE, UNCACHED))
    return {
        "max_abs": float(engine.max()),
        "mean_abs": float(engine.mean()),
        "cache max_abs": float(cached.max()),
    }


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Let torch.compile recompile more often than by default, and say where it goes on for ever."""
    torch.compiler.reset()
    counters.clear()
    with torch._dynamo.config.patch(
        recompile_limit=RECOMPILE_LIMIT, fail_on_recompile_limit_hit=True
    ):
        yield


def compiled_contenders(peer: Peer, steps: int, row: dict[str, Any]) -> dict[str, timing.Sampler]:
    """Return the pipeline compiled, without a cache and with the peer's where that works.

    Writes into the row what compiling the peer's took.
    """
    contenders = {}
    report(f"compiling {peer.package}")
    started = time.perf_counter()
    try:
        make = compiled(peer, steps)
        for seed in range(2):  # the second image may have other states of a cache
            make(seed)
    except Exception as error:  # whatever another package and a compiler come to
        row["compile"] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    else:
        row["compile"] = {
            "seconds": time.perf_counter() - started,
            "graphs": counters["stats"]["unique_graphs"],
            "breaks": sum(counters["graph_break"].values()),
        }
        contenders[COMPILED] = make
    plain = load(peer.model)
    timing.compile_pipeline(plain, None)
    contenders[UNCACHED_COMPILED] = images_of(peer.model, plain, steps)
    return contenders


def compiled(peer: Peer, steps: int) -> timing.Sampler:
    """Return the pipeline with the peer's cache, compiled."""
    pipe = load(peer.model)
    net = denoiser(pipe)
    if peer.wraps:
        vars(net)["forward"] = torch.compile(net.forward)
    begin = peer.install(pipe, steps)
    if not peer.wraps:
        net.compile()
    vars(pipe.vae)["decode"] = torch.compile(pipe.vae.decode)
    return images_of(peer.model, pipe, steps, begin)
