"""Runs a program's outer graph on a GPU: on its own stream, or as one CUDA graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffopt.errors import DiffoptError, first_line
from diffopt.lowering.compile_inputs import platform_tag
from diffopt.lowering.executor import Pause, SlotExecutor, Watch
from diffopt.lowering.hardware import Hardware

DEVICE = "cuda"

Capability = tuple[int, int]


def capability() -> Capability | None:
    """Return the compute capability of this machine's GPU, None if it has none."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def requires(device: Hardware) -> dict[str, Any]:
    """Return what code compiled for a device requires of a machine, as JSON."""
    return {
        "device": device.name,
        "capability": list(device.capability or ()),
        "platform": platform_tag(),
    }


def unfit(requires: Mapping[str, Any], code: str) -> str | None:
    """Return what this machine lacks of `requires`, None if nothing; `code` names what needs it."""
    wanted = ".".join(map(str, requires["capability"]))
    needs = f"its {code} need a GPU of compute capability {wanted} ({requires['device']})"
    local = capability()
    if local is None:
        return f"{needs}, and torch finds none here"
    if list(local) != requires["capability"]:
        return f"{needs}, and the one here has {'.'.join(map(str, local))}"
    if requires["platform"] != platform_tag():
        return f"it was built for {requires['platform']}, this is {platform_tag()}"
    return None


_Key = tuple[tuple[tuple[int, ...], torch.dtype], ...]


@dataclass
class _Recorded:
    """A captured CUDA graph, with the tensors that it reads and writes."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    graph: torch.cuda.CUDAGraph


class CudaExecutor:
    """Runs an executor on the GPU, for inputs on any device.

    A run is on a stream other than the default one, on which TensorRT would synchronize the whole
    device. With `record`, the second run with inputs of the same shapes is captured as one CUDA
    graph, which later runs replay: one launch for the whole loop.
    """

    def __init__(self, executor: SlotExecutor, record: bool = False) -> None:
        self._executor = executor
        self._record = record
        self._stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._seen: dict[_Key, _Recorded | None] = {}

    @property
    def is_stepwise(self) -> bool:
        """Tell whether it runs step by step in any case, and not as one CUDA graph."""
        return not self._record

    def run(self, tensors: Sequence[Tensor], watch: Watch | None = None) -> list[Tensor]:
        """Return the outputs for flat inputs: on the GPU if all inputs are, else on the CPU.

        `watch` is called when a step has been given to the GPU.
        """
        caller = torch.cuda.current_stream()
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream), torch.no_grad():
            inputs = [tensor.to(DEVICE, non_blocking=True) for tensor in tensors]
            results = self._run(inputs) if watch is None else self._watched(inputs, watch)
        caller.wait_stream(self._stream)
        for tensor in results:
            tensor.record_stream(caller)  # not to be freed before the caller's stream has read it
        if tensors and all(tensor.device.type == DEVICE for tensor in tensors):
            return results
        return [tensor.cpu() for tensor in results]

    def _watched(self, tensors: list[Tensor], watch: Watch) -> list[Tensor]:
        def done(pause: Pause) -> None:
            pause.wait = self._stream.synchronize
            watch(pause)

        return self._executor.run(tensors, done)

    def _run(self, tensors: list[Tensor]) -> list[Tensor]:
        if not self._record:
            return self._executor.run(tensors)
        key = tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)
        if key not in self._seen:  # kernels may allocate or tune in their first run
            self._seen[key] = None
            return self._executor.run(tensors)
        recorded = self._seen[key]
        if recorded is None:
            recorded = self._seen[key] = self._capture(tensors)
        for static, tensor in zip(recorded.inputs, tensors, strict=True):
            static.copy_(tensor)
        recorded.graph.replay()
        return [tensor.clone() for tensor in recorded.outputs]

    def _capture(self, tensors: list[Tensor]) -> _Recorded:
        inputs = [tensor.clone() for tensor in tensors]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                outputs = self._executor.run(inputs)
        except RuntimeError as error:
            reason = first_line(error)
            raise DiffoptError(
                f"the run cannot be captured as a CUDA graph: {reason}; set cuda-graph=false"
            ) from error
        return _Recorded(inputs, outputs, graph)
