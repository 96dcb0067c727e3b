"""Measures engines: the size of their files, and the distance of their images."""

from functools import cache
from pathlib import Path
from typing import Any

import torch

import diffopt
from diffopt.cli import image_metrics
from examples.study.measure import Look, compare
from examples.study.study import REFERENCE, SIZE, Study

LEVEL = 19  # of zstandard, for the size of compressed files


def looker(study: Study, target: str, count: int) -> Look:
    """Return what measures an engine's file, and `count` images of the engine."""

    @cache
    def reference() -> tuple[torch.Tensor, torch.Tensor]:
        images = study.images(REFERENCE, count, 0)
        return images, image_metrics.features(images, size=SIZE)

    def distance(images: torch.Tensor) -> Any:
        features = image_metrics.features(images, size=SIZE)
        return compare(images, features, *reference())["distance"]

    def look(config: str, engine: diffopt.Engine) -> dict[str, Any]:
        requests = [study.request(k, k) for k in range(count)]
        images = torch.cat([engine(**request, output_type="pt")[0] for request in requests])
        return {
            "images": count,
            "engine": distance(images),
            "emulated": distance(study.images(config, count, 0)),
            "file": engine.path.stat().st_size,
            "compressed": _compressed(study, config, target, engine.path),
        }

    return look


def _compressed(study: Study, config: str, target: str, path: Path) -> int:
    other = path.with_suffix(".small")
    diffopt.build(study.program(config), target, other, compress=LEVEL)
    return other.stat().st_size
