"""Faster Diffusion: run a UNet's encoder at key steps only, and the decoders in between at once.

Senmao Li et al., Faster Diffusion: Rethinking the Role of UNet Encoder in Diffusion Models,
NeurIPS 2024 (2312.09608). Their code (hutaiHang/Faster-Diffusion) adds 0.003 of the initial latents
to the latents before the scheduler's step where t / 1000 < 0.5: the prior noise.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from diffopt.analysis.denoiser_structure import DenoiserStructure
from diffopt.caching.apply_plan import Loop, Plan, merge_calls
from diffopt.caching.policy import Needs, Policy, hold, option
from diffopt.core import Context
from diffopt.errors import DiffoptError
from diffopt.ir import graph as g
from diffopt.ir.printing import format_type

aten = torch.ops.aten

KEYS = (0, 1, 2, 3, 5, 10, 15, 25, 35)  # of 50 steps


@dataclass(frozen=True)
class FasterDiffusion(Policy):
    """Run a UNet's encoder at key steps only, and the decoders in between at once."""

    needs: ClassVar[Needs] = "skips"

    key_steps: tuple[int, ...] | None = option(
        None, f"steps that run the encoder; none: {KEYS} of 50 steps, scaled to the loop's"
    )

    prior_noise: float = option(
        0.003, "in the second half of the steps, so much of the initial latents is added; 0: none"
    )

    def __post_init__(self) -> None:
        keys = self.key_steps
        if not 0 <= self.prior_noise < 1:
            raise DiffoptError("faster-diffusion wants prior-noise >= 0 and < 1")
        if keys is not None and (not keys or keys[0] != 0 or list(keys) != sorted(set(keys))):
            raise DiffoptError("faster-diffusion wants key-steps that go up and begin with 0")

    def plan(self, loop: Loop, structure: DenoiserStructure, ctx: Context) -> Plan:
        """Reuse the encoder's outputs: the middle block's and the skip connections'."""
        keys = key_steps(loop.steps) if self.key_steps is None else self.key_steps
        if keys[-1] >= loop.steps:
            raise DiffoptError(
                f"key-steps has {keys[-1]}: the loop has {loop.steps} steps, 0 to {loop.steps - 1}"
            )
        values = dict.fromkeys([structure.middle, *(skip.shallow for skip in structure.skips)])
        plan = hold([(value, None) for value in values if value], keys, loop.steps)
        if plan and self.prior_noise:
            # Before the plan is applied: a decoder's call reads no latents by which to find them.
            add_prior_noise(loop, self.prior_noise, ctx)
        return plan

    def finish(self, loop: Loop, ctx: Context) -> None:
        """Run the decoders of the steps between two key steps as one batch."""
        saved = 0
        for branch in range(loop.branches):
            calls = [
                call for (_, branch_of_call), call in loop.calls.items() if branch_of_call == branch
            ]
            saved += merge_calls(loop.program, calls)
        ctx.note("calls saved by batching decoders", saved)


def add_prior_noise(loop: Loop, factor: float, ctx: Context) -> None:
    """Add `factor` times the initial latents to those that the scheduler reads, in late steps.

    The paper's late steps are those with timesteps below 500 of 1000. A captured program has no
    timesteps any more: they are the second half.
    """
    try:
        late = {step: latents(loop, step) for step in range(loop.steps // 2, loop.steps)}
        first = latents(loop, 0)
        _check_is_noise(first, [*late.values()])
    except NoLatents as error:
        ctx.skip(loop.name, f"no prior noise is added: {error}")
        return
    graph = loop.program.root.graph
    with graph.inserting_before(first.next):
        noise = g.call(graph, aten.mul.Tensor, first, factor, like=first)
    for step, node in late.items():
        before = g.ancestors([loop.calls[step, 0]])
        readers = [user for user in node.users if user not in before and user is not noise]
        with graph.inserting_before(node.next):
            noisy = g.call(graph, aten.add.Tensor, node, noise, like=node)
        for user in readers:
            user.replace_input_with(node, noisy)
    g.sort_topologically(loop.program.root)


class NoLatents(Exception):
    """A step's latents can't be identified; the message says why."""


def latents(loop: Loop, step: int) -> fx.Node:
    """Return the argument of a step's call, before any scaling, that the scheduler reads too."""
    call = loop.calls[step, 0]
    before, shared = g.ancestors([call]), dict[fx.Node, None]()
    for parameter, argument in zip(g.placeholders(loop.body), call.args, strict=True):
        for node in _trail(argument) if parameter in loop.loop_variant else ():
            if any(user not in before for user in node.users):
                shared[node] = None
    if len(shared) != 1:
        raise NoLatents(
            f"step {step} has {len(shared)} values that the denoiser and the scheduler both read"
        )
    return next(iter(shared))


def _trail(value: object) -> Iterator[fx.Node]:
    """Yield a value and the chain of values that it scales, casts or repeats."""
    while isinstance(value, fx.Node):
        yield value
        sources = {n for n in value.all_input_nodes if n.op != "get_attr"}
        value = sources.pop() if value.op == "call_function" and len(sources) == 1 else None


def _check_is_noise(first: fx.Node, others: Sequence[fx.Node]) -> None:
    above = g.ancestors([first])
    if any(n.op == "call_module" for n in above) or not any(n.op == "placeholder" for n in above):
        raise NoLatents("the initial latents are not noise alone")
    if any(format_type(n.meta["val"]) != format_type(first.meta["val"]) for n in others):
        raise NoLatents("the latents do not keep their shape")


def key_steps(steps: int) -> Sequence[int]:
    """Return the paper's key steps for 50 steps, scaled to another number of steps."""
    return sorted({key * steps // 50 for key in KEYS})
