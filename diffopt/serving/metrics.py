"""What Prometheus collects."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
IMAGES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)


class Metrics:
    """The numbers of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "diffopt_requests", "Requests.", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "diffopt_request_seconds",
            "From the first byte of a request to the last of its answer.",
            ["path"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.images = Counter("diffopt_images", "Images.", ["model"], registry=self.registry)
        self.batch = Histogram(
            "diffopt_batch_size",
            "Images of a run.",
            ["model"],
            buckets=IMAGES,
            registry=self.registry,
        )
        self.run_seconds = Histogram(
            "diffopt_run_seconds",
            "Of a run of an engine.",
            ["model"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.waiting = Gauge(
            "diffopt_queue_images", "Images that wait.", ["model"], registry=self.registry
        )

    def observer(self, model: str) -> Callable[[int, float], None]:
        """Return what counts the runs of a model."""
        images, batch = self.images.labels(model), self.batch.labels(model)
        seconds = self.run_seconds.labels(model)

        def observe(count: int, taken: float) -> None:
            images.inc(count)
            batch.observe(count)
            seconds.observe(taken)

        return observe

    def watch_queue(self, model: str, waiting: Callable[[], float]) -> None:
        """Ask `waiting` for the length of a model's queue."""
        self.waiting.labels(model).set_function(waiting)

    def text(self) -> bytes:
        """Return all of it in Prometheus's format."""
        return generate_latest(self.registry)
