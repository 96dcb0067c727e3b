"""T-GATE: after a gate step, reuse every cross-attention's output of that step.

Haozhe Liu et al., Faster Diffusion via Temporal Attention Decomposition, 2024 (2404.02747).
"""

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from diffopt.analysis.denoiser_structure import DenoiserStructure
from diffopt.caching.apply_plan import Loop, Plan
from diffopt.caching.policy import Needs, Policy, branch_values, hold, merge, option
from diffopt.core import Context
from diffopt.errors import DiffoptError
from diffopt.ir import graph as g
from diffopt.transforms import batch_slice, drop_guidance


@dataclass(frozen=True)
class TGate(Policy):
    """Take every cross-attention's output from the step before a gate."""

    needs: ClassVar[Needs] = "cross-attention"

    gate: int = option(10, "the first step that takes cross-attention from before (m)")
    warm_up: int = option(2, "steps before this one compute self-attention")
    sp_interval: int = option(1, "from there to the gate: self-attention every so many steps")
    fi_interval: int = option(1, "after the gate: self-attention every so many steps")

    def __post_init__(self) -> None:
        if min(self.gate, self.sp_interval, self.fi_interval) < 1 or self.warm_up < 0:
            raise DiffoptError(
                "t-gate wants gate >= 1, sp-interval >= 1, fi-interval >= 1 and warm-up >= 0"
            )

    def plan(self, loop: Loop, structure: DenoiserStructure, ctx: Context) -> Plan:
        """Reuse cross-attention after the gate, and self-attention between its intervals."""
        if self.gate >= loop.steps:
            raise DiffoptError(
                f"gate={self.gate}: the loop has {loop.steps} steps, so no step is after the gate"
            )
        computed = self_attention(
            loop.steps, self.gate, self.warm_up, self.sp_interval, self.fi_interval
        )
        crossed = hold(branch_values(structure, ["cross-attention"]), range(self.gate), loop.steps)
        return merge([crossed, hold(branch_values(structure, ["attention"]), computed, loop.steps)])

    def finish(self, loop: Loop, ctx: Context) -> None:
        """Remove the unconditional branch after the gate."""
        after = [step for step in range(self.gate, loop.steps) if (step, 0) in loop.calls]
        if loop.branches == 1:
            _drop_halves(loop, after, ctx)
        elif loop.branches == 2:
            _drop_calls(loop, after, ctx)
        else:
            ctx.skip(loop.name, f"guidance goes on after the gate: {loop.branches} calls a step")


def _drop_halves(loop: Loop, after: list[int], ctx: Context) -> None:
    """Remove the unconditional half of a batch of both branches."""
    known: dict[object, tuple[str, batch_slice.ShardedBody]] = {}
    reasons: dict[str, list[int]] = {}
    for step in reversed(after):
        call = loop.calls[step, 0]
        try:
            drop_guidance.drop(loop.program, call, known)
        except drop_guidance.Unguided as error:
            reasons.setdefault(str(error), []).append(step)
    for reason, steps in reasons.items():
        which = ", ".join(map(str, reversed(steps)))
        ctx.skip(loop.name, f"steps {which}: the whole batch is computed: {reason}")


def _drop_calls(loop: Loop, after: list[int], ctx: Context) -> None:
    """Remove the calls of the unconditional branch."""
    for step in after:
        if (step, 1) not in loop.calls:
            continue
        a, b = loop.calls[step, 0], loop.calls[step, 1]
        kept = conditional(a, b)
        if kept is None:
            ctx.skip(f"step {step}", "guidance goes on: its branches can't be told apart")
            continue
        # u + s (c - u) with u = c is c: the guided result is the conditional one.
        _replace_results(loop.program.root.graph, b if kept is a else a, kept)
    g.sort_topologically(loop.program.root)


def conditional(a: fx.Node, b: fx.Node) -> fx.Node | None:
    """Return the call of the conditional branch: the minuend of c - u; None if there is none."""
    below = {call: g.descendants([call]) for call in (a, b)}
    joins = [n for n in a.graph.nodes if n in below[a] and n in below[b]]
    if not joins or joins[0].target is not torch.ops.aten.sub.Tensor:
        return None
    return next((call for call in (a, b) if joins[0].args[0] in below[call]), None)


def _replace_results(graph: fx.Graph, old: fx.Node, new: fx.Node) -> None:
    for user in list(old.users):
        with graph.inserting_after(new):
            result = g.call(graph, operator.getitem, new, user.args[1])
        user.replace_all_uses_with(result)


def self_attention(steps: int, gate: int, warm_up: int, before: int, after: int) -> list[int]:
    """Return the steps that compute self-attention."""
    computed = {*range(min(warm_up + 1, gate)), gate - 1}
    computed |= {s for s in range(steps) if s % (before if s < gate else after) == 0}
    return sorted(computed)
