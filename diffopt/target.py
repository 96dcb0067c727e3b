"""Targets: where a program is to run, and how its components are lowered for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

from torch import Tensor

import diffopt.targets
from diffopt import plugins, spec
from diffopt.core import Progress
from diffopt.errors import DiffoptError
from diffopt.program import Program
from diffopt.runtime import Body
from diffopt.spec import option

__all__ = ["Image", "Lowered", "Target", "find_target", "option", "parse_target", "target_names"]


@dataclass
class Lowered:
    """What a target makes of a program.

    Attributes:
        members: Files to keep in the engine under `kernels/`, by name.
        requires: JSON that `Target.unfit` compares with the machine that is to run the engine.
        bodies: JSON about each component: how long it took, whether it came from the cache.
        holds_weights: The kernels hold the components' weights, so the engine need not.
        reads: Of these weights, those that are read all the same: components with attributes.
    """

    members: dict[str, bytes] = field(default_factory=dict)
    requires: dict[str, Any] = field(default_factory=dict)
    bodies: dict[str, dict[str, Any]] = field(default_factory=dict)
    holds_weights: bool = False
    reads: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Image:
    """What an engine file gives to the target that is to run it.

    Attributes:
        members: The files that `Target.compile` made.
        graphs: JSON of each component: its nodes and its table of tensors.
        tensors: Weights by key, shared by all components.
        program: Rebuilds the whole program, graphs and all.
    """

    members: Mapping[str, memoryview]
    graphs: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    program: Any


@dataclass(frozen=True)
class Target:
    """Lower programs for one kind of machine; subclass it in `targets/<name>.py`.

    A subclass is a frozen dataclass whose fields, made with `option`, are its options.
    """

    name: ClassVar[str] = "target"

    def __init_subclass__(cls) -> None:
        if "name" not in cls.__dict__:
            cls.name = cls.__module__.rpartition(".")[2].replace("_", "-")

    def refuses(self, program: Program) -> str | None:
        """Say why this target cannot take `program`, before anything is compiled."""
        return None

    def compile(self, program: Program, progress: Progress) -> Lowered:
        """Lower every component of `program`."""
        raise NotImplementedError

    def unfit(self, requires: Mapping[str, Any]) -> str | None:
        """Say what this machine lacks of what an engine requires."""
        return None

    def load(self, image: Image) -> dict[str, Body]:
        """Return something to call for every component of an engine."""
        raise NotImplementedError

    def __str__(self) -> str:
        return spec.unparse(self.name, self)


def target_names() -> list[str]:
    """Return the names of all targets, without importing any."""
    return sorted(_sources())


def find_target(name: str) -> type[Target]:
    """Return the target called `name`."""
    found: type[Target] = plugins.find(name, _sources(), Target, "target")
    return found


def parse_target(text: str) -> Target:
    """Read the text of one target, such as `cpu(threads=2)`."""
    calls = spec.parse(text, "target")
    if len(calls) != 1:
        raise DiffoptError(f"wants one target, got '{text}'; there are {', '.join(target_names())}")
    (call,) = calls
    try:
        cls = find_target(call.name)
    except DiffoptError as error:
        raise DiffoptError(error.message, text=text, span=call.span) from None
    return spec.bind(call, cls, text)


@cache
def _sources() -> dict[str, str]:
    """Map the name of each target to where it is, as "module:class"."""
    return plugins.sources(diffopt.targets, "targets")
