"""Targets: the device that a program is built for, and how its components are lowered.

    target = [DEVICE [":" LOWERING] | LOWERING] ["(" options ")"]

A device (`h100`) has a description, `Hardware`; a lowering (`tensorrt`) is a subclass of `Target`.
A device alone stands for the lowering with the name of its kind: `cuda`, `cpu`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

from torch import Tensor, fx

from diffopt import plugins, spec
from diffopt.core import Progress
from diffopt.errors import DiffoptError
from diffopt.ir.program import Program
from diffopt.ir.strides import with_strides
from diffopt.lowering.executor import ComponentFunction, Executor, SlotExecutor
from diffopt.lowering.hardware import Hardware, hardware, hardware_names
from diffopt.spec import option

__all__ = [
    "EngineContents",
    "Finished",
    "Lowered",
    "Target",
    "ThreadedTarget",
    "devices",
    "find_target",
    "lowerings",
    "option",
    "parse_hardware",
    "parse_target",
    "target_names",
]


@dataclass
class Lowered:
    """A lowered program.

    Attributes:
        members: Files of the engine under `kernels/`, by name.
        requires: JSON that `Target.unfit` compares with the machine that loads the engine.
        bodies: JSON about each component, for the engine's manifest.
        holds_weights: Whether the kernels contain the components' weights, so that the engine
            need not.
        load_time_weights: Weights, as (component, name), that the engine has to hold even so:
            what is computed from them on loading is not in the kernels.
        finished: Whether nothing is left to compile on the device, see `Target.finish`.
    """

    members: dict[str, bytes] = field(default_factory=dict)
    requires: dict[str, Any] = field(default_factory=dict)
    bodies: dict[str, dict[str, Any]] = field(default_factory=dict)
    holds_weights: bool = False
    load_time_weights: list[tuple[str, str]] = field(default_factory=list)
    finished: bool = True


@dataclass
class Finished:
    """What `Target.finish` adds to an engine.

    Attributes:
        members: Further files of the engine under `kernels/`, by name.
        bodies: Further JSON about each component.
    """

    members: dict[str, bytes] = field(default_factory=dict)
    bodies: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class EngineContents:
    """The parts of an engine file that a target runs.

    Attributes:
        members: The files of `Lowered.members`, and of `Finished.members` if it is finished.
        graphs: JSON of each component: its nodes, and (key, strides, …) of its tensors by name.
        tensors: Weights by key, shared by all components.
        program: Returns the program of the engine.
    """

    members: Mapping[str, memoryview]
    graphs: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    program: Any

    def reading(self, keys: Set[str]) -> list[str]:
        """Return the components that have any of these tensors."""
        graphs = self.graphs.items()
        return [n for n, graph in graphs if any(k in keys for k, _, _ in graph["tensors"].values())]

    def weight(self, component: str, name: str) -> Tensor:
        """Return a component's weight, with the strides of the trace."""
        key, stride, _ = self.graphs[component]["tensors"][name]
        return with_strides(self.tensors[key], stride)


@dataclass(frozen=True)
class Target:
    """Lower programs for one kind of machine; subclass it in `targets/<name>.py`.

    A subclass is a frozen dataclass whose fields, made with `option`, are its options.

    Attributes:
        kinds: The kinds of devices that it supports; no device has to be named for a CPU.
        input_devices: The types of torch's devices on which inputs of a run may be.
        is_native: Whether engines hold more than graphs: code for the machine, or files that
            libraries of others read.
        reads_weights: Whether what it loads reads the engine's weights; otherwise they are in its
            kernels, even where the engine keeps them too.
        device: The device to build for; empty where none was named.
    """

    name: ClassVar[str] = "target"
    kinds: ClassVar[tuple[str, ...]] = ("cpu",)
    input_devices: ClassVar[tuple[str, ...]] = ("cpu",)
    is_native: ClassVar[bool] = True
    reads_weights: ClassVar[bool] = True

    device: str = field(default="", kw_only=True, metadata={"written": False})

    def __init_subclass__(cls) -> None:
        if "name" not in cls.__dict__:
            cls.name = cls.__module__.rpartition(".")[2].replace("_", "-")

    def refuses(self, program: Program) -> str | None:
        """Return why this target cannot compile `program`, None if it can."""
        return None

    def compile(self, program: Program, progress: Progress) -> Lowered:
        """Lower every component of `program`, as far as that is possible without the device."""
        raise NotImplementedError

    def unfit(self, requires: Mapping[str, Any]) -> str | None:
        """Return what an engine requires and this machine lacks, None if nothing."""
        return None

    def is_finished(self, engine: EngineContents) -> bool:
        """Tell whether everything in an engine is compiled for this machine."""
        return True

    def finish(self, engine: EngineContents, progress: Progress) -> Finished:
        """Compile on the device what `compile` could not without it."""
        raise NotImplementedError

    def load(self, engine: EngineContents) -> dict[str, ComponentFunction]:
        """Return a function for every component of an engine."""
        raise NotImplementedError

    def reload(
        self,
        engine: EngineContents,
        bodies: Mapping[str, ComponentFunction],
        changed: Set[str],
    ) -> dict[str, ComponentFunction]:
        """Return the functions of all components once weights have changed in place.

        Args:
            engine: The engine.
            bodies: What `load`, or this, has returned before.
            changed: The keys of the tensors that hold something else now.
        """
        return self.load(engine)

    def executor(self, root: fx.GraphModule, bodies: Mapping[str, ComponentFunction]) -> Executor:
        """Return the executor of the outer graph, which calls the components."""
        return SlotExecutor(root, bodies)

    @property
    def hardware(self) -> Hardware | None:
        """The device, which has to support the program's formats; None where none was named."""
        return hardware(self.device) if self.device else None

    def hardware_kind(self) -> str:
        """Return the kind of device that it is for: the CPU where none was named."""
        return hardware(self.device).kind if self.device else "cpu"

    def __str__(self) -> str:
        name = self.name
        if self.device:
            is_default = hardware(self.device).kind == self.name
            name = self.device if is_default else f"{self.device}:{self.name}"
        return spec.unparse(name, self)


@dataclass(frozen=True)
class ThreadedTarget(Target):
    """A lowering for CPUs whose library runs on as many threads as it is told on loading."""

    threads: int = option(0, "threads to run on; 0: as many as torch has when it is loaded")

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise DiffoptError(f"threads={self.threads}: wants 0 or more")

    @property
    def hardware(self) -> Hardware | None:
        """The device, this machine's CPU where none was named, scaled to the number of threads."""
        return (super().hardware or hardware("cpu")).with_cores(self.threads)


def target_names() -> list[str]:
    """Return the names of all lowerings, without importing any."""
    return sorted(_sources())


def find_target(name: str) -> type[Target]:
    """Return the lowering called `name`."""
    target: type[Target] = plugins.find_class(name, _sources(), Target, "target")
    return target


def devices(cls: type[Target]) -> list[str]:
    """Return the names of the devices that a lowering supports."""
    return [name for name in hardware_names() if hardware(name).kind in cls.kinds]


def lowerings(device: Hardware) -> list[str]:
    """Return the names of the lowerings that support a device."""
    return [name for name in target_names() if device.kind in find_target(name).kinds]


def parse_target(text: str) -> Target:
    """Read the text of one target, such as `cpu(threads=2)` or `rtx4090:tensorrt`."""
    calls = spec.parse(text, "target")
    if len(calls) != 1:
        raise DiffoptError(f"wants one target, got '{text}'; there are {', '.join(target_names())}")
    (call,) = calls
    device, colon, lowering = call.name.partition(":")
    start, end = call.span
    if not colon:
        with _error_span(text, call.span):
            cls, device = _single_name(call.name)
        return spec.bind(call, cls, text, device=device)
    if not (device and lowering):
        raise DiffoptError(f"wants DEVICE:LOWERING, got '{call.name}'", text=text, span=call.span)
    with _error_span(text, (start, start + len(device))):
        description = hardware(device)
    with _error_span(text, (end - len(lowering), end)):
        cls = _lowering_for(description, lowering)
    # `cpu:cpu` is `cpu`, the lowering alone.
    return spec.bind(call, cls, text, device="" if device == cls.name else device)


def parse_hardware(text: str) -> Hardware:
    """Return the device that the text of a target names, with or without a lowering."""
    if text in hardware_names():
        return hardware(text)
    target = parse_target(text)
    if target.hardware is None:
        raise DiffoptError(
            f"target {text} names no device: write one of {', '.join(hardware_names())}"
        )
    return target.hardware


def _single_name(name: str) -> tuple[type[Target], str]:
    """Return the lowering and the device of a target written as one name."""
    if name in _sources():
        cls = find_target(name)
        if "cpu" in cls.kinds:
            return cls, ""
        ways = ", ".join(f"{device}:{name}" for device in devices(cls)) or "none here fits"
        raise DiffoptError(f"{name} needs a device: {ways}")
    if name not in hardware_names():
        known = {*target_names(), *hardware_names()}
        raise DiffoptError(f"there is no target '{name}'{spec.suggest(name, known)}")
    device = hardware(name)
    if device.kind in _sources():
        return _lowering_for(device, device.kind), name
    ways = " or ".join(f"{name}:{each}" for each in lowerings(device))
    raise DiffoptError(f"{name} needs a lowering: {ways or 'none here takes it'}")


def _lowering_for(device: Hardware, name: str) -> type[Target]:
    """Return the lowering called `name`, which has to support a device."""
    cls: type[Target] = plugins.find_class(name, _sources(), Target, "lowering")
    if device.kind not in cls.kinds:
        supported = ", ".join(devices(cls)) or "none that is described"
        raise DiffoptError(f"{name} does not take {device.name}; it takes {supported}")
    return cls


@contextmanager
def _error_span(text: str, span: spec.Span) -> Iterator[None]:
    """Add to errors the part of `text` that they are about."""
    try:
        yield
    except DiffoptError as error:
        raise DiffoptError(error.message, text=text, span=span) from None


@cache
def _sources() -> dict[str, str]:
    """Map the name of each lowering to its class, as "module:class"."""
    return plugins.sources("diffopt.targets", "targets")
