"""Train weights that earlier passes changed, so that the program does what it did before them.

Before: a program that `prune`, `low-rank`, `quantize` or `cache` has rewritten. After: the same
graph with other weights. Nothing else changes, so every other pass and target supports it.

The reference is the program as it was before the first approximate pass of the same pipeline, as in
`unroll,prune(channels),recover(steps=200)`, or the one in a file, as in
`recover(reference=FILE.program)`. It samples requests; in each call the results of the rewritten
component should be those of the reference's for the same latents, and so should those of each block
that both have. Both branches of guidance are calls, or rows of calls, like any other.

    loss = mean |y - y'|^2 / |y'|^2 + features * mean over blocks of |f - f'|^2 / |f'|^2

AdamW minimises it over calls drawn from all requests and steps, with a warm-up and a cosine. Floats
are trained directly; weights of few bits through their rounding (straight-through), with their
scales. Weights that components share are kept shared. Tables of timesteps, scales of activations
and everything in front of the loop are not trained.

A quarter of the requests, at most 8, is held out. Of all states the one with the least error on
these is kept, also if it is the first; a loss that is not finite ends the training there. A run
that was killed continues from its last checkpoint when the same command is run again, with the
same result.

Not rewritten when
- no state is better on what was held out than the one at the beginning;
- a weight's module matches `keep`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from diffopt.analysis.scope import Scope, choose_scope
from diffopt.core import Context, Needs, Pass, option
from diffopt.errors import DiffoptError
from diffopt.execution.calibration_inputs import representative
from diffopt.ir.program import Program
from diffopt.training import distill
from diffopt.training.distributed import Workers

LEAST, MOST = 16, 512
"""Bounds of the default number of requests: training on too few overfits to these."""


@dataclass(frozen=True)
class Recover(Pass):
    """Train weights so that the program does again what it did before it was approximated."""

    exact = False
    wants_reference = True
    # Its change removes error: no budget is spent.
    budget: ClassVar[float] = math.inf

    steps: int = option(200, "how long to train")
    lr: float | None = option(
        None, "the largest learning rate; by default 0.003 times the error, at most 0.0005"
    )
    batch: int = option(4, "calls of the denoiser in a step of the training")
    samples: int | None = option(
        None, "requests to train with; by default as many as have the calls that are drawn"
    )
    features: float = option(1.0, "weight of what blocks return, next to what the denoiser does")
    reference: str = option("", "a saved program to train against, if not the one at hand")
    components: tuple[str, ...] = option(
        ("loop",), "loop, or names of the components to train, which may be patterns"
    )
    keep: tuple[str, ...] = option((), "patterns of modules whose weights stay as they are")
    own: float = option(0.0, "share of requests on the latents that the program itself makes")
    ema: float = option(0.0, "of the average of weights that is kept; 0: the weights themselves")
    clip: float = option(1.0, "largest norm of the gradient")
    checkpoint: str = option("", "folder for the state of an unfinished training")
    every: float = option(60.0, "seconds between two checkpoints")
    accelerate: bool = option(False, "split batches over the processes of `accelerate launch`")

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise DiffoptError("recover wants steps >= 1 and batch >= 1")
        if self.lr is not None and not 0 < self.lr <= 1:
            raise DiffoptError("recover wants an lr above 0 and of at most 1, such as 0.0003")
        if not self.clip > 0:
            raise DiffoptError("recover wants clip > 0")
        if self.samples is not None and self.samples < 2:
            raise DiffoptError("recover wants samples >= 2: one of them at least is held out")
        if not 0 <= self.own <= 1 or not 0 <= self.ema < 1:
            raise DiffoptError("recover wants own from 0 to 1, and ema from 0 to below 1")
        if not 0 <= self.features < math.inf or not self.every >= 0:
            raise DiffoptError("recover wants features >= 0 and every >= 0")
        if self.checkpoint and Path(self.checkpoint).is_file():
            raise DiffoptError(f"recover(checkpoint={self.checkpoint}): is a file, wants a folder")

    def needs(self) -> Needs:
        """Return that it trains on calls of the program."""
        return "calibration"

    def runs(self, program: Program) -> float:
        """Return the runs that requests take, and three for each call of a step of training."""
        scope = choose_scope(program, self.components)
        calls = max(1, sum(map(len, scope.calls.values())))
        return (self.samples or LEAST) + 3 * self.steps * self.batch / calls

    def run(self, program: Program, ctx: Context) -> None:
        """Train, and note the result."""
        reference = self._reference(ctx)
        scope = choose_scope(program, self.components)
        names = scope.loop if self.components == ("loop",) else list(scope.calls)
        samples = self.samples or self._enough(scope, names)
        inputs = representative(str(self), program, ctx.prompts, samples, ctx.seed)
        settings = distill.Settings(
            self.steps, self.lr, self.batch, self.features, self.clip, self.ema, self.own, ctx.seed
        )
        began = time.perf_counter()
        outcome = distill.recover(
            distill.Task(program, reference, inputs, names, self.keep),
            settings,
            distill.Checkpoints(Path(self.checkpoint) if self.checkpoint else None, self.every),
            Workers(self.accelerate),
            ctx.progress,
        )
        if outcome.stopped:
            ctx.skip(f"step {outcome.steps + 1}", f"{outcome.stopped}; try a smaller lr")
        elif not outcome.best:
            ctx.skip(", ".join(names), "no step has made held-out calls better: try another lr")
        ctx.note("held-out error", {"before": outcome.before, "after": outcome.after})
        # JSON has no infinities and no nan.
        finite = {str(step): e for step, e in outcome.errors.items() if math.isfinite(e)}
        ctx.note("errors", finite)
        ctx.note("requests", samples)
        ctx.note("steps", {"done": outcome.steps, "kept": outcome.best})
        ctx.note("weights trained", outcome.trained)
        ctx.note("blocks matched", outcome.features)
        ctx.note("seconds", time.perf_counter() - began)

    def _enough(self, scope: Scope, names: Sequence[str]) -> int:
        """Return how many requests have as many calls as training draws."""
        calls = sum(len(scope.calls[name]) for name in names)
        return min(max(LEAST, -(-self.steps * self.batch // max(1, calls))), MOST)

    def _reference(self, ctx: Context) -> Program:
        if self.reference:
            return Program.load(self.reference)
        if ctx.reference is None:
            raise DiffoptError(
                "recover has nothing to train against: no pass before it has approximated the"
                " program. Put it behind one, as in unroll,prune(channels),recover, or name the"
                " program from before, as in recover(reference=FILE.program)"
            )
        return ctx.reference
