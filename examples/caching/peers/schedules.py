"""Finds which layers each step computes, of a pipeline by hooks and of a program in its graphs."""

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch

from diffopt.caching.apply_plan import find_loop
from diffopt.cli import timing
from diffopt.ir import call_tags
from diffopt.ir.flops import node_flops
from diffopt.ir.program import Program
from examples.caching.peers.pairs import Peer
from examples.caching.peers.pipelines import denoiser, unrolled
from examples.study.models import load


def layers(peer: Peer, steps: int) -> list[str]:
    """Return the layers, such as linears, for which a step without a cache pays."""
    program = unrolled(peer.model, steps)
    net = denoiser(load(peer.model))
    paths = costly(find_loop(program).body)
    return sorted(path for path in paths if not [*net.get_submodule(path).children()])


def costly(body: torch.fx.GraphModule) -> set[str]:
    """Return the modules whose operators in a body cost FLOPs."""
    nodes = [n for n in body.graph.nodes if n.op == "call_function" and n.meta.get("module")]
    return {str(n.meta["module"]) for n in nodes if node_flops(n)}


def computed_by_engine(cached: Program, peer: Peer, steps: int) -> list[set[str]]:
    """Return the layers that each step of a program computes."""
    loop = find_loop(unrolled(peer.model, steps))
    step_of = {call_tags.tag(call): step for (step, _), call in loop.calls.items()}
    calls = {call: str(call.target) for call in cached.calls() if call_tags.tag(call) in step_of}
    costs = {name: costly(cached.components[name]) for name in {*calls.values()}}
    known = {*layers(peer, steps)}
    computed = [set[str]() for _ in range(steps)]
    for call, name in calls.items():
        computed[step_of[call_tags.tag(call)]] |= costs[name] & known
    return computed


def computed_by_peer(pipe: Any, make: timing.Sampler, paths: Collection[str]) -> list[set[str]]:
    """Return the layers that each step of a pipeline computes."""
    net = denoiser(pipe)
    computed: list[set[str]] = []
    handles = [net.register_forward_pre_hook(lambda *_: computed.append(set()))]
    for path in paths:
        hook = partial(lambda path, *_: computed[-1].add(path), path)
        handles.append(net.get_submodule(path).register_forward_hook(hook))
    make(0)
    for handle in handles:
        handle.remove()
    return computed


def signs(computed: Sequence[Collection[str]]) -> str:
    """Return a sign for each step: all layers computed, some of them, none."""
    return "".join("#" if len(s) == len(computed[0]) else "+" if s else "-" for s in computed)
