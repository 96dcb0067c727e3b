"""Puts images that are asked for at about the same time into one run of an engine.

An engine runs one batch at a time, in a thread of its own. The first image that waits is served
after `wait` seconds at the latest, or when the engine gets free; whatever else waits then comes
along, up to the largest batch.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from diffopt.errors import Cancelled

log = logging.getLogger("diffopt")

Serve = Callable[..., Sequence[Any]]
"""`Engine.serve`: takes the arguments of several calls, and `on_step=` where one wants to know."""


class Refused(Exception):
    """An image that is not taken now; `retry_after` has the seconds after which it may be."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Job:
    """An image to make.

    Attributes:
        arguments: Of the engine's call.
        on_step: Called in the engine's thread with each `Step` of the run, and the number of the
            image in it.
        result: What the engine returns.
        queued: When it was made, on the monotonic clock.
        is_gone: Whether nobody waits for it any more.
    """

    def __init__(
        self, arguments: Mapping[str, Any], on_step: Callable[[Any, int], None] | None = None
    ) -> None:
        self.arguments = arguments
        self.on_step = on_step
        self.result: Future[Any] = Future()
        self.queued = time.monotonic()
        self.is_gone = False


@dataclass(frozen=True)
class Batching:
    """How images are put together.

    Attributes:
        low: The fewest of a run; it is filled up with copies of the last image.
        high: The most of a run.
        wait: The seconds that the first one waits for others.
        queue: How many may wait.
    """

    low: int = 1
    high: int = 1
    wait: float = 0.0
    queue: int = 64


class Batcher:
    """Runs an engine in a thread, for the images that wait for it."""

    def __init__(
        self,
        serve: Serve,
        batching: Batching,
        *,
        end: Callable[[], None] = lambda: None,
        observe: Callable[[int, float], None] = lambda images, seconds: None,
    ) -> None:
        """Start the thread.

        Args:
            serve: Runs the engine.
            batching: How images are put together.
            end: `Engine.cancel`: ends the run after the step that it is in.
            observe: Called with the images of each run and its seconds.
        """
        self.batching = batching
        self._serve = serve
        self._end = end
        self._observe = observe
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._seconds = 1.0  # of the last run, to tell when to try again
        threading.Thread(target=self._work, name="engine", daemon=True).start()

    def count_waiting(self) -> int:
        """Return how many images wait."""
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether no image waits or is being made."""
        return not self._waiting and not self._running

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take all of the jobs into the queue, or none: that is a `Refused`."""
        with self._changed:
            if self._is_closed:
                raise Refused("the server is shutting down", retry_after=5)
            if len(self._waiting) + len(jobs) > self.batching.queue:
                runs = 1 + len(self._waiting) // self.batching.high
                raise Refused(
                    f"{len(self._waiting)} images wait already, and {self.batching.queue} may;"
                    " try again later",
                    retry_after=max(1, round(runs * self._seconds)),
                )
            self._waiting.extend(jobs)
            self._changed.notify_all()

    def cancel(self, jobs: Iterable[Job]) -> None:
        """Drop the jobs that are not done: nobody waits for them.

        A run ends after the step that it is in when nobody waits for any of its images.
        """
        with self._changed:
            for job in jobs:
                job.is_gone = True
                job.result.cancel()
                if job in self._waiting:
                    self._waiting.remove(job)
            self._changed.notify_all()
            self._end_if_gone()

    def close(self) -> None:
        """Take no more jobs, and end the thread when those that wait are done."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def abort(self) -> None:
        """Refuse what waits, and end the run."""
        self.close()
        with self._changed:
            while self._waiting:
                job = self._waiting.popleft()
                if job.result.set_running_or_notify_cancel():
                    job.result.set_exception(Refused("the server is shutting down", retry_after=5))
            for job in self._running:
                job.is_gone = True
            self._end_if_gone()

    def _end_if_gone(self) -> None:
        """End the run that nobody waits for; under the lock, so that it is not the next one."""
        unfinished = [job for job in self._running if not job.result.done()]
        if unfinished and all(job.is_gone for job in self._running):
            self._end()

    def _work(self) -> None:
        while (jobs := self._next()) is not None:
            if jobs:
                self._run(jobs)
            with self._changed:
                self._running = []

    def _next(self) -> list[Job] | None:
        """Wait for the images of the next run; None: there will be no more."""
        with self._changed:
            while not self._waiting:
                if self._is_closed:
                    return None
                self._changed.wait()
            while self._waiting and len(self._waiting) < self.batching.high:
                left = self._waiting[0].queued + self.batching.wait - time.monotonic()
                if left <= 0 or self._is_closed:
                    break
                self._changed.wait(left)
            count = min(self.batching.high, len(self._waiting))
            taken = [self._waiting.popleft() for _ in range(count)]
            self._running = [job for job in taken if job.result.set_running_or_notify_cancel()]
            return self._running

    def _run(self, jobs: Sequence[Job]) -> None:
        requests = [job.arguments for job in jobs]
        requests += requests[-1:] * (self.batching.low - len(jobs))
        watched: dict[str, Any] = {}
        if any(job.on_step for job in jobs):  # engines that run as one graph are slower watched
            watched["on_step"] = lambda step: _tell(jobs, step)
        began = time.monotonic()
        try:
            results = self._serve(requests, **watched)[: len(jobs)]
        except Exception as error:
            if len(jobs) == 1 or isinstance(error, Cancelled):
                for job in jobs:
                    job.result.set_exception(error)
                return
            for job in jobs:  # one's fault must not be the others'
                self._run([job])
            return
        self._seconds = time.monotonic() - began
        self._observe(len(jobs), self._seconds)
        for job, result in zip(jobs, results, strict=True):
            job.result.set_result(result)


def _tell(jobs: Sequence[Job], step: Any) -> None:
    """Tell those who want to know of a step."""
    for place, job in enumerate(jobs):
        if job.on_step is None or job.is_gone:
            continue
        try:
            job.on_step(step, place)
        except Exception as error:  # no preview of this engine, say, which is no one else's loss
            log.warning("no preview: %s", error)
            job.on_step = None
