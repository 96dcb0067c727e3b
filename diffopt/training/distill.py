"""Distill a reference into a rewritten program: train its weights for a short time.

A batch is of calls that are drawn from all requests, steps and branches. The loss of a call is

    mean over results of |y - y'|^2 / |y'|^2 + features * mean over blocks of |f - f'|^2 / |f'|^2

with y' and f' the reference's results and blocks' results for the same latents. Some requests are
held out, and of all states, the initial one included, that with the least error on these is kept.
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
from diffopt.storage import checkpoints as storage
from diffopt.storage import disk_cache
from diffopt.training import call_pairs
from diffopt.training.distillation_loss import DistillationLoss
from diffopt.training.distributed import Workers
from diffopt.training.trainable_weights import TrainableWeights

log = logging.getLogger("diffopt")


HELD_OUT, HELD_REQUESTS = 4, 8
"""One request in so many is held out, and at most so many."""
HELD_CALLS = 32
"""How many calls the held-out error is measured on, at most."""
_EVALUATIONS = 10  # of the held-out error
_BETAS = (0.9, 0.99)
_RATE, _RATE_OF_ERROR = 5e-4, 3e-3  # the learning rate by default: the second times the error
_WARM_UP = 0.1  # of the steps
_LEAST = 0.02  # of the learning rate, at the end


@dataclass(frozen=True)
class Settings:
    """Hyperparameters.

    Attributes:
        steps: Optimizer steps.
        lr: The largest learning rate; None: proportional to the initial error, with a bound.
        batch: Calls in a step.
        features: Weight of the loss on blocks' results.
        clip: The largest norm of the gradient.
        ema: Decay of the exponential moving average of weights; 0: no average.
        own: The share of requests whose latents the program computes, not the reference.
        seed: Of the batches.
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
    """The result of a training.

    Attributes:
        before: The relative error of held-out calls at the beginning.
        after: The same with the weights that were kept.
        best: The step after which these were the weights; 0: the initial ones.
        steps: How many were done.
        trained: How many parameters were trained.
        features: How many blocks' results were matched.
        stopped: Why it ended early; "" if it did not.
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


@dataclass(frozen=True, eq=False)
class Task:
    """A program to train, and the reference that it should reproduce.

    Attributes:
        program: The rewritten program.
        reference: The program before it was rewritten.
        inputs: The flat inputs of requests, two or more.
        names: The components whose weights are trained.
        keep: Patterns of modules whose weights are frozen.
    """

    program: Program
    reference: Program
    inputs: Sequence[Sequence[Tensor]]
    names: Sequence[str]
    keep: Sequence[str] = ()


@dataclass(frozen=True)
class Checkpoints:
    """Where (in a folder; None: the cache's) and how often (in seconds) the state is saved."""

    folder: Path | None = None
    every: float = 60.0


def recover(
    task: Task,
    settings: Settings,
    checkpoints: Checkpoints | None = None,
    workers: Workers | None = None,
    progress: Progress = silent,
) -> Outcome:
    """Train weights of a program in place, from the last checkpoint of the same task if any.

    Args:
        task: The program, its reference and requests.
        settings: The hyperparameters.
        checkpoints: Where and how often the state is saved.
        workers: The processes that batches are split over.
        progress: Called with what is being done and the fraction done.
    """
    workers, checkpoints = workers or Workers(), checkpoints or Checkpoints()
    if settings.batch < workers.count:
        raise DiffoptError(
            f"recover(batch={settings.batch}) is too small for {workers.count} processes: give"
            " each at least one call"
        )
    weights = TrainableWeights(task.program, task.names, task.keep, workers.device)
    if not weights.leaves:
        names = ", ".join(task.names)
        raise DiffoptError(f"recover has nothing to train in {names}: no weight is left")
    pairs = _sample(task, settings, workers.device, progress)
    trainer = _Trainer(task, weights, pairs, settings, workers, progress)
    outcome = trainer.train(
        _checkpoint_path(task, settings, checkpoints, workers), checkpoints.every
    )
    if outcome.best:
        weights.store(task.program)
    return outcome


def _sample(
    task: Task, settings: Settings, device: torch.device, progress: Progress
) -> list[list[call_pairs.CallPair]]:
    """Return the calls of each request; of the first ones the program computes the latents."""
    program, reference = call_pairs.pair_programs(task.program, task.names, task.reference, device)
    count = len(task.inputs)
    if count < 2:
        raise DiffoptError("recover wants samples=2 or more: some are held out")
    pairs: list[list[call_pairs.CallPair]] = []
    led = round(settings.own * (count - _held(count)))
    for i, tensors in enumerate(task.inputs):
        progress(f"sampling: request {i + 1} of {count}", None)
        pairs.append(call_pairs.gather_pairs(program, reference, tensors, i, program_leads=i < led))
    return pairs


def _checkpoint_path(
    task: Task, settings: Settings, checkpoints: Checkpoints, workers: Workers
) -> Path:
    """Return the file of a training's state, named after everything that the result depends on."""
    digest = {
        "recover": 2,
        "program": trajectories.identity(task.program, task.inputs),
        "reference": trajectories.identity(task.reference, ()),
        "settings": asdict(settings),
        "names": list(task.names),
        "keep": list(task.keep),
        "device": workers.device.type,
        "processes": workers.count,
    }
    folder = checkpoints.folder or disk_cache.folder() / "checkpoints"
    return folder / f"recover-{disk_cache.key(digest)[:16]}.zip"


def _held(count: int) -> int:
    """Return how many requests are held out."""
    return max(1, min(count // HELD_OUT, HELD_REQUESTS))


class _Trainer:
    """A training, and its state."""

    def __init__(
        self,
        task: Task,
        weights: TrainableWeights,
        pairs: Sequence[Sequence[call_pairs.CallPair]],
        settings: Settings,
        workers: Workers,
        progress: Progress,
    ) -> None:
        self._weights, self._settings, self._workers = weights, settings, workers
        self._progress = progress
        held = _held(len(pairs))
        self._pairs = [pair for calls in pairs[:-held] for pair in calls]
        out = [pair for calls in pairs[-held:] for pair in calls]
        count = min(HELD_CALLS, len(out))
        self._held_out = [out[i * len(out) // count] for i in range(count)]
        every = [*self._pairs, *self._held_out]
        self._matching = DistillationLoss(
            task.program, task.reference, every, weights, settings.features, workers.device
        )
        self._optimizer = torch.optim.AdamW(weights.leaves, betas=_BETAS, weight_decay=0.0)
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._average = weights.state() if settings.ema else []
        self._kept = weights.state()
        self._step = self._best = 0
        self._errors: dict[int, float] = {}

    def train(self, path: Path, every: float) -> Outcome:
        """Train to the end, from a checkpoint if there is one; keep the best weights.

        The file is not deleted at the end: passes after the training may still be interrupted.

        Args:
            path: The checkpoint.
            every: Seconds between two checkpoints.
        """
        settings = self._settings
        ended = self._resume(path)
        if not self._errors:
            self._evaluate()
        saved, stopped = time.monotonic(), ended or ""
        while ended is None and self._step < settings.steps:
            stopped = self._train_step()
            if stopped:
                break
            self._step += 1
            if self._step % -(-settings.steps // _EVALUATIONS) == 0 or self._step == settings.steps:
                self._evaluate()
            if time.monotonic() - saved >= every and self._step < settings.steps:
                self._save(path)
                saved = time.monotonic()
        if ended is None:
            self._save(path, stopped)
        self._weights.restore(self._kept)
        self._workers.wait()
        return Outcome(
            self._errors[0],
            self._errors[self._best],
            self._best,
            self._step,
            self._weights.count(),
            self._matching.blocks,
            stopped,
            dict(self._errors),
        )

    def _train_step(self) -> str:
        """Do an optimizer step; return why training has to stop, or an empty text."""
        settings, workers = self._settings, self._workers
        for group in self._optimizer.param_groups:
            group["lr"] = self._largest_rate() * _rate_factor(self._step, settings.steps)
        drawn = torch.randint(len(self._pairs), (settings.batch,), generator=self._generator)
        total = torch.zeros((), device=workers.device)
        batch = [self._pairs[index] for index in drawn[workers.rank :: workers.count].tolist()]
        for chunk in self._matching.chunks(batch):
            loss = self._matching.losses(chunk).sum() / settings.batch
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        leaves = self._weights.leaves
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

        Adam's steps are as large as the rate, however small the error is: with a small error, a
        rate that is right for a large one would first increase it.
        """
        lr = self._settings.lr
        return min(_RATE, _RATE_OF_ERROR * self._errors[0]) if lr is None else lr

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Measure the held-out error, and keep the weights if it is the least so far."""
        weights, current = self._weights, self._weights.state()
        if self._average:
            weights.restore(self._average)
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
            self._best, self._kept = self._step, weights.state()
        self._errors[self._step] = error
        weights.restore(current)

    # Checkpoints

    def _save(self, path: Path, ended: str | None = None) -> None:
        """Write the state; of a training that has ended, and why, only the kept weights."""
        if self._workers.rank:
            return
        lists, tensors = {"kept": self._kept}, {}
        if ended is None:
            lists |= {"leaf": self._weights.state(), "average": self._average}
            tensors["generator"] = self._generator.get_state()
            for index, state in self._optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer/{index}/{key}": value for key, value in state.items()}
        for name, values in lists.items():
            tensors |= {f"{name}/{i}": value for i, value in enumerate(values)}
        manifest = {"step": self._step, "best": self._best, "errors": list(self._errors.items())}
        storage.save(path, {**manifest, "ended": ended}, tensors)

    def _resume(self, path: Path) -> str | None:
        """Restore the state of an earlier run's checkpoint, if there is an intact one.

        Returns:
            Why that run ended early, or an empty text if it was complete; None if it was
            interrupted, or there was none.
        """
        loaded = storage.load(path)
        if loaded is None:
            return None
        manifest, tensors = loaded
        self._step, self._best = manifest["step"], manifest["best"]
        self._errors = dict(map(tuple, manifest["errors"]))
        where = self._workers.device

        def listed(name: str, count: int) -> list[Tensor]:
            return [tensors[f"{name}/{i}"].to(where) for i in range(count)]

        count = len(self._weights.leaves)
        self._kept = listed("kept", count)
        ended: str | None = manifest["ended"]
        if ended is not None:
            return ended
        self._generator.set_state(tensors["generator"])
        self._weights.restore(listed("leaf", count))
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


def _rate_factor(step: int, steps: int) -> float:
    """Return the learning rate as a fraction of the largest: linear warm-up, then a cosine."""
    warm = max(1, round(_WARM_UP * steps))
    done = max(0.0, (step - warm) / max(1, steps - warm))
    fall = _LEAST + (1 - _LEAST) * math.cos(done * math.pi / 2) ** 2
    return min(1.0, (step + 1) / warm) * fall
