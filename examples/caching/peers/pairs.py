"""Other packages' caches, each with the pass that has the same schedule."""

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Any, ClassVar

import torch
from diffusers import (
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_mag_cache,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)
from diffusers.hooks.hooks import CacheContext, HookRegistry, _set_cache_context

from diffopt.analysis.denoiser_structure import DenoiserStructure
from diffopt.caching.apply_plan import Loop, Plan
from diffopt.caching.policies.deepcache import Deepcache
from diffopt.caching.policies.delta_dit import DeltaDit
from diffopt.caching.policies.magcache import Magcache
from diffopt.caching.policies.taylorseer import Taylorseer
from diffopt.caching.policy import (
    Needs,
    Policy,
    block_residuals,
    hold,
    option,
    transformer_blocks,
)
from diffopt.core import Context
from diffopt.passes.cache import Cache
from examples.caching.peers.pipelines import Begin, images_of
from examples.pyramid_attention import PyramidAttention
from examples.study.models import load


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
    match = re.search(r"^\[[-\d., e]+\]$", printed.getvalue(), re.MULTILINE)
    assert match is not None, printed.getvalue()
    return tuple(round(ratio, 5) for ratio in json.loads(match[0]))


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
    needs: ClassVar[Needs] = "blocks"

    steps: str = option("", "one digit a step: 1 computes all blocks")
    front: int = option(1, "how many blocks each step computes")

    def plan(self, loop: Loop, structure: DenoiserStructure, ctx: Context) -> Plan:
        """Take what the other blocks add to their streams."""
        computed = [step for step, digit in enumerate(self.steps) if digit == "1"]
        blocks = transformer_blocks(structure)[self.front :]
        return hold(block_residuals(blocks), computed, loop.steps)


def rear(interval: int, steps: int) -> Cache:
    """Return the pass that takes what all blocks but the first add from each third step."""
    blocks = load("fashion-dit").transformer.config.num_layers
    return Cache(DeltaDit(interval=interval, bound=steps, range=blocks - 1))


def masked(steps: int) -> Cache:
    """Return the pass with cache-dit's mask."""
    return Cache(DualBlock("".join(map(str, fast(steps)))))


def deepcache_peer(interval: int, branch: int, skip: int) -> Peer:
    """Return DeepCache's row; with one resnet a level its branches are 0, 1, 3, 4, ours 0 to 3."""
    return Peer(
        "DeepCache",
        f"`DeepCacheSDHelper`, `cache_interval={interval}`, `cache_branch_id={branch}`",
        "fashion-sd",
        partial(deepcache, interval, branch),
        lambda steps: Cache(Deepcache(interval, skip)),
        wraps=True,
    )


PEERS = {
    "deepcache-3": deepcache_peer(3, branch=0, skip=0),
    "deepcache-5": deepcache_peer(5, branch=0, skip=0),
    "deepcache-deep": deepcache_peer(3, branch=3, skip=2),
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
