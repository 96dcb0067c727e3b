"""Trains a rewritten program for a short time, so that it does again what its reference does.

A batch is of calls that are drawn from all requests, steps and branches. The loss of a call is

    mean over results of |y - y'|^2 / |y'|^2 + features * mean over blocks of |f - f'|^2 / |f'|^2

with y' and f' what the reference returns and has for the same latents. Some requests are held out,
and of all states the one with the least error on these is kept: the one before is one of them.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffopt.errors import DiffoptError
from diffopt.execution import trajectories
from diffopt.ir.program import Program
from diffopt.progress import Progress, silent
from diffopt.storage import checkpoints, disk_cache
from diffopt.training import call_pairs
from diffopt.training.distillation_loss import Matching
from diffopt.training.distributed import Workers
from diffopt.training.trainable_weights import Trained

log = logging.getLogger("diffopt")


HELD_OUT, HELD_REQUESTS = 4, 8
"""One request of so many is held out, and at most so many."""
HELD_CALLS = 32
"""On at most so many calls the error is measured."""
_LOOKS = 10  # how often it is
_BETAS = (0.9, 0.99)
_RATE, _RATE_OF_ERROR = 5e-4, 3e-3  # the learning rate by default: the second times the error
_WARM_UP = 0.1  # of the steps
_LEAST = 0.02  # of the learning rate, at the end


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        steps: How long.
        lr: The largest learning rate; None: as large as the error to begin with allows.
        batch: Calls in a step.
        features: Weight of the blocks' results next to the components'.
        clip: The largest norm of the gradient.
        ema: How much of an average of weights each step keeps; 0: no average.
        own: The share of requests whose latents are those that the program itself makes.
        seed: Of what is drawn.
    """

    steps: int
    lr: float | None = None
    batch: int = 4
    features: float = 1.0
    clip: float = 1.0
    ema: float = 0.0
    own: float = 0.0
    seed: int = 0


@dataclass
class Outcome:
    """What came of it.

    Attributes:
        before: The relative error of held-out calls at the beginning.
        after: The same with the weights that were kept.
        best: The step after which they were had; 0: those of the beginning.
        steps: How many were done.
        trained: How many numbers.
        features: How many blocks were matched.
        stopped: Why it ended early.
        errors: The held-out error by step.
    """

    before: float
    after: float
    best: int
    steps: int
    trained: int
    features: int
    stopped: str
    errors: dict[int, float]


def recover(
    program: Program,
    reference: Program,
    inputs: Sequence[Sequence[Tensor]],
    names: Sequence[str],
    settings: Settings,
    *,
    keep: Sequence[str] = (),
    checkpoint: Path | None = None,
    every: float = 60.0,
    workers: Workers | None = None,
    progress: Progress = silent,
) -> Outcome:
    """Train weights of a program in place.

    Args:
        program: What was rewritten.
        reference: What it should do.
        inputs: The flat inputs of requests, two or more.
        names: The components whose weights are trained.
        settings: How.
        keep: Patterns of modules whose weights stay as they are.
        checkpoint: The folder for the state of the training.
        every: Seconds between two checkpoints.
        workers: The processes that do it together.
        progress: Called with what is being done and the fraction done.
    """
    workers = workers or Workers()
    if settings.batch < workers.count:
        raise DiffoptError(
            f"recover(batch={settings.batch}) is too small for {workers.count} processes: give"
            " each at least one call"
        )
    trained = Trained(program, names, keep, workers.device)
    if not trained.leaves:
        raise DiffoptError(f"recover has nothing to train in {', '.join(names)}: no weight is left")
    own, other = call_pairs.match(program, names, reference, workers.device)
    if len(inputs) < 2:
        raise DiffoptError("recover wants samples=2 or more: some are held out")
    pairs: list[list[call_pairs.Pair]] = []
    led = round(settings.own * (len(inputs) - _held(len(inputs))))
    for i, tensors in enumerate(inputs):
        progress(f"sampling: request {i + 1} of {len(inputs)}", None)
        pairs.append(call_pairs.gather(own, other, tensors, i, own=i < led))
    trainer = _Trainer(program, reference, trained, pairs, settings, workers, progress)
    digest = {
        "recover": 2,
        "program": trajectories.identity(program, inputs),
        "reference": trajectories.identity(reference, ()),
        "settings": asdict(settings),
        "names": list(names),
        "keep": list(keep),
        "device": workers.device.type,
        "processes": workers.count,
    }
    folder = checkpoint or disk_cache.folder() / "checkpoints"
    path = folder / f"recover-{disk_cache.key(digest)[:16]}.zip"
    outcome = trainer.train(path, every)
    if outcome.best:
        trained.store(program)
    return outcome


def _held(count: int) -> int:
    """Return how many requests are held out."""
    return max(1, min(count // HELD_OUT, HELD_REQUESTS))


class _Trainer:
    """A training, and its state."""

    def __init__(
        self,
        program: Program,
        reference: Program,
        trained: Trained,
        pairs: Sequence[Sequence[call_pairs.Pair]],
        settings: Settings,
        workers: Workers,
        progress: Progress,
    ) -> None:
        self._trained, self._settings, self._workers = trained, settings, workers
        self._progress = progress
        held = _held(len(pairs))
        self._pairs = [pair for own in pairs[:-held] for pair in own]
        out = [pair for own in pairs[-held:] for pair in own]
        count = min(HELD_CALLS, len(out))
        self._held_out = [out[i * len(out) // count] for i in range(count)]
        every = [*self._pairs, *self._held_out]
        self._matching = Matching(
            program, reference, every, trained, settings.features, workers.device
        )
        self._optimizer = torch.optim.AdamW(trained.leaves, betas=_BETAS, weight_decay=0.0)
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._average = trained.state() if settings.ema else []
        self._kept = trained.state()
        self._step = self._best = 0
        self._errors: dict[int, float] = {}

    def train(self, path: Path, every: float) -> Outcome:
        """Train to the end, from where an earlier run left off; keep the best weights.

        What was kept stays in the file: what follows the training may still be interrupted.

        Args:
            path: The file with the state.
            every: Seconds between two states.
        """
        settings = self._settings
        ended = self._resume(path)
        if not self._errors:
            self._look()
        saved, stopped = time.monotonic(), ended or ""
        while ended is None and self._step < settings.steps:
            stopped = self._advance()
            if stopped:
                break
            self._step += 1
            if self._step % -(-settings.steps // _LOOKS) == 0 or self._step == settings.steps:
                self._look()
            if time.monotonic() - saved >= every and self._step < settings.steps:
                self._save(path)
                saved = time.monotonic()
        if ended is None:
            self._save(path, stopped)
        self._trained.restore(self._kept)
        self._workers.wait()
        return Outcome(
            self._errors[0],
            self._errors[self._best],
            self._best,
            self._step,
            self._trained.count(),
            self._matching.blocks,
            stopped,
            dict(self._errors),
        )

    def _advance(self) -> str:
        """Do a step; return why it cannot be done, if so."""
        settings, workers = self._settings, self._workers
        for group in self._optimizer.param_groups:
            group["lr"] = self._largest_rate() * _share(self._step, settings.steps)
        drawn = torch.randint(len(self._pairs), (settings.batch,), generator=self._generator)
        total = torch.zeros((), device=workers.device)
        own = [self._pairs[index] for index in drawn[workers.rank :: workers.count].tolist()]
        for chunk in self._matching.chunks(own):
            loss = self._matching.losses(chunk).sum() / settings.batch
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        leaves = self._trained.leaves
        for leaf in leaves:  # not read by the bodies of this batch
            leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
        total, *gradients = workers.sum([total, *gradients])
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(leaves, settings.clip)
        if not bool((total + norm).isfinite()):
            calls = "; ".join(self._pairs[i].where for i in drawn.tolist())
            return f"the loss is not finite in step {self._step + 1} (of {calls})"
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._average:
            keeps = min(settings.ema, (1 + self._step) / (10 + self._step))
            for mean, leaf in zip(self._average, leaves, strict=True):
                mean.lerp_(leaf.detach(), 1 - keeps)
        least = min(self._errors.values())
        what = f"recovering: step {self._step + 1}, loss {float(total):.3g}, best error {least:.3g}"
        self._progress(what, self._step / settings.steps)
        return ""

    def _largest_rate(self) -> float:
        """Return the largest learning rate.

        Adam's steps have the size of the rate, however small the error is: where little is to be
        recovered, a rate that recovers much would first lose what is there.
        """
        own, begin = self._settings.lr, self._errors[0]
        return min(_RATE, _RATE_OF_ERROR * begin) if own is None else own

    @torch.no_grad()
    def _look(self) -> None:
        """Measure the held-out error, and keep the weights if there was none less."""
        trained, current = self._trained, self._trained.state()
        if self._average:
            trained.restore(self._average)
        total = 0.0
        for chunk in self._matching.chunks(self._held_out):
            errors = self._matching.errors(chunk)
            if not self._errors and not bool(errors.isfinite().all()):
                pair = chunk[int((~errors.isfinite()).nonzero()[0])]
                raise DiffoptError(
                    f"{pair.name} returns values that are not finite in {pair.where}: there is"
                    " nothing to recover from"
                )
            total += float(errors.sum())
        error = math.sqrt(total / len(self._held_out))
        if error < min(self._errors.values(), default=math.inf):  # nan is not
            self._best, self._kept = self._step, trained.state()
        self._errors[self._step] = error
        trained.restore(current)

    # Checkpoints

    def _save(self, path: Path, ended: str | None = None) -> None:
        """Write the state; of a training that has ended (and why, if early) what was kept."""
        if self._workers.rank:
            return
        lists, tensors = {"kept": self._kept}, {}
        if ended is None:
            lists |= {"leaf": self._trained.state(), "average": self._average}
            tensors["generator"] = self._generator.get_state()
            for index, state in self._optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer/{index}/{key}": value for key, value in state.items()}
        for name, values in lists.items():
            tensors |= {f"{name}/{i}": value for i, value in enumerate(values)}
        manifest = {"step": self._step, "best": self._best, "errors": list(self._errors.items())}
        checkpoints.save(path, {**manifest, "ended": ended}, tensors)

    def _resume(self, path: Path) -> str | None:
        """Take over the state that an earlier run has left, if it is intact.

        Returns:
            Why that run ended early, or an empty text if it came to its end; None if it was
            interrupted, or there was none.
        """
        found = checkpoints.load(path)
        if found is None:
            return None
        manifest, tensors = found
        self._step, self._best = manifest["step"], manifest["best"]
        self._errors = dict(map(tuple, manifest["errors"]))
        where = self._workers.device

        def listed(name: str, count: int) -> list[Tensor]:
            return [tensors[f"{name}/{i}"].to(where) for i in range(count)]

        count = len(self._trained.leaves)
        self._kept = listed("kept", count)
        ended: str | None = manifest["ended"]
        if ended is not None:
            return ended
        self._generator.set_state(tensors["generator"])
        self._trained.restore(listed("leaf", count))
        self._average = listed("average", len(self._average))
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, _, rest = key.partition("/")
            if kind == "optimizer":
                index, _, name = rest.partition("/")
                state.setdefault(int(index), {})[name] = tensor
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        log.info("recover: going on after step %d, from %s", self._step, path)
        return None


def _share(step: int, steps: int) -> float:
    """Return the share of the largest learning rate: a warm-up, then a cosine."""
    warm = max(1, round(_WARM_UP * steps))
    done = max(0.0, (step - warm) / max(1, steps - warm))
    fall = _LEAST + (1 - _LEAST) * math.cos(done * math.pi / 2) ** 2
    return min(1.0, (step + 1) / warm) * fall
