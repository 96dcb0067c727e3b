"""The programs, images and features of one model, each computed once and cached on disk."""

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
CALIBRATION = 1_000_000  # far from the seeds of all images that are measured
REFERENCE = "reference"  # the configuration of the original pipeline

Make = Callable[["Study", str], tuple[Program, dict[str, Any]]]
"""Returns the program of a configuration, and its cost as JSON."""


class Study:
    """One model: its programs, images and features, each computed once and cached on disk."""

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
        """The prompts with which passes calibrate."""
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
        """Return the path of a configuration's file."""
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
        """Return the file of a configuration's program."""
        self._need(config)
        return self.path(config, ".program")

    def cost(self, config: str) -> dict[str, Any]:
        """Return the cost of a configuration, as returned by `make`."""
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
        images: Tensor = torch.load(path) if path.exists() else torch.empty(0, 1, 32, 32)
        while len(images) < count:
            batched = self._batched(config)
            progress(f"image {len(images)} of {count}", len(images) / count)
            chunk = range(len(images), min(len(images) + CHUNK, count))
            requests = [self.request(k, first + k) for k in chunk]
            flat = [batched.prepare(**request) for request in requests]
            outputs = batched.run([torch.stack(rows) for rows in zip(*flat, strict=True)])
            new = [
                batched.pack([tensor[k] for tensor in outputs], "pt")[0] for k in range(len(chunk))
            ]
            images = torch.cat([images, *new])
            torch.save(images, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)
        return images[:count]

    def _batched(self, config: str) -> Program:
        if self._last is None or self._last[0] != config:
            # `max` bounds only the check, which is cheapest for two requests. It is not enforced:
            # products over several requests sum in another order, which 16 bits may show.
            program = Pipeline.parse("batch(max=2)").run(
                self.program(config), verify=False, enforce=False
            )
            self._last = config, program
        return self._last[1]

    def features(self, config: str, images: Tensor, first: int) -> Tensor:
        """Return the features of a configuration's images."""
        return cached_features(self.path(config, f".{first}.features.pt"), images)

    def pipeline_error(self, images: Tensor) -> float:
        """Return the largest difference of the first images from those of the pipeline."""
        expected = [self.pipe(**self._arguments(k, k))[0] for k in range(min(2, len(images)))]
        pixels = torch.cat([torch.as_tensor(x).movedim(-1, 1) for x in expected])
        return float((pixels - images[: len(pixels)]).abs().max())


def cached_features(path: Path, images: Tensor) -> Tensor:
    """Return features of images, from disk if they were computed for the same images."""
    checksum = images.double().sum((1, 2, 3))
    if path.exists():
        cached = torch.load(path)
        if torch.equal(cached["sum"], checksum):
            known: Tensor = cached["features"]
            return known
    features = image_metrics.features(images, size=SIZE)
    torch.save({"features": features, "sum": checksum}, path)
    return features
