"""Engines that draw nothing, for tests of what is around them, and servers of them."""

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image

from diffopt.errors import Cancelled, DiffoptError
from diffopt.host.guards import Mismatch
from diffopt.serving import server
from diffopt.serving.app import Service
from diffopt.serving.settings import Settings

SIZE = (16, 8)


class FakeHost:
    def __init__(self, schema: Mapping[str, Any], draws: bool = True) -> None:
        self.schema = dict(schema)
        self.draws = draws

    def inputs(self) -> set[str]:
        return {*self.schema, *(["seed"] if self.draws else [])} - {"guidance_scale"}

    def takes_seed(self) -> bool:
        return self.draws

    def seeded(self, arguments: Mapping[str, Any], seed: int) -> dict[str, Any]:
        return {**arguments, "seed": seed}


@dataclass
class FakeStep:
    index: int
    total: int
    count: int

    def previews(self) -> list[Image.Image]:
        return [Image.new("RGB", (2, 1), (place, self.index, 0)) for place in range(self.count)]


class FakeEngine:
    """Makes a picture of one colour, its seed; `prompt="fail"` fails, `"refuse"` is refused.

    `"long"` is refused by the run, which is the first to see what is wrong with it.
    """

    def __init__(
        self,
        batch: tuple[int, int] | None = (1, 4),
        *,
        seconds: float = 0.0,
        steps: int = 4,
        schema: Mapping[str, Any] | None = None,
        draws: bool = True,
    ) -> None:
        self.path = Path("fake.engine")
        self.manifest = {"target": "eager", "passes": "unroll"}
        self.batch = batch
        self.steps = steps
        self.seconds = seconds
        default = {"prompt": {"value": "a cat"}, "guidance_scale": {"value": 7.5}}
        self.host = FakeHost(default if schema is None else schema, draws)
        self.runs: list[list[dict[str, Any]]] = []
        self.ended = 0
        self.cancels = 0
        self.gate = threading.Event()
        self.gate.set()

    def check(self, /, **arguments: Any) -> None:
        for name, value in arguments.items():
            if name == "guidance_scale" and value != 7.5:
                raise DiffoptError(f"guidance_scale={value}: 'guidance_scale' was bound to 7.5")
            if name not in (*self.host.schema, "seed", "output_type"):
                raise DiffoptError(f"{name}={value}: the program was traced without {name!r}")
        if arguments.get("prompt") == "refuse":
            raise DiffoptError("prompt: the engine does not like it")

    def converts(self, output_type: str) -> bool:
        return True

    def picture_sizes(self) -> list[tuple[int, int]]:
        return [SIZE]

    def digest(self) -> str:
        return "0123"

    def cancel(self) -> None:
        self.cancels += 1

    def serve(self, requests: Sequence[Mapping[str, Any]], *, on_step: Any = None) -> list[Any]:
        cancels = self.cancels
        self.runs.append([dict(request) for request in requests])
        if any(request.get("prompt") == "fail" for request in requests):
            raise RuntimeError("out of luck")
        if any(request.get("prompt") == "long" for request in requests):
            raise Mismatch("prompt: has more tokens than the traced one")
        for index in range(1, self.steps + 1):
            self.gate.wait(10)
            time.sleep(self.seconds / self.steps)
            if on_step is not None:
                on_step(FakeStep(index, self.steps, len(requests)))
            if self.cancels != cancels:
                self.ended += 1
                raise Cancelled(f"cancelled after step {index} of {self.steps}")
        return [SimpleNamespace(images=[picture(request.get("seed", 0))]) for request in requests]


def picture(seed: int) -> Image.Image:
    return Image.new("RGB", SIZE, (seed % 256, seed // 256 % 256, 7))


def wait_until(condition: Any, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)


@dataclass
class Served:
    url: str
    port: int
    service: Service


@contextlib.contextmanager
def served(
    engines: Mapping[str, Any] | Any, *, token: str | None = None, **settings: Any
) -> Iterator[Served]:
    """Serve engines on a free port."""
    engines = engines if isinstance(engines, Mapping) else {"fake": engines}
    service = Service(engines, Settings(**{"max_wait_ms": 1.0, **settings}))
    with server.listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        arguments = (service, listener, token)
        thread = threading.Thread(target=server.run, args=arguments, daemon=True)
        thread.start()
        try:
            yield Served(f"http://127.0.0.1:{port}", port, service)
        finally:
            for engine in engines.values():
                if hasattr(engine, "gate"):
                    engine.gate.set()
            service.abort()
            thread.join(10)
    assert not thread.is_alive()
