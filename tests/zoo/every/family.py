"""What the pipelines of a family have in common, and the arguments of their calls."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.zoo import text
from tests.zoo.case import generator

# Texts of as many tokens, whatever the tokenizer.
PROMPTS = ("the red house", "the blue dogs")

Size = tuple[int, int]


@dataclass(frozen=True)
class Family:
    """Pipelines whose class names match a pattern.

    Args:
        pattern: A regular expression.
        base: The case of the zoo whose components and arguments they have.
        components: What makes a component, or what changes of its configuration.
        arguments: Of the call; functions take the seed and the size of pictures, and `...` leaves
            an argument out.
        attributes: Of the pipeline, set when it is made.
    """

    pattern: str
    base: str = ""
    components: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)


def prompt(seed: int, size: Size) -> str:
    return PROMPTS[seed % len(PROMPTS)]


def pixels(seed: int, size: Size, channels: int = 3) -> np.ndarray:
    source = np.random.default_rng(seed + channels)
    return source.integers(0, 256, (*size, channels), dtype=np.uint8)


def picture(seed: int, size: Size) -> Image.Image:
    return Image.fromarray(pixels(seed, size))


def mask(seed: int, size: Size) -> Image.Image:
    return Image.fromarray((pixels(seed, size, 1)[..., 0] > 127).astype(np.uint8) * 255)


def frames(seed: int, size: Size, count: int = 5) -> list[Image.Image]:
    return [picture(100 * seed + index, size) for index in range(count)]


def masks(seed: int, size: Size, count: int = 5) -> list[Image.Image]:
    return [mask(100 * seed + index, size) for index in range(count)]


def noise(*shape: int, start: int = 0) -> Callable[[int, Size], torch.Tensor]:
    return lambda seed, size: torch.randn(shape, generator=generator(3000 + start + seed))


def phrase(seed: int, size: Size) -> str:
    return prompt(seed + 1, size)


def numbers(*shape: int, start: int = 0) -> Callable[[int, Size], torch.Tensor]:
    """Return random numbers from 0 to 1."""
    return lambda seed, size: torch.rand(shape, generator=generator(4000 + start + seed))


ARGUMENTS: dict[str, Any] = {
    "prompt": prompt,
    "image": picture,
    "control_image": picture,
    "mask_image": mask,
    "mask": mask,
    "control_mask": mask,
    "video": frames,
    "num_inference_steps": 3,
    "strength": 0.7,
    "height": 16,
    "width": 16,
    "generator": lambda seed, size: generator(seed),
    "output_type": "pt",
    "max_sequence_length": text.LENGTH,
    "clean_caption": False,
    "skip_text_cleaning": True,
    "use_resolution_binning": False,
}
