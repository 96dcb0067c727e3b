"""Compares engines with other packages that cache features: same schedule, images and times.

    pip install DeepCache cache-dit
    python -m examples.peers                                  # all of it, about half an hour
    python -m examples.peers --only deepcache-3 --rounds 3 --out quick --into quick.md

Each row is one cache of one package, on one of the models of examples/models, next to an engine
whose `cache` pass has the same schedule. The raw times go to docs/peers.json, the table to
docs/caching.md; rows that were not run stay as they are. Packages that are not installed are left
out. Run it on a machine that does nothing else.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    DiffusionPipeline,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_mag_cache,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)
from diffusers.hooks.hooks import CacheContext, HookRegistry, _set_cache_context
from torch._dynamo.utils import counters

import diffopt
from diffopt import bench, tags
from diffopt import graph as g
from diffopt.anatomy import Anatomy
from diffopt.core import Context
from diffopt.passes.cache import Cache
from diffopt.policies.deepcache import Deepcache
from diffopt.policies.delta_dit import DeltaDit
from diffopt.policies.magcache import Magcache
from diffopt.policies.taylorseer import Taylorseer
from diffopt.policy import Part, Policy, hold, option, residuals, stack
from diffopt.program import Program
from diffopt.reuse import Loop, Plan, find_loop
from examples.benchmarks import machine, report
from examples.pyramid_attention import PyramidAttention

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "examples" / "models"
REQUESTS: dict[str, dict[str, Any]] = {
    "fashion-sd": {"prompt": "ankle boot"},
    "fashion-dit": {"class_labels": [9]},
}
GUIDANCE = 2.0
SEEDS = 4
BEGIN, END = "<!-- peers: begin -->", "<!-- peers: end -->"
UNCACHED, EAGER, COMPILED, ENGINE = (
    "no cache, eager",
    "peer, eager",
    "peer, torch.compile",
    "engine",
)
UNCACHED_COMPILED = "no cache, torch.compile"
# torch's default of 8 makes a cache whose Python counts steps fall back to eager.
RECOMPILE_LIMIT = 64

Begin = Callable[[], None]
"""What a peer wants called before each image."""


@dataclass(frozen=True)
class Peer:
    """One cache of one package with one schedule.

    Attributes:
        package: The package's name for pip.
        call: The call that turns the cache on, for people to read.
        model: A folder of examples/models.
        install: Puts the cache into a pipeline that will run so many steps.
        pass_: Returns the pass that is the same for so many steps.
        wraps: The package replaces the denoiser's own `forward` by Python that torch.compile
            cannot follow, so what it wraps is compiled before.
    """

    package: str
    call: str
    model: str
    install: Callable[[Any, int], Begin]
    pass_: Callable[[int], Cache]
    wraps: bool = False

    @property
    def version(self) -> str | None:
        """The version that is installed."""
        # Its files may be there without what pip knows of them, and the other way round.
        if importlib.util.find_spec(self.package.replace("-", "_")) is None:
            return None
        return importlib.metadata.version(self.package)


# What the packages' users write


def deepcache(interval: int, branch: int, pipe: Any, steps: int) -> Begin:
    """Turn on DeepCache."""
    helper = import_module("DeepCache").DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    return lambda: None


def taylor(order: int, pipe: Any, steps: int) -> Begin:
    """Turn on diffusers' TaylorSeer for every attention and MLP."""
    layers = r"transformer_blocks\.\d+\.(attn1|ff)"  # its default finds no layer named attn1
    config = TaylorSeerCacheConfig(
        cache_interval=5,
        disable_cache_before_step=3,
        max_order=order,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[layers],
    )
    apply_taylorseer_cache(pipe.transformer, config)
    return partial(restart, pipe.transformer)


def restart(net: Any) -> None:
    """Reset diffusers' hooks, as pipelines do that support them."""
    HookRegistry.check_if_exists_or_initialize(net).reset_stateful_hooks()
    _set_cache_context(net, CacheContext("all"))


def mag(pipe: Any, steps: int) -> Begin:
    """Turn on diffusers' MagCache with ratios that it calibrated itself."""
    config = MagCacheConfig(num_inference_steps=steps, mag_ratios=list(mag_ratios(steps)))
    apply_mag_cache(pipe.transformer, config)
    return lambda: None


@cache
def mag_ratios(steps: int) -> tuple[float, ...]:
    """Return the ratios that diffusers' MagCache prints when it calibrates, of one image."""
    pipe = load("fashion-dit")
    apply_mag_cache(pipe.transformer, MagCacheConfig(num_inference_steps=steps, calibrate=True))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        images_of("fashion-dit", pipe, steps)(0)
    found = re.search(r"^\[[-\d., e]+\]$", printed.getvalue(), re.MULTILINE)
    assert found is not None, printed.getvalue()
    return tuple(round(ratio, 5) for ratio in json.loads(found[0]))


def pyramid(interval: int, pipe: Any, steps: int) -> Begin:
    """Turn on diffusers' pyramid attention broadcast."""
    now = [0]

    def hook(net: Any, args: Any, more: Any) -> None:
        now[0] = int(more["timestep"][0])

    pipe.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=interval, current_timestep_callback=lambda: now[0]
    )
    apply_pyramid_attention_broadcast(pipe.transformer, config)
    return partial(restart, pipe.transformer)


def dual_block(mask: Callable[[int], Sequence[int]], pipe: Any, steps: int) -> Begin:
    """Turn on cache-dit with a static mask of steps; the first block is always computed."""
    cache_dit = cache_dit_package()
    # It changes the pipeline's class: let this be a class of its own.
    pipe.__class__ = type(type(pipe).__name__, (type(pipe),), {})
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        num_inference_steps=steps,
        steps_computation_mask=list(mask(steps)),
        steps_computation_policy="static",
    )
    cache_dit.enable_cache(pipe, cache_config=config)
    return lambda: None


def cache_dit_package() -> Any:
    """Import cache-dit, which logs much otherwise."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
    return import_module("cache_dit")


def every_third(steps: int) -> list[int]:
    """Return a mask of steps of which every third computes."""
    return [int(step % 3 == 0) for step in range(steps)]


def fast(steps: int) -> list[int]:
    """Return cache-dit's own mask "fast"."""
    mask: list[int] = cache_dit_package().steps_mask(total_steps=steps, mask_policy="fast")
    return mask


# The same as a pass


@dataclass(frozen=True)
class DualBlock(Policy):
    """Compute the first blocks in each step, and the others where a mask of steps has a 1."""

    name: ClassVar[str] = "dual-block"
    needs: ClassVar[Part] = "blocks"

    steps: str = option("", "one digit a step: 1 computes all blocks")
    front: int = option(1, "how many blocks each step computes")

    def plan(self, loop: Loop, parts: Anatomy, ctx: Context) -> Plan:
        """Take what the other blocks add to their streams."""
        computed = [step for step, digit in enumerate(self.steps) if digit == "1"]
        return hold(residuals(stack(parts)[self.front :]), computed, loop.steps)


def rear(interval: int, steps: int) -> Cache:
    """Return the pass that takes what all blocks but the first add from each third step."""
    blocks = load("fashion-dit").transformer.config.num_layers
    return Cache(DeltaDit(interval=interval, bound=steps, range=blocks - 1))


def masked(steps: int) -> Cache:
    """Return the pass with cache-dit's mask."""
    return Cache(DualBlock("".join(map(str, fast(steps)))))


def deepcache_peer(interval: int, branch: int, own: int) -> Peer:
    """Return DeepCache's row; with one resnet a level its branches are 0, 1, 3, 4, ours 0 to 3."""
    return Peer(
        "DeepCache",
        f"`DeepCacheSDHelper`, `cache_interval={interval}`, `cache_branch_id={branch}`",
        "fashion-sd",
        partial(deepcache, interval, branch),
        lambda steps: Cache(Deepcache(interval, own)),
        wraps=True,
    )


PEERS = {
    "deepcache-3": deepcache_peer(3, branch=0, own=0),
    "deepcache-5": deepcache_peer(5, branch=0, own=0),
    "deepcache-deep": deepcache_peer(3, branch=3, own=2),
    "taylorseer": Peer(
        "diffusers",
        "`TaylorSeerCacheConfig(max_order=1, taylor_factors_dtype=float32)`",
        "fashion-dit",
        partial(taylor, 1),
        lambda steps: Cache(Taylorseer()),
    ),
    "reuse": Peer(
        "diffusers",
        "`TaylorSeerCacheConfig(max_order=0, taylor_factors_dtype=float32)`: FORA's reuse",
        "fashion-dit",
        partial(taylor, 0),
        lambda steps: Cache(Taylorseer(order=0)),
    ),
    "magcache": Peer(
        "diffusers",
        "`MagCacheConfig`, ratios from its own calibration",
        "fashion-dit",
        mag,
        lambda steps: Cache(Magcache(ratios=mag_ratios(steps))),
    ),
    "pyramid": Peer(
        "diffusers",
        "`PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=3)`",
        "fashion-dit",
        partial(pyramid, 3),
        lambda steps: Cache(PyramidAttention(own=3)),
    ),
    "cache-dit-3": Peer(
        "cache-dit",
        "`DBCacheConfig`, F1B0, static mask of every third step",
        "fashion-dit",
        partial(dual_block, every_third),
        partial(rear, 3),
    ),
    "cache-dit-fast": Peer(
        "cache-dit",
        'F1B0, static mask `steps_mask(mask_policy="fast")`',
        "fashion-dit",
        partial(dual_block, fast),
        masked,
    ),
}


# Pipelines and programs


def load(model: str) -> Any:
    """Load one of the pipelines of examples/models."""
    pipe = DiffusionPipeline.from_pretrained(MODELS / model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def denoiser(pipe: Any) -> Any:
    """Return the model that the sampling loop calls."""
    return getattr(pipe, "unet", None) or pipe.transformer


def images_of(model: str, pipe: Any, steps: int, begin: Begin = lambda: None) -> bench.Make:
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


def layers(peer: Peer, steps: int) -> list[str]:
    """Return the layers, such as linears, for which a step without a cache pays."""
    program = unrolled(peer.model, steps)
    net = denoiser(load(peer.model))
    paths = costly(find_loop(program).body)
    return sorted(path for path in paths if not [*net.get_submodule(path).children()])


def costly(body: torch.fx.GraphModule) -> set[str]:
    """Return the modules whose operators in a body cost FLOPs."""
    nodes = [n for n in body.graph.nodes if n.op == "call_function" and n.meta.get("module")]
    return {str(n.meta["module"]) for n in nodes if g.node_flops(n)}


def computed_by_engine(cached: Program, peer: Peer, steps: int) -> list[set[str]]:
    """Return the layers that each step of a program computes."""
    loop = find_loop(unrolled(peer.model, steps))
    own = {tags.tag(call): step for (step, _), call in loop.calls.items()}
    calls = {call: str(call.target) for call in cached.calls() if tags.tag(call) in own}
    costs = {name: costly(cached.components[name]) for name in {*calls.values()}}
    known = {*layers(peer, steps)}
    found = [set[str]() for _ in range(steps)]
    for call, name in calls.items():
        found[own[tags.tag(call)]] |= costs[name] & known
    return found


def computed_by_peer(pipe: Any, make: bench.Make, paths: Collection[str]) -> list[set[str]]:
    """Return the layers that each step of a pipeline computes."""
    net = denoiser(pipe)
    found: list[set[str]] = []
    handles = [net.register_forward_pre_hook(lambda *_: found.append(set()))]
    for path in paths:
        hook = partial(lambda path, *_: found[-1].add(path), path)
        handles.append(net.get_submodule(path).register_forward_hook(hook))
    make(0)
    for handle in handles:
        handle.remove()
    return found


def signs(found: Sequence[Collection[str]]) -> str:
    """Return a sign for each step: all layers computed, some of them, none."""
    return "".join("#" if len(s) == len(found[0]) else "+" if s else "-" for s in found)


# Measuring


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
        "schedule": [signs(found) for found in schedules],
        "same layers": schedules[0] == schedules[1],
        "seeds": SEEDS,
        **differences(contenders),
    }
    with compiling():
        if options.compile:
            contenders |= compiled_contenders(peer, steps, row)
        results = bench.measure(contenders, EAGER, rounds=options.rounds, report=report)
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


def differences(contenders: Mapping[str, bench.Make]) -> dict[str, float]:
    """Return how far the engine's images are from the peer's, and those from uncached ones."""
    made = {name: torch.stack([make(s) for s in range(SEEDS)]) for name, make in contenders.items()}
    engine, cached = ((made[EAGER] - made[name]).abs().double() for name in (ENGINE, UNCACHED))
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


def compiled_contenders(peer: Peer, steps: int, row: dict[str, Any]) -> dict[str, bench.Make]:
    """Return the pipeline compiled, without a cache and with the peer's where that works.

    Writes into the row what compiling the peer's took.
    """
    made = {}
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
        made[COMPILED] = make
    plain = load(peer.model)
    bench.compile_pipeline(plain, None)
    made[UNCACHED_COMPILED] = images_of(peer.model, plain, steps)
    return made


def compiled(peer: Peer, steps: int) -> bench.Make:
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


# The document


def document(data: Mapping[str, Any]) -> str:
    """Return the section of the document."""
    at, rows = data["machine"], data["rows"]
    versions = {row["package"]: row["version"] for row in rows.values()}
    lines = [
        "`python -m examples.peers` writes this section; the raw times are in peers.json beside"
        " this file.",
        f"{', '.join(f'{name} {version}' for name, version in sorted(versions.items()))}, on"
        f" {at['cpu']} ({at['capability']}), {at['threads']} threads, torch {at['torch']}, fp32,"
        f" batch 1, guidance {GUIDANCE:g}.",
        "",
        "The same schedule gives the same image:",
        "",
        "| package | its call | the same pass | same layers in every step"
        " | largest pixel difference | mean | what the cache itself changes |",
        "| --- | --- | --- | --- | ---: | ---: | ---: |",
        *(image_line(row) for row in rows.values()),
        "",
        "Layers are counted by hooks on the package's side, in the graph on the engine's."
        " Differences are pixels from 0 to 1, the largest over"
        f" {' or '.join(sorted({str(row['seeds']) for row in rows.values()}))} seeds; the last"
        " column is the largest difference between the package's images and those without a cache.",
        "",
        "Milliseconds an image, medians of rounds in which all take turns; ± half the interquartile"
        " range:",
        "",
        "| package, pass | steps | no cache, eager | no cache, compiled | package, eager"
        " | package, compiled | engine | engine against the package, eager | compiled |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(time_line(row) for row in rows.values()),
        "",
        *compile_lines(rows.values()),
    ]
    return "\n".join(lines) + "\n"


def image_line(row: Mapping[str, Any]) -> str:
    """Return a row of the table of images."""
    same = "yes" if row["same layers"] else "no"
    return (
        f"| {row['package']} | {row['call']} | {short(row)} | {same} | {row['max_abs']:.1e}"
        f" | {row['mean_abs']:.1e} | {row['cache max_abs']:.2f} |"
    )


def time_line(row: Mapping[str, Any]) -> str:
    """Return a row of the table of times."""
    rows = row["contenders"]
    names = (UNCACHED, UNCACHED_COMPILED, EAGER, COMPILED, ENGINE)
    cells = [milliseconds(rows[name]) if name in rows else "-" for name in names]
    for name in (EAGER, COMPILED):
        ratio = rows[name]["median"] / rows[ENGINE]["median"] if name in rows else None
        cells.append(f"{ratio:.2f}×" if ratio else "-")
    return f"| {row['package']}, {short(row)} | {row['steps']} | {' | '.join(cells)} |"


def short(row: Mapping[str, Any]) -> str:
    """Return a pass without long lists of numbers."""
    return "`" + re.sub(r"\((?:[\d.]+,){4,}[\d.]+\)|[01]{9,}", "…", row["cache"]) + "`"


def milliseconds(times: Mapping[str, Any]) -> str:
    """Return a median and its spread."""
    return f"{times['median'] * 1e3:.1f} ± {times['spread'] * 1e3 / 2:.1f}"


def compile_lines(rows: Collection[Mapping[str, Any]]) -> list[str]:
    """Return what compiling the packages' caches took."""
    lines = [
        "What torch.compile makes of the packages' Python, with its limit of recompilations raised"
        f" to {RECOMPILE_LIMIT} (two images):",
        "",
    ]
    for row in rows:
        if "compile" not in row:
            continue
        made = row["compile"]
        what = made.get("error") or (
            f"{made['graphs']} graphs, {made['breaks']} graph breaks, {made['seconds']:.0f} s"
        )
        lines.append(f"- {row['package']}, {short(row)}: {what}")
    return lines


def put(text: str, path: Path) -> None:
    """Write the section between its marks, at the end of a document that has none."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    if BEGIN not in old:
        old += f"\n## Next to the peers' own packages\n\n{BEGIN}\n{END}\n"
    before, _, rest = old.partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Run what was asked for and write the document."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=[*PEERS], nargs="+", default=[*PEERS])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "peers")
    parser.add_argument("--into", type=Path, default=ROOT / "docs" / "caching.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    raw = options.out.with_suffix(".json")
    data: dict[str, Any] = json.loads(raw.read_text()) if raw.exists() else {"rows": {}}
    now = machine(options.threads)
    if data.get("machine", now) != now:
        parser.error(f"{raw} has numbers of another machine or version: give another --out")
    data["machine"] = now
    with tempfile.TemporaryDirectory() as name:
        for key in options.only:
            if PEERS[key].version is None:
                report(f"== {key} left out: pip install {PEERS[key].package}")
                continue
            report(f"== {key}")
            data["rows"][key] = compare(PEERS[key], options, Path(name))
            data["rows"] = {key: data["rows"][key] for key in PEERS if key in data["rows"]}
            raw.write_text(json.dumps(data, indent=1) + "\n")
    if not data["rows"]:
        sys.exit("nothing was run: pip install DeepCache cache-dit")
    put(document(data), options.into)
    report(f"wrote {raw} and {options.into}")


if __name__ == "__main__":
    main()
