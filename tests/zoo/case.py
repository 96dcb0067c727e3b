"""What a case is, and how its weights are made."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

PROMPTS = ("a red cat", "two blue dogs under a tree", "the old green house")


@dataclass(frozen=True)
class Case:
    """A pipeline that is small enough to be captured and replayed in a test."""

    name: str
    build: Callable[[], Any]
    inputs: Callable[[int], dict[str, Any]]


def prompt(seed: int) -> str:
    return PROMPTS[seed % len(PROMPTS)]


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def image(seed: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
    """Return one image batch with values from 0 to 1."""
    return torch.rand(1, channels, height, width, generator=generator(1000 + seed))


def case(
    name: str,
    make: Callable[[], Any],
    arguments: Callable[[int], dict[str, Any]],
    *,
    text: bool = True,
) -> Case:
    """Make a case whose pipeline is seeded, and whose call has a generator and a prompt."""

    def build() -> Any:
        with torch.random.fork_rng(devices=[]), no_garbage():
            torch.manual_seed(0)
            pipe = make()
        for index, module in enumerate(modules(pipe)):
            randomize(module, index)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def inputs(seed: int) -> dict[str, Any]:
        words = {"prompt": prompt(seed)} if text else {}
        return {**words, "generator": generator(seed), "output_type": "pt", **arguments(seed)}

    return Case(name, build, inputs)


def call(function: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Call a pipeline or its replay, and return all tensors of the result.

    Some schedulers draw from the global generator, so that it is seeded too.
    """
    torch.manual_seed(kwargs["generator"].initial_seed())
    with torch.no_grad():
        return tensors(function(**kwargs))


def tensors(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, np.ndarray):
        return [torch.from_numpy(output)]
    if isinstance(output, Mapping):
        output = output.values()
    elif not isinstance(output, list | tuple):
        return []
    return [tensor for part in output for tensor in tensors(part)]


def modules(pipe: Any) -> list[nn.Module]:
    """Return the networks of a pipeline, in the order of their names."""
    parts = (pipe.components[name] for name in sorted(pipe.components))
    return [part for part in parts if isinstance(part, nn.Module)]


@contextlib.contextmanager
def no_garbage() -> Iterator[None]:
    """Fill memory that nobody has set with NaN in the context."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def randomize(module: nn.Module, seed: int) -> None:
    """Set to random values all that an initialisation left constant, or never set.

    A zero output layer hides everything before it, so that a wrong capture would pass.
    """
    module.eval().requires_grad_(False)
    source = generator(seed)
    for weight in module.parameters():
        if bool(weight.isnan().any()):
            weight.zero_()
        if weight.numel() > 1 and not torch.equal(weight, weight.flatten()[0].expand_as(weight)):
            continue
        # A matrix keeps the scale of its input; a vector is a norm's scale (1) or a bias (0).
        scale = 1 / math.sqrt(weight[0].numel()) if weight.dim() > 1 else 0.1
        weight.add_(torch.randn(weight.shape, generator=source) * scale)
