"""Measures configurations: what they cost, how far their images are from the reference's, times."""

import contextlib
import math
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import diffopt
from diffopt.cli import image_metrics, timing
from diffopt.errors import DiffoptError
from diffopt.progress import within
from examples.benchmarks import report
from examples.models.fashion import DEBIAN, images
from examples.study.results import Results
from examples.study.study import OTHER_SEEDS, REFERENCE, Study, cached_features

GROUP = 3  # engines that are timed in turn with the reference's

Keys = tuple[str, ...]
"""The path of a model's results in the file."""

Cost = Callable[[Study, str], dict[str, Any]]
"""Returns what a configuration costs, as JSON."""

Look = Callable[[str, diffopt.Engine], dict[str, Any]]
"""Returns further measurements of a configuration's engine, as JSON."""


@dataclass(frozen=True)
class Measurements:
    """The measurements of one model, each in the results as soon as it is known.

    Attributes:
        study: The model.
        results: Where measurements are kept.
        keys: The path of the model's results.
        cost: What a configuration costs.
        each: Keep the distance of every image as well as their mean.
    """

    study: Study
    results: Results
    keys: Keys
    cost: Cost = Study.cost
    each: bool = False

    def rows(self) -> dict[str, Any]:
        """Return what is known, by configuration."""
        rows: dict[str, Any] = self.results.get(*self.keys, "configs") or {}
        return rows

    def remaining(self, configs: Iterable[str], phase: str) -> list[str]:
        """Return the configurations that a phase has not measured yet."""
        rows = self.rows()
        return [c for c in configs if not {phase, "left out"} & rows.get(c, {}).keys()]

    def forget(self, configs: Iterable[str], phases: Sequence[str]) -> None:
        """Remove the results of some phases; those of "quality" with the programs and images."""
        for config in configs:
            row = self.rows().get(config, {})
            removed = {*phases, "left out", "failed"}
            row = {key: value for key, value in row.items() if key not in removed}
            self._put(row, config)
            if "quality" in phases:
                self.study.forget(config)

    def quality(self, configs: Sequence[str], count: int) -> None:
        """Measure `count` images of each configuration that has no quality yet."""
        study, configs = self.study, self.remaining(configs, "quality")
        if not configs:
            return
        clock = Clock(f"{study.name}, images of the reference", 2)
        reference, other = (
            study.images(REFERENCE, count, first, within(clock.tell, index, 2))
            for index, first in enumerate((0, OTHER_SEEDS))
        )
        x = study.features(REFERENCE, reference, 0)
        y = study.features(REFERENCE, other, OTHER_SEEDS)
        held = held_out(study.folder.parent)
        if self.results.get(*self.keys, "floors") is None:
            floors = {
                "pipeline": study.pipeline_error(reference),
                "other seeds": compare(reference, x, other, y)["distance"],
            }
            if held is not None:
                floors["real"] = kid(train(study.folder.parent, count), held)
            self.results.put(floors, *self.keys, "floors")
        clock = Clock(f"{study.name}, images", len(configs))
        for index, config in enumerate(configs):
            if not self.remaining([config], "quality"):
                continue  # another process has measured it meanwhile
            clock.tell(config, index / len(configs))
            cost = self._cost(config)
            if cost is None:
                continue
            progress = within(clock.tell, index, len(configs), f"{config}, ")
            samples = study.images(config, count, 0, progress)
            features = study.features(config, samples, 0)
            row = compare(samples, features, reference, x)
            if self.each:
                distances = image_metrics.feature_distance(features, x).tolist()
                row["distances"] = [round(distance, 5) for distance in distances]
            row["kid other seeds"] = kid(features, y)
            if held is not None:
                row["kid held-out"] = kid(features, held)
                size = _half(features, held)
                difference = image_metrics.kid_difference(features, x, held, subset_size=size)
                row["kid above reference"] = list(difference)
            self._put(cost, config, "cost")
            self._put(row, config, "quality")

    def times(
        self,
        configs: Sequence[str],
        rounds: int,
        target: str,
        beside: Sequence[str] = (REFERENCE,),
        look: Look = lambda config, engine: {},
    ) -> None:
        """Time the engines of all configurations that have no times yet.

        Args:
            configs: What to time.
            rounds: How often each engine runs.
            target: The target of the engines.
            beside: Configurations whose engines take turns with those of every group.
            look: Returns further measurements of an engine.
        """
        study = self.study
        configs = [c for c in self.remaining(configs, "time") if c not in beside]
        clock = Clock(f"{study.name}, times", len(configs))
        with tempfile.TemporaryDirectory() as folder:
            for start in range(0, len(configs), GROUP):
                group = (*beside, *configs[start : start + GROUP])
                costs = {c: cost for c in group if (cost := self._cost(c)) is not None}
                engines = {}
                for config in costs:
                    clock.tell(f"building {config}", start / len(configs))
                    path = Path(folder) / study.path(config, ".engine").name
                    with refusals(self.results, self.keys, config):
                        engines[config] = diffopt.build(study.program(config), target, path)
                clock.tell("timing", start / len(configs))
                contenders = {c: images_of(study, engine) for c, engine in engines.items()}
                timings = timing.measure(contenders, REFERENCE, rounds=rounds)
                for config, engine in engines.items():
                    row = {
                        "target": target,
                        "load": os.getloadavg()[0],
                        "seconds": timings[config].seconds,
                        **{other: timings[other].seconds for other in beside},
                        **look(config, engine),
                    }
                    self._put(costs[config], config, "cost")
                    self._put(row, config, "time")

    def _cost(self, config: str) -> dict[str, Any] | None:
        """Return what a configuration costs; None if it does not fit the model."""
        with refusals(self.results, self.keys, config):
            return self.cost(self.study, config)
        return None

    def _put(self, value: Any, *path: str) -> None:
        self.results.put(value, *self.keys, "configs", *path)


@contextlib.contextmanager
def refusals(results: Results, keys: Keys, config: str) -> Iterator[None]:
    """Record why a configuration cannot be measured, instead of stopping."""
    try:
        yield
    except DiffoptError as error:
        # A subclass says that the result is wrong, not that the model is unsuitable.
        what = "left out" if type(error) is DiffoptError else "failed"
        report(f"{', '.join(keys[1:])}: {what} {config}: {error}")
        results.put(str(error), *keys, "configs", config, what)
    except Exception as error:  # one failure must not stop the others
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}".partition("\n")[0]
        results.put(text, *keys, "configs", config, "failed")


def compare(samples: Tensor, features: Tensor, reference: Tensor, x: Tensor) -> dict[str, Any]:
    """Return the distances of images from the reference's of the same seeds: means and errors.

    Args:
        samples: The images, [count, 1, height, width].
        features: Their features.
        reference: The reference's images.
        x: Their features.
    """
    norm = torch.linalg.vector_norm
    pixels = norm((samples - reference).flatten(1), dim=1) / norm(reference.flatten(1), dim=1)
    return {"distance": mean(image_metrics.feature_distance(features, x)), "pixels": mean(pixels)}


def mean(values: Tensor) -> list[float]:
    """Return the mean and its standard error."""
    return [float(values.mean()), float(values.std() / math.sqrt(len(values)))]


def kid(x: Tensor, y: Tensor) -> list[float]:
    """Return the kernel distance of features and its deviation over subsets of half the images."""
    return list(image_metrics.kid(x, y, subset_size=_half(x, y)))


def _half(x: Tensor, y: Tensor) -> int:
    return max(2, min(len(x), len(y)) // 2)


def held_out(work: Path) -> Tensor | None:
    """Return the features of the 10,000 held-out images, None without the dataset."""
    if not DEBIAN.exists():
        report(f"no KID against held-out images: install the data of {DEBIAN}")
        return None
    path = work / "held-out.pt"
    if not path.exists():
        report("features of the held-out images")
    return cached_features(path, images(DEBIAN, "t10k") / 2 + 0.5)


def train(work: Path, count: int) -> Tensor:
    """Return the features of `count` images of the training set."""
    return cached_features(work / "train.pt", images(DEBIAN, "train")[:count] / 2 + 0.5)


def images_of(study: Study, engine: diffopt.Engine) -> timing.Sampler:
    """Return an engine as a function from a seed to images."""
    return lambda seed: engine(**study.request(9, seed), output_type="pt")[0]


class Clock:
    """Reports progress, with an estimate of the remaining time."""

    def __init__(self, what: str, count: int) -> None:
        self.what = what
        self.count = count
        self.started = time.monotonic()

    def tell(self, item: str, fraction: float | None) -> None:
        """Say which fraction of all items is done, a part of this one included."""
        done = (fraction or 0.0) * self.count
        spent = time.monotonic() - self.started
        left = f"about {(self.count - done) * spent / done / 60:.0f} min left" if done else ""
        report(f"{self.what}, {item}: {done:.1f} of {self.count} {left}".rstrip())
