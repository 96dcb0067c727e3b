"""Helpers of capture's dispatch modes: the line of the user's code, running without modes."""

import contextlib
import dataclasses
import functools
import linecache
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._python_dispatch import _disable_current_modes


@dataclasses.dataclass(frozen=True)
class Location:
    """A line of the pipeline's code."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


_INTERNAL = (
    f"{Path(torch.__file__).parent}{os.sep}",
    f"{Path(str(find_spec('diffopt').origin)).parent}{os.sep}",  # type: ignore[union-attr]
    str(Path(contextlib.__file__)),
)


def location() -> Location:
    """Return the innermost running line that is neither torch's nor diffopt's."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_INTERNAL) and not name.startswith("<"):
            text = linecache.getline(name, frame.f_lineno).strip()
            short = "/".join(Path(name).parts[-2:])
            return Location(short, frame.f_lineno, text)
        frame = frame.f_back  # type: ignore[assignment]
    return Location("?", 0, "")


@contextlib.contextmanager
def without_modes() -> Iterator[None]:
    """Disable all modes in the context; the exporter needs empty mode stacks."""
    popped = [_pop_mode() for _ in _get_current_function_mode_stack()]  # type: ignore[no-untyped-call]
    try:
        with _disable_current_modes():
            yield
    finally:
        for mode in reversed(popped):
            _push_mode(mode)  # type: ignore[no-untyped-call]


def is_random(func: Any) -> bool:
    """Tell whether an operator draws random numbers; the tag alone includes attention."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    name, arguments = func._schema.name, func._schema.arguments
    return name.startswith("aten::rand") or any(a.name == "generator" for a in arguments)


@functools.cache
def functional_variant(func: Any) -> Any:
    """Return the operator with the same arguments that returns what `func` writes, or None."""

    def parameters(overload: Any) -> list[tuple[str, str]]:
        arguments = overload._schema.arguments
        return [(a.name, str(a.type)) for a in arguments if not (a.is_out or a.name == "out")]

    name = func._schema.name.split("::")[1].removesuffix("_")
    packet = getattr(getattr(torch.ops, func.namespace), name, None)
    for name in packet.overloads() if packet is not None else ():
        variant = getattr(packet, name)
        if not variant._schema.is_mutable and parameters(variant) == parameters(func):
            return variant
    return None
