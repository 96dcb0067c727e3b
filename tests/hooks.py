"""Hooks that make modules of a diffusers pipeline do what a cache does."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import nn


def hold_outputs(
    net: nn.Module, modules: Iterable[nn.Module], computed: Collection[int]
) -> Callable[[], int]:
    """Let modules give their last output again, except in the steps computed.

    Returns:
        What tells the step that the denoiser `net` is in; -1 before the first.
    """
    step = -1

    def count(*_: Any) -> None:
        nonlocal step
        step += 1

    net.register_forward_pre_hook(count)
    for module in modules:
        kept: list[Any] = [None]

        def hook(module: Any, args: Any, output: Any, kept: list[Any] = kept) -> Any:
            if step in computed:
                kept[0] = output
            return kept[0]

        module.register_forward_hook(hook)
    return lambda: step
