"""The programs, images and features of one model, each made once and kept on disk."""

import json
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import diffopt
from diffopt.cli import image_metrics
from diffopt.core import Pipeline
from diffopt.ir.program import Program
from diffopt.progress import Progress, silent
from examples.benchmarks import report
from examples.models.fashion import CLASSES
from examples.study.models import ARGUMENTS, GUIDANCE, load

SIZE = 128  # of the images that features are computed of, as in models/evaluate.py
CHUNK = 32  # requests of one run: more are no faster
OTHER_SEEDS = 1000  # the first seed of the reference's second set of images
CALIBRATION = 1_000_000  # far from all seeds that images are measured on
REFERENCE = "reference"  # the configuration of the pipeline as it is

Make = Callable[["Study", str], tuple[Program, dict[str, Any]]]
"""Makes the program of a configuration, and says as JSON what it costs."""


class Study:
    """One model: its programs, images and features, each made once and kept on disk."""

    def __init__(self, name: str, steps: int, work: Path, make: Make) -> None:
        self.name = name
        self.steps = steps
        self.folder = work / f"{name}-{steps}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._make = make
        self._last: tuple[str, Program] | None = None

    def request(self, index: int, seed: int) -> dict[str, Any]:
        """Return the arguments of a call: classes take turns."""
        label = index % len(CLASSES)
        argument = ARGUMENTS[self.name]
        return {argument: CLASSES[label] if argument == "prompt" else [label], "seed": seed}

    @property
    def prompts(self) -> list[str]:
        """What passes that measure values calibrate with."""
        by_label = ARGUMENTS[self.name] != "prompt"
        return [str(k) for k in range(len(CLASSES))] if by_label else [*CLASSES]

    @cached_property
    def pipe(self) -> Any:
        """The model's own pipeline."""
        return load(self.name)

    @cached_property
    def traced(self) -> Program:
        """The program of the pipeline's call, before any pass."""
        return self.trace(self.pipe)

    def trace(self, pipe: Any) -> Program:
        """Return the program of the same call of another pipeline."""
        return diffopt.trace(pipe, **self._arguments(0, CALIBRATION - 1))

    def _arguments(self, index: int, seed: int) -> dict[str, Any]:
        request = self.request(index, seed)
        return {
            "generator": torch.Generator().manual_seed(request.pop("seed")),
            **request,
            "num_inference_steps": self.steps,
            "guidance_scale": GUIDANCE,
            "output_type": "np",
        }

    def path(self, config: str, ending: str) -> Path:
        """Return the file that belongs to a configuration."""
        return self.folder / (re.sub(r"[^\w.=-]+", "_", config).strip("_") + ending)

    def forget(self, config: str) -> None:
        """Remove all files of a configuration."""
        endings = [f".{s}{e}" for s in (0, OTHER_SEEDS) for e in (".pt", ".features.pt")]
        for ending in (".program", ".json", *endings):
            self.path(config, ending).unlink(missing_ok=True)

    def program(self, config: str) -> Program:
        """Return the program of a configuration, for one request."""
        return Program.load(self.file(config))

    def file(self, config: str) -> Path:
        """Return the file of that program."""
        self._need(config)
        return self.path(config, ".program")

    def cost(self, config: str) -> dict[str, Any]:
        """Return what `make` said a configuration costs."""
        self._need(config)
        cost: dict[str, Any] = json.loads(self.path(config, ".json").read_text())
        return cost

    def _need(self, config: str) -> None:
        if all(self.path(config, ending).exists() for ending in (".program", ".json")):
            return
        report(f"{self.name}, {config}: passes")
        program, cost = self._make(self, config)
        program.save(self.path(config, ".program"))
        self.path(config, ".json").write_text(json.dumps(cost))

    def images(self, config: str, count: int, first: int, progress: Progress = silent) -> Tensor:
        """Return the images of seeds from `first` on, as a tensor [count, 1, 32, 32]."""
        path = self.path(config, f".{first}.pt")
        made: Tensor = torch.load(path) if path.exists() else torch.empty(0, 1, 32, 32)
        while len(made) < count:
            batched = self._batched(config)
            progress(f"image {len(made)} of {count}", len(made) / count)
            chunk = range(len(made), min(len(made) + CHUNK, count))
            requests = [self.request(k, first + k) for k in chunk]
            flat = [batched.prepare(**request) for request in requests]
            outputs = batched.run([torch.stack(rows) for rows in zip(*flat, strict=True)])
            new = [
                batched.pack([tensor[k] for tensor in outputs], "pt")[0] for k in range(len(chunk))
            ]
            made = torch.cat([made, *new])
            torch.save(made, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)
        return made[:count]

    def _batched(self, config: str) -> Program:
        if self._last is None or self._last[0] != config:
            # The graph fixes no number of requests: one of two is the cheapest to check.
            # Products over several requests sum in another order: in 16 bits that may be seen.
            program = Pipeline.parse("batch(max=2)").run(
                self.program(config), verify=False, enforce=False
            )
            self._last = config, program
        return self._last[1]

    def features(self, config: str, made: Tensor, first: int) -> Tensor:
        """Return the features of a configuration's images."""
        return kept_features(self.path(config, f".{first}.features.pt"), made)

    def pipeline_error(self, made: Tensor) -> float:
        """Return the largest difference of the first images from the pipeline's own."""
        own = [self.pipe(**self._arguments(k, k))[0] for k in range(min(2, len(made)))]
        pixels = torch.cat([torch.as_tensor(x).movedim(-1, 1) for x in own])
        return float((pixels - made[: len(own)]).abs().max())


def kept_features(path: Path, made: Tensor) -> Tensor:
    """Return features of images, from disk if these were computed before."""
    if path.exists():
        kept = torch.load(path)
        if torch.equal(kept["sum"], made.double().sum((1, 2, 3))):
            known: Tensor = kept["features"]
            return known
    found = image_metrics.features(made, size=SIZE)
    torch.save({"features": found, "sum": made.double().sum((1, 2, 3))}, path)
    return found
