"""Counts the weights that the sampling loop needs, before and after the exact passes.

No GPU is needed, nor the memory of the weights: nearly all of them are left zero (see `fill`).
"""

from __future__ import annotations

from typing import Any

import diffopt
from diffopt.ir import call_tags
from diffopt.ir import graph as g
from diffopt.ir.program import Program
from examples.gpu.measure import rewrite
from examples.gpu.models import MODELS

PASSES = "unroll,hoist,simplify"
"""The exact passes that change which weights the loop reads; `fuse` copies weights."""


def count(name: str, tiny: bool, steps: int) -> dict[str, Any]:
    """Return the bytes of weights of a model, and those that are read in the loop."""
    model = MODELS[name]
    pipe = model.build(tiny, "cpu", sparse=True)
    captured = diffopt.trace(pipe, **model.arguments(tiny, steps, 0))
    program = rewrite(captured, PASSES)
    net = getattr(pipe, model.denoiser)
    before, after = _in_loop(captured), _in_loop(program)
    return {
        "parameters": sum(weight.numel() for weight in net.parameters()),
        "steps": steps,
        "before": before,
        "after": after,
        "values": _exported_bytes(program),
        "flops": {"before": captured.flops(), "after": program.flops()},
    }


def _in_loop(program: Program) -> int:
    """Return the bytes of the weights that are not read before or after the loop alone."""
    releasable = set(program.releasable())
    in_loop = {
        id(tensor): tensor
        for name, gm in program.components.items()
        for key, tensor in g.named_tensors(gm)
        if f"{name}.{key}" not in releasable
    }
    return g.tensor_bytes(in_loop.values())


def _exported_bytes(program: Program) -> int:
    """Return the bytes of what is computed before the loop and read in it."""
    once = [call for call in program.calls() if call_tags.tag(call) is None]
    return sum(g.tensor_bytes(call.meta["val"]) for call in once)
