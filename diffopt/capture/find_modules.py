"""Finds the networks of a pipeline that names no components, by their calls."""

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)


class CalledModules:
    """The modules that are called in a context, those inside of others left out.

    Args:
        pipeline: The callable; where it is a module itself, those that it calls are meant.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.modules: list[torch.nn.Module] = []
        self._running: list[torch.nn.Module] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Note the calls in the context."""
        before = register_module_forward_pre_hook(self._enter)
        after = register_module_forward_hook(self._leave, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def _enter(self, module: torch.nn.Module, _: Any) -> None:
        if module is self.pipeline:
            return
        if not self._running and not any(module is known for known in self.modules):
            self.modules.append(module)
        self._running.append(module)

    def _leave(self, module: torch.nn.Module, *_: Any) -> None:
        if module is not self.pipeline and self._running:
            self._running.pop()

    def named(self) -> dict[str, torch.nn.Module]:
        """Return the modules by the names that the pipeline has for them, or by their classes."""
        known = {id(value): name for name, value in _variables(self.pipeline)}
        result: dict[str, torch.nn.Module] = {}
        for module in self.modules:
            words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(module).__name__).lower()
            base = name = known.get(id(module), words)
            count = 1
            while name in result:
                count += 1
                name = f"{base}_{count}"
            result[name] = module
        return result


def _variables(pipeline: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """Yield what the names in a callable's reach stand for, and in containers among these."""
    function = inspect.unwrap(pipeline) if inspect.isroutine(pipeline) else type(pipeline).__call__
    function = getattr(function, "__func__", function)
    spaces: list[Mapping[str, Any]] = [getattr(pipeline, "__dict__", {})]
    if isinstance(pipeline, torch.nn.Module):
        spaces.append(dict(pipeline.named_modules()))
    if inspect.isfunction(function):
        found = inspect.getclosurevars(function)
        spaces += [found.nonlocals, found.globals]
    for space in spaces:
        for name, value in space.items():
            yield name.lstrip("_"), value
            if isinstance(value, dict):
                yield from ((key, item) for key, item in value.items() if isinstance(key, str))
            elif isinstance(value, (list, tuple)):
                yield from ((name, item) for item in value)
            elif hasattr(value, "__dict__") and not isinstance(value, (type, torch.nn.Module)):
                yield from vars(value).items()
