"""ONNX models to TensorRT plans, with the parser and builder that come with TensorRT."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diffopt.errors import DiffoptError
from diffopt.lowering.trt import plan_report
from diffopt.lowering.trt.library import Library, complaints, logger
from diffopt.progress import Progress, silent

if TYPE_CHECKING:
    import onnx

Shape = tuple[int, ...]
Ranges = Mapping[str, tuple[Shape, Shape]]
"""The smallest and the largest shape of inputs that have more than one."""


# Weights of this many bytes are passed to the parser by address: a serialized model that contained
# all of them could have 2 GiB at most.
_LARGE_WEIGHT = 1 << 10


@dataclass(frozen=True)
class Settings:
    """The builder's configuration.

    Attributes:
        level: The builder optimization level, from 0 to 5; None: TensorRT's default.
        workspace: The limit of the workspace memory pool, in MiB; 0: all memory.
        streaming: Whether to allow weight streaming from host memory.
        sparse: Whether to allow kernels for 2:4 sparse weights.
    """

    level: int | None = None
    workspace: int = 0
    streaming: bool = False
    sparse: bool = False

    def __post_init__(self) -> None:
        if self.level is not None and not 0 <= self.level <= 5:
            raise DiffoptError(f"level={self.level}: wants a number from 0 to 5")
        if self.workspace < 0:
            raise DiffoptError(f"workspace={self.workspace}: wants 0 or more")


@dataclass
class Plan:
    """A built plan.

    Attributes:
        content: The serialized engine.
        about: Its entry in the manifest: the number of steps by kind, and bytes of memory.
        warnings: The builder's warnings.
    """

    content: bytes
    about: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def build(
    name: str,
    model: onnx.ModelProto,
    library: Library,
    settings: Settings,
    ranges: Ranges,
    progress: Progress = silent,
) -> Plan:
    """Build the plan of one component.

    Args:
        name: The component's name, for messages.
        model: The network, which is strongly typed: fp16 is computed in fp16.
        library: The TensorRT to build with, and the compute capability to build for.
        settings: The builder's configuration.
        ranges: The shapes of inputs with dynamic sizes.
        progress: Called with what is being done and the fraction done.

    Raises:
        DiffoptError: TensorRT cannot start, parse the model or build the plan.
    """
    trt = library.trt
    log = logger(trt)
    builder = trt.Builder(log)
    if builder is None:
        raise DiffoptError(f"{name}: {library.name} cannot start: {_reason(log.lines)}")
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    buffers = _parse(name, model, parser)
    config = _config(builder, network, library, settings, ranges)
    with _monitor(trt, progress) as monitor:
        config.progress_monitor = monitor
        serialized = builder.build_serialized_network(network, config)
        if monitor.error is not None:
            raise monitor.error
    del network, parser, buffers  # in this order: the network and the parser read the buffers
    if serialized is None:
        raise DiffoptError(f"{name}: {library.name} cannot build it: {_reason(log.lines)}")
    content = bytes(serialized)
    about = {
        "steps": plan_report.kernels(content),
        "bytes": len(content),
        **plan_report.totals(log.lines),
    }
    return Plan(content, about, list(complaints(log.lines, "WARNING")))


def _parse(name: str, model: onnx.ModelProto, parser: Any) -> Any:
    """Parse the model; return the buffers that must not be freed before the plan is built."""
    text, weights = detach_weights(model)
    buffers = [text]
    is_loaded = parser.load_model_proto(text)
    for weight, content in weights.items():
        if is_loaded:
            pointer = ctypes.cast(ctypes.c_char_p(content), ctypes.c_void_p).value
            is_loaded = parser.load_initializer(weight, pointer, len(content))
            buffers.append(content)
    if is_loaded and parser.parse_model_proto():
        return buffers
    raise DiffoptError(f"{name}: {_parser_reason(parser)}")


def detach_weights(model: onnx.ModelProto) -> tuple[bytes, dict[str, bytes]]:
    """Return a serialized model with its large weights as external data, and these by name."""
    import onnx

    small, weights = onnx.ModelProto(), dict[str, bytes]()
    _copy_fields(model, small, "graph")
    _copy_fields(model.graph, small.graph, "initializer")
    for tensor in model.graph.initializer:
        copy = small.graph.initializer.add()
        if len(tensor.raw_data) < _LARGE_WEIGHT:
            copy.CopyFrom(tensor)
            continue
        _copy_fields(tensor, copy, "raw_data")
        copy.data_location = onnx.TensorProto.EXTERNAL
        copy.external_data.add(key="location", value=tensor.name)
        weights[tensor.name] = tensor.raw_data
    return small.SerializeToString(deterministic=True), weights


def _copy_fields(source: Any, target: Any, exclude: str) -> None:
    """Copy the fields of a protobuf message, except one."""
    for field_, value in source.ListFields():
        if field_.name == exclude:
            continue
        if hasattr(value, "MergeFrom"):
            getattr(target, field_.name).MergeFrom(value)
        else:
            setattr(target, field_.name, value)


def _parser_reason(parser: Any) -> str:
    """Return the parser's first error in one line: operator, node name, description."""
    if parser.num_errors == 0:
        return "the ONNX parser refuses the model and gives no reason"
    error = parser.get_error(0)
    at = f" ({error.node_name()})" if error.node_name() else ""
    text = " ".join(error.desc().split()).removeprefix("Assertion failed: ")
    text = "there is no such operator in it" if text == "false" else text
    return f"TensorRT cannot take {error.node_operator() or 'the model'}{at}: {text}"


def _config(
    builder: Any, network: Any, library: Library, settings: Settings, ranges: Ranges
) -> Any:
    trt = library.trt
    config = builder.create_builder_config()
    if library.capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(library.capability, 0)
    if settings.level is not None:
        config.builder_optimization_level = settings.level
    if settings.workspace:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace << 20)
    if settings.streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if settings.sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    # For the engine inspector; kernels are the same.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if ranges:
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            name = network.get_input(index).name
            if name in ranges:
                low, high = ranges[name]
                profile.set_shape(name, low, high, high)  # kernels for the largest
        config.add_optimization_profile(profile)
    return config


def _reason(lines: list[tuple[str, str]]) -> str:
    """Return the builder's first error, in one line."""
    errors = complaints(lines, "INTERNAL_ERROR", "ERROR")
    return next(errors, "it gives no reason")


@contextmanager
def _monitor(trt: Any, progress: Progress) -> Iterator[Any]:
    """Return a progress monitor that ends the build when the user interrupts it."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.error: BaseException | None = None
            self.fraction = 0.0
            self.phases: dict[str, tuple[str | None, int, int]] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.phases[phase] = parent, steps, 0

        def step_complete(self, phase: str, step: int) -> bool:
            parent, steps, _ = self.phases[phase]
            self.phases[phase] = parent, steps, step + 1
            try:  # exceptions do not propagate through the builder
                now = max(self.done(name) for name, p in self.phases.items() if not p[0])
                self.fraction = max(self.fraction, now)  # `now` falls when a phase begins
                progress("building", self.fraction)
            except BaseException as error:
                self.error = error
            return self.error is None

        def phase_finish(self, phase: str) -> None:
            del self.phases[phase]

        def done(self, phase: str) -> float:
            _, steps, completed = self.phases[phase]
            inner = (self.done(name) for name, p in self.phases.items() if p[0] == phase)
            return min(1.0, (completed + max(inner, default=0.0)) / max(steps, 1))

    monitor = Monitor()
    if threading.current_thread() is not threading.main_thread():
        yield monitor
        return

    def stop(number: int, frame: Any) -> None:
        monitor.error = KeyboardInterrupt()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield monitor
    finally:
        signal.signal(signal.SIGINT, before)
