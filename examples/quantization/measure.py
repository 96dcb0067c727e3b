"""Looks at engines: the size of their files, and their own images."""

from pathlib import Path
from typing import Any

import torch

import diffopt
from diffopt.cli import image_metrics
from examples.study.measure import Look, compare
from examples.study.study import REFERENCE, SIZE, Study

LEVEL = 19  # of zstandard, for the size of compressed files


def looker(study: Study, target: str, count: int) -> Look:
    """Return what measures an engine's file and `count` images that it makes."""
    reference = study.images(REFERENCE, count, 0)
    features = image_metrics.features(reference, size=SIZE)

    def look(config: str, engine: diffopt.Engine) -> dict[str, Any]:
        requests = [study.request(k, k) for k in range(count)]
        made = torch.cat([engine(**request, output_type="pt")[0] for request in requests])
        emulated = study.images(config, count, 0)
        return {
            "images": count,
            "engine": _distance(made, reference, features),
            "emulated": _distance(emulated, reference, features),
            "file": engine.path.stat().st_size,
            "compressed": _compressed(study, config, target, engine.path),
        }

    return look


def _distance(made: torch.Tensor, reference: torch.Tensor, features: torch.Tensor) -> Any:
    own = image_metrics.features(made, size=SIZE)
    return compare(made, own, reference, features)["distance"]


def _compressed(study: Study, config: str, target: str, path: Path) -> int:
    other = path.with_suffix(".small")
    diffopt.build(study.program(config), target, other, compress=LEVEL)
    return other.stat().st_size
