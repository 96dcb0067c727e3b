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


# A weight of this many bytes is handed to the parser where it lies: a model file that holds all of
# them may have 2 GiB at most.
_LARGE = 1 << 10


@dataclass(frozen=True)
class Settings:
    """How to build, in TensorRT's own terms.

    Attributes:
        level: How much to search for faster kernels, from 0 to 5; None: TensorRT's default.
        workspace: The memory that kernels may use besides, in MiB; 0: all there is.
        streaming: Whether weights may stay in the host's memory when the plan runs.
        sparse: Whether to take kernels for 2:4 sparse weights where the weights are that.
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
        content: What TensorRT reads.
        about: What the manifest says about it: its steps by kind, and bytes.
        warnings: What the builder warned of.
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
        name: The component's, for messages.
        model: Keeps its types: fp16 stays fp16.
        library: What to build with, and for what.
        settings: How.
        ranges: Of inputs without a fixed shape.
        progress: Called with what is being done and the fraction done.
    """
    trt = library.trt
    log = logger(trt)
    builder = trt.Builder(log)
    if builder is None:
        raise DiffoptError(f"{name}: {library.name} cannot start: {_reason(log.lines)}")
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    kept = _parse(name, model, parser)
    config = _config(builder, network, library, settings, ranges)
    with _monitor(trt, progress) as monitor:
        config.progress_monitor = monitor
        made = builder.build_serialized_network(network, config)
        if monitor.error is not None:
            raise monitor.error
    del network, parser, kept  # in this order: until then they may read the weights
    if made is None:
        raise DiffoptError(f"{name}: {library.name} cannot build it: {_reason(log.lines)}")
    content = bytes(made)
    about = {
        "steps": plan_report.kernels(content),
        "bytes": len(content),
        **plan_report.totals(log.lines),
    }
    return Plan(content, about, list(complaints(log.lines, "WARNING")))


def _parse(name: str, model: onnx.ModelProto, parser: Any) -> Any:
    """Hand the model to the parser; return what has to stay in memory until the plan is built."""
    text, weights = detach(model)
    kept = [text]
    is_fine = parser.load_model_proto(text)
    for weight, content in weights.items():
        if is_fine:
            buffer = ctypes.c_char_p(content)
            address = ctypes.cast(buffer, ctypes.c_void_p).value
            is_fine = parser.load_initializer(weight, address, len(content))
            kept.append(content)
    if is_fine and parser.parse_model_proto():
        return kept
    raise DiffoptError(f"{name}: {_parser_reason(parser)}")


def detach(model: onnx.ModelProto) -> tuple[bytes, dict[str, bytes]]:
    """Return a model without its large weights, and these by name."""
    import onnx

    small, weights = onnx.ModelProto(), dict[str, bytes]()
    _copy(model, small, "graph")
    _copy(model.graph, small.graph, "initializer")
    for tensor in model.graph.initializer:
        own = small.graph.initializer.add()
        if len(tensor.raw_data) < _LARGE:
            own.CopyFrom(tensor)
            continue
        _copy(tensor, own, "raw_data")
        own.data_location = onnx.TensorProto.EXTERNAL
        own.external_data.add(key="location", value=tensor.name)
        weights[tensor.name] = tensor.raw_data
    return small.SerializeToString(deterministic=True), weights


def _copy(source: Any, target: Any, but: str) -> None:
    """Copy the fields of a message, except one."""
    for field_, value in source.ListFields():
        if field_.name == but:
            continue
        if hasattr(value, "MergeFrom"):
            getattr(target, field_.name).MergeFrom(value)
        else:
            setattr(target, field_.name, value)


def _parser_reason(parser: Any) -> str:
    """Return the parser's first error in one line: the operator, its name, and what is wrong."""
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
    # What the inspector says on a GPU; it does not change the kernels.
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
    """Return what the builder gave as its reason, in one line."""
    errors = complaints(lines, "INTERNAL_ERROR", "ERROR")
    return next(errors, "it gives no reason")


@contextmanager
def _monitor(trt: Any, progress: Progress) -> Iterator[Any]:
    """Give a progress monitor that ends the build when the user interrupts it."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.error: BaseException | None = None
            self.most = 0.0
            self.phases: dict[str, tuple[str | None, int, int]] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.phases[phase] = parent, steps, 0

        def step_complete(self, phase: str, step: int) -> bool:
            parent, steps, _ = self.phases[phase]
            self.phases[phase] = parent, steps, step + 1
            try:  # an exception cannot pass through the builder
                now = max(self.done(name) for name, p in self.phases.items() if not p[0])
                self.most = max(self.most, now)  # phases come up while others are done
                progress("building", self.most)
            except BaseException as error:
                self.error = error
            return self.error is None

        def phase_finish(self, phase: str) -> None:
            del self.phases[phase]

        def done(self, phase: str) -> float:
            _, steps, own = self.phases[phase]
            inner = (self.done(name) for name, p in self.phases.items() if p[0] == phase)
            return min(1.0, (own + max(inner, default=0.0)) / max(steps, 1))

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
