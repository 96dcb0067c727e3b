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

from dataclasses import dataclass

from diffopt.analysis.denoiser_structure import analyze_denoiser
from diffopt.caching import apply_plan, reuse_plan, step_map
from diffopt.caching.policy import Policy, check_fits, policy_names
from diffopt.core import Context, Needs, Pass, option
from diffopt.errors import DiffoptError
from diffopt.ir.program import Program


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

    def needs(self) -> Needs:
        """Return that the policy measures on calls, if it does."""
        return "calibration" if self.policy is not None and self.policy.runs() else "nothing"

    def runs(self, program: Program) -> float:
        """Return the runs that the policy takes."""
        return 0.0 if self.policy is None else self.policy.runs()

    def run(self, program: Program, ctx: Context) -> None:
        """Make the policy's plan, and rewrite the loop."""
        if self.policy is None:
            raise DiffoptError(
                "cache wants a policy, as in cache(deepcache,interval=3); there are "
                f"{', '.join(policy_names())}"
            )
        loop = apply_plan.find_loop(program)
        structure = analyze_denoiser(loop.body, loop.loop_variant)
        check_fits(self.policy, loop.name, structure)
        plan = {i: reuses for i, reuses in self.policy.plan(loop, structure, ctx).items() if reuses}
        if not plan:
            ctx.skip(loop.name, f"{self.policy.name} computes everything in every step")
            return
        steps = reuse_plan.resolve(loop, plan)
        predicted = step_map.predicted_flops(loop, steps)
        applied = apply_plan.apply(program, loop, plan)
        work = step_map.work_by_call(program, loop)
        self.policy.finish(loop, ctx)
        program.refresh()
        peak = applied.peak_cache_bytes
        if self.max_cache_mb is not None and peak > self.max_cache_mb * 2**20:
            raise DiffoptError(
                f"{self} keeps up to {peak / 2**20:.3g} MB of values for later steps, over "
                f"max-cache-mb={self.max_cache_mb:g}"
            )
        work = step_map.remaining_work(program, loop, work)
        ctx.note(
            loop.name,
            {
                "map": step_map.step_map(loop, steps, work),
                "legend": step_map.LEGEND,
                "flops": {
                    "before": applied.flops_before,
                    "predicted": predicted,
                    "measured": step_map.measured_flops(program, loop),
                },
                "bodies": len({str(call.target) for call in step_map.loop_calls(program, loop)}),
                "peak cache bytes": peak,
            },
        )
