"""Measures configurations: their costs, how far their images are from the reference's, times."""

import contextlib
import math
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
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
from examples.study.study import OTHER_SEEDS, REFERENCE, Study, kept_features

GROUP = 3  # engines that are timed in turn with the reference's

At = tuple[str, ...]
"""Where a model's results are: keys."""

Cost = Callable[[Study, str], dict[str, Any]]
"""Returns what a configuration costs, as JSON."""

Look = Callable[[str, diffopt.Engine], dict[str, Any]]
"""Returns what else there is to know of a configuration's engine, as JSON."""


def quality(
    study: Study,
    at: At,
    configs: Sequence[str],
    results: Results,
    count: int,
    cost: Cost,
    each: bool = False,
) -> None:
    """Measure the images of all configurations that are not in the results yet.

    Args:
        study: The model.
        at: Where its results are.
        configs: What to measure.
        results: Where the measurements go.
        count: How many images.
        cost: What a configuration costs.
        each: Keep the distance of each image as well.
    """
    configs = left(results, at, configs, "quality")
    if not configs:
        return
    clock = Clock(f"{study.name}, images of the reference", 2)
    reference, other = (
        study.images(
            REFERENCE,
            count,
            first,
            within(clock.tell, index, 2),
        )
        for index, first in enumerate((0, OTHER_SEEDS))
    )
    x, y = study.features(REFERENCE, reference, 0), study.features(REFERENCE, other, OTHER_SEEDS)
    held = held_out(study.folder.parent)
    if results.get(*at, "floors") is None:
        floors = {
            "pipeline": study.pipeline_error(reference),
            "other seeds": compare(reference, x, other, y)["distance"],
            **({"real": kid(train(study.folder.parent, count), held)} if held is not None else {}),
        }
        results.put(floors, *at, "floors")
    clock = Clock(f"{study.name}, images", len(configs))
    for index, config in enumerate(configs):
        if not left(results, at, [config], "quality"):
            continue  # another process has measured it meanwhile
        clock.tell(config, index / len(configs))
        own_cost = cost_of(study, at, config, results, cost)
        if own_cost is None:
            continue
        made = study.images(
            config,
            count,
            0,
            within(clock.tell, index, len(configs), f"{config}, "),
        )
        own = study.features(config, made, 0)
        found = compare(made, own, reference, x)
        if each:
            distances = image_metrics.feature_distance(own, x).tolist()
            found["distances"] = [round(distance, 5) for distance in distances]
        found["kid other seeds"] = kid(own, y)
        if held is not None:
            found["kid held-out"] = kid(own, held)
            found["kid above reference"] = list(
                image_metrics.kid_difference(own, x, held, subset_size=_half(own, held))
            )
        results.put(own_cost, *at, "configs", config, "cost")
        results.put(found, *at, "configs", config, "quality")


def times(
    study: Study,
    at: At,
    configs: Sequence[str],
    results: Results,
    rounds: int,
    target: str,
    cost: Cost,
    beside: Sequence[str] = (REFERENCE,),
    look: Look = lambda config, engine: {},
) -> None:
    """Time the engines of all configurations that are not in the results yet.

    Args:
        study: The model.
        at: Where its results are.
        configs: What to time.
        results: Where the times go.
        rounds: How often each engine runs.
        target: Of the engines.
        cost: What a configuration costs.
        beside: Whose engines take turns with those of every group of configurations.
        look: Returns what else is to be known of an engine.
    """
    configs = [c for c in left(results, at, configs, "time") if c not in beside]
    clock = Clock(f"{study.name}, times", len(configs))
    with tempfile.TemporaryDirectory() as name:
        for start in range(0, len(configs), GROUP):
            group = (*beside, *configs[start : start + GROUP])
            found_costs = {c: cost_of(study, at, c, results, cost) for c in group}
            costs = {c: own for c, own in found_costs.items() if own is not None}
            engines = {}
            for config in costs:
                clock.tell(f"building {config}", start / len(configs))
                path = Path(name) / study.path(config, ".engine").name
                with refusals(at, config, results):
                    engines[config] = diffopt.build(study.program(config), target, path)
            clock.tell("timing", start / len(configs))
            contenders = {c: images_of(study, engine) for c, engine in engines.items()}
            found = timing.measure(contenders, REFERENCE, rounds=rounds)
            for config, engine in engines.items():
                taken = {
                    "target": target,
                    "load": os.getloadavg()[0],
                    "seconds": found[config].seconds,
                    **{other: found[other].seconds for other in beside},
                    **look(config, engine),
                }
                results.put(costs[config], *at, "configs", config, "cost")
                results.put(taken, *at, "configs", config, "time")


@contextlib.contextmanager
def refusals(at: At, config: str, results: Results) -> Iterator[None]:
    """Record why a configuration cannot be had, instead of stopping."""
    try:
        yield
    except DiffoptError as error:
        # A subclass says that the result is wrong, and not that the model is another.
        what = "left out" if type(error) is DiffoptError else "failed"
        report(f"{', '.join(at[1:])}: {what} {config}: {error}")
        results.put(str(error), *at, "configs", config, what)
    except Exception as error:  # one that cannot be measured must not stop the others
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}".partition("\n")[0]
        results.put(text, *at, "configs", config, "failed")


def left(results: Results, at: At, configs: Sequence[str], phase: str) -> list[str]:
    """Return which configurations a phase has yet to measure."""
    done = results.get(*at, "configs") or {}
    return [c for c in configs if not {phase, "left out"} & done.get(c, {}).keys()]


def cost_of(
    study: Study, at: At, config: str, results: Results, cost: Cost
) -> dict[str, Any] | None:
    """Return what a configuration costs; None if it does not fit."""
    with refusals(at, config, results):
        return cost(study, config)
    return None


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
        "distance": mean(image_metrics.feature_distance(own, x)),
        "pixels": mean(pixels),
    }


def mean(values: Tensor) -> list[float]:
    """Return the mean and its standard error."""
    return [float(values.mean()), float(values.std() / math.sqrt(len(values)))]


def kid(x: Tensor, y: Tensor) -> list[float]:
    """Return the kernel distance of features and its deviation over subsets of half the images."""
    return list(image_metrics.kid(x, y, subset_size=_half(x, y)))


def _half(x: Tensor, y: Tensor) -> int:
    return max(2, min(len(x), len(y)) // 2)


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


def images_of(study: Study, engine: diffopt.Engine) -> timing.Make:
    """Return an engine as a function from a seed to images."""
    return lambda seed: engine(**study.request(9, seed), output_type="pt")[0]


class Clock:
    """Says how much is done and how long the rest will take."""

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
