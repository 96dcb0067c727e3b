"""Take values of the denoiser from earlier steps of the sampling loop in place of computing them.

Before:

    %unet: (float32[2,4,8,8]) = unet(%latents, %row0)
    …
    %unet_1: (float32[2,4,8,8]) = unet(%latents_1, %row1)

After `cache(deepcache,interval=2)`, the second step computing the outermost level alone:

    %unet: (float32[2,4,8,8], float32[2,16,8,8]) = unet(%latents, %row0)
    %deep = operator.getitem(%unet, 1)
    …
    %unet_1: (float32[2,4,8,8]) = unet_1(%latents_1, %row1, %deep)

The first word is a policy: it chooses which values each step takes from which earlier ones, as they
were or as weighted sums. Policies differ in this alone. Steps that compute the same share a body.

Not rewritten when
- the policy computes everything in every step, as with `interval=1`;
- but refused when the denoiser lacks what the policy is about, when the program was not unrolled,
  or when the values kept at one time take more than `max-cache-mb`.
"""

import itertools
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import fx

from diffopt import graph as g
from diffopt import reuse, tags
from diffopt.anatomy import Anatomy, Branch, anatomy
from diffopt.core import Context, Pass, option
from diffopt.errors import DiffoptError
from diffopt.policy import Policy, check_fits, policy_names
from diffopt.program import Program


@dataclass(frozen=True)
class Cache(Pass):
    """Take values of the denoiser from earlier steps of the sampling loop."""

    exact = False

    policy: Policy | None = option(  # noqa: RUF009 (a policy is frozen)
        None, "which values are taken from which steps, written first; its options follow"
    )
    max_cache_mb: float | None = option(None, "most memory for values kept for later steps")
    budget: float | None = option(None, "largest relative error that the pass may add")

    def __post_init__(self) -> None:
        if (self.max_cache_mb or 0) < 0 or (self.budget or 0) < 0:
            raise DiffoptError("cache wants max-cache-mb >= 0 and budget >= 0")

    def run(self, program: Program, ctx: Context) -> None:
        """Let the policy choose, and rewrite the loop."""
        if self.policy is None:
            raise DiffoptError(
                "cache wants a policy, as in cache(deepcache,interval=3); there are "
                f"{', '.join(policy_names())}"
            )
        loop = reuse.find_loop(program)
        parts = anatomy(loop.body, changing(loop))
        check_fits(self.policy, loop.name, parts)
        plan = {i: taken for i, taken in self.policy.plan(loop, parts, ctx).items() if taken}
        if not plan:
            ctx.skip(loop.name, f"{self.policy.name} computes everything in every step")
            return
        own = {tags.tag(call) for call in loop.calls.values()}
        applied = reuse.apply(program, loop, plan)
        rows = table(program, loop, parts, plan)
        self.policy.finish(loop, ctx)
        program.refresh()
        left = [str(call.target) for call in program.calls() if tags.tag(call) in own]
        after = sum(g.flops(program.components[name]) for name in left)
        kept = applied.peak_cache_bytes
        if self.max_cache_mb is not None and kept > self.max_cache_mb * 2**20:
            raise DiffoptError(
                f"{self} keeps up to {kept / 2**20:.3g} MB of values for later steps, over "
                f"max-cache-mb={self.max_cache_mb:g}"
            )
        ctx.note(
            loop.name,
            {
                "FLOPs of all steps": [applied.flops_before, after],
                "bodies": len(set(left)),
                "peak cache bytes": kept,
                "computed #, in part +, reused -, extrapolated ~": rows,
            },
        )


def changing(loop: reuse.Loop) -> list[fx.Node]:
    """Return the arguments of the loop's body that depend on an earlier call."""
    late = g.descendants(loop.calls.values())
    takes = g.placeholders(loop.body)
    return [n for i, n in enumerate(takes) if any(c.args[i] in late for c in loop.calls.values())]


def table(program: Program, loop: reuse.Loop, parts: Anatomy, plan: reuse.Plan) -> dict[str, str]:
    """Return for each block a row with a sign for each step: see the key of the note."""
    bodies = [program.components[str(call.target)] for (_, b), call in loop.calls.items() if b == 0]
    alive = [{n.name for n in body.graph.nodes if n.op == "call_function"} for body in bodies]
    rows: dict[str, str] = {}
    for index, block in enumerate(parts.blocks):
        nodes = inside(block.branches)
        layers = [n for n in nodes if n.op == "call_function" and g.node_flops(n)]
        sums = [
            any(r.value in nodes and len(r.terms) > 1 for r in plan.get(step, ()))
            for step in range(loop.steps)
        ]
        names = {n.name for n in layers}
        signs = (sign(names, there, s) for there, s in zip(alive, sums, strict=True))
        rows[label(layers, f"block {index}", rows)] = "".join(signs)
    return rows


def inside(branches: Iterable[Branch]) -> set[fx.Node]:
    """Return the nodes that compute what branches add, without those of branches inside them."""
    found: set[fx.Node] = set()
    for branch in branches:
        between = g.descendants([branch.source]) & g.ancestors([branch.value])
        found |= between - {branch.source} - inside(branch.inner)
    return found


def sign(layers: set[str], alive: set[str], is_sum: bool) -> str:
    """Say how much of what costs is computed in a step."""
    if layers <= alive:
        return "#"
    return "+" if layers & alive else "~" if is_sum else "-"


def label(layers: Collection[fx.Node], default: str, taken: Collection[str]) -> str:
    """Return the path that the modules of layers have in common, for people to read."""
    paths = [str(n.meta["module"]).split(".") for n in layers if n.meta.get("module")]
    shared = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
    name = ".".join(names[0] for names in shared)
    return name if name and name not in taken else default
