"""Measures configurations: their costs, how far their images are from the reference's, times."""

import math
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import diffopt
from diffopt import bench, metrics
from diffopt.errors import DiffoptError
from examples.benchmarks import report
from examples.caching.configurations import REFERENCE
from examples.caching.results import Results
from examples.caching.study import OTHER_SEEDS, Study, kept_features
from examples.models.fashion import DEBIAN, images

GROUP = 3  # engines that are timed in turn with the reference's


def quality(study: Study, configs: Sequence[str], results: Results, count: int) -> None:
    """Measure the images of all configurations that are not in the results yet."""
    configs = left(results, study.name, configs, "quality")
    if not configs:
        return
    clock = Clock(f"{study.name}, images of the reference", 2)
    reference, other = (
        study.images(
            REFERENCE,
            count,
            first,
            lambda n, i=index: clock.tell(f"image {n} of {count}", i + n / count),
        )
        for index, first in enumerate((0, OTHER_SEEDS))
    )
    x, y = study.features(REFERENCE, reference, 0), study.features(REFERENCE, other, OTHER_SEEDS)
    held = held_out(study.folder.parent)
    if results.get("models", study.name, "floors") is None:
        floors = {
            "pipeline": study.pipeline_error(reference),
            "other seeds": compare(reference, x, other, y)["distance"],
            **({"real": kid(train(study.folder.parent, count), held)} if held is not None else {}),
        }
        results.put(floors, "models", study.name, "floors")
    clock = Clock(f"{study.name}, images", len(configs))
    for index, config in enumerate(configs):
        at = ("models", study.name, "configs", config)
        if not left(results, study.name, [config], "quality"):
            continue  # another process has measured it meanwhile
        clock.tell(config, index)
        cost = cost_of(study, config, results)
        if cost is None:
            continue
        made = study.images(
            config,
            count,
            0,
            lambda n, i=index, c=config: clock.tell(f"{c}, image {n} of {count}", i + n / count),
        )
        own = study.features(config, made, 0)
        found = compare(made, own, reference, x)
        found["kid other seeds"] = kid(own, y)
        if held is not None:
            found["kid held-out"] = kid(own, held)
        results.put(cost, *at, "cost")
        results.put(found, *at, "quality")


def times(study: Study, configs: Sequence[str], results: Results, rounds: int, target: str) -> None:
    """Time the engines of all configurations that are not in the results yet."""
    configs = [c for c in left(results, study.name, configs, "time") if c != REFERENCE]
    clock = Clock(f"{study.name}, times", len(configs))
    with tempfile.TemporaryDirectory() as name:
        for start in range(0, len(configs), GROUP):
            group = (REFERENCE, *configs[start : start + GROUP])
            found_costs = {c: cost_of(study, c, results) for c in group}
            costs = {c: cost for c, cost in found_costs.items() if cost is not None}
            contenders = {}
            for config in costs:
                clock.tell(f"building {config}", start)
                contenders[config] = engine(study, config, target, Path(name))
            clock.tell("timing", start)
            found = bench.measure(contenders, REFERENCE, rounds=rounds)
            for config, cost in costs.items():
                at = ("models", study.name, "configs", config)
                taken = {
                    "target": target,
                    "load": os.getloadavg()[0],
                    "seconds": found[config].seconds,
                    "reference": found[REFERENCE].seconds,
                }
                results.put(cost, *at, "cost")
                results.put(taken, *at, "time")


def left(results: Results, name: str, configs: Sequence[str], phase: str) -> list[str]:
    """Return which configurations a phase has yet to measure."""
    done = results.get("models", name, "configs") or {}
    return [c for c in configs if not {phase, "left out"} & done.get(c, {}).keys()]


def cost_of(study: Study, config: str, results: Results) -> dict[str, Any] | None:
    """Return what a configuration costs relative to the reference; None if it does not fit."""
    full = study.cost(REFERENCE)
    try:
        cost = study.cost(config)
    except DiffoptError as error:
        # A subclass says that the result is wrong, and not that the model is another.
        what = "left out" if type(error) is DiffoptError else "failed"
        report(f"{study.name}: {what} {config}: {error}")
        results.put(str(error), "models", study.name, "configs", config, what)
        return None
    return {
        **cost,
        "denoiser": cost["denoiser"] / full["denoiser"],
        "program": cost["program"] / full["program"],
    }


def compare(made: Tensor, own: Tensor, reference: Tensor, x: Tensor) -> dict[str, Any]:
    """Return how far images are from the reference's of the same seeds, each mean with its error.

    Args:
        made: The images.
        own: Their features.
        reference: The reference's images.
        x: Their features.
    """
    norm = torch.linalg.vector_norm
    pixels = norm((made - reference).flatten(1), dim=1) / norm(reference.flatten(1), dim=1)
    return {
        "distance": mean(metrics.feature_distance(own, x)),
        "pixels": mean(pixels),
    }


def mean(values: Tensor) -> list[float]:
    """Return the mean and its standard error."""
    return [float(values.mean()), float(values.std() / math.sqrt(len(values)))]


def kid(x: Tensor, y: Tensor) -> list[float]:
    """Return the kernel distance of features and its deviation over subsets of half the images."""
    return list(metrics.kid(x, y, subset_size=max(2, min(len(x), len(y)) // 2)))


def held_out(work: Path) -> Tensor | None:
    """Return the features of the 10,000 held-out images; None where the data is missing."""
    if not DEBIAN.exists():
        report(f"no KID against held-out images: install the data of {DEBIAN}")
        return None
    path = work / "held-out.pt"
    if not path.exists():
        report("features of the held-out images")
    return kept_features(path, images(DEBIAN, "t10k") / 2 + 0.5)


def train(work: Path, count: int) -> Tensor:
    """Return the features of real images that are not among the held-out ones."""
    return kept_features(work / "train.pt", images(DEBIAN, "train")[:count] / 2 + 0.5)


def engine(study: Study, config: str, target: str, folder: Path) -> bench.Make:
    """Build an engine for one request; return it as a function from a seed to images."""
    path = folder / study.path(config, ".engine").name
    built = diffopt.build(study.program(config), target, path)
    return lambda seed: built(**study.request(9, seed), output_type="pt")[0]


class Clock:
    """Says how much is done and how long the rest will take."""

    def __init__(self, what: str, count: int) -> None:
        self.what = what
        self.count = count
        self.started = time.monotonic()

    def tell(self, item: str, done: float) -> None:
        """Say that `done` of all items are done, a part of this one included."""
        spent = time.monotonic() - self.started
        left = f"about {(self.count - done) * spent / done / 60:.0f} min left" if done else ""
        report(f"{self.what}, {item}: {done:.1f} of {self.count} {left}".rstrip())
