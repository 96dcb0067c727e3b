"""Runs plans on torch's CUDA tensors: without copies, on the current stream."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffopt.errors import DiffoptError
from diffopt.lowering.cuda_runtime import DEVICE
from diffopt.lowering.trt.library import Library, complaints, logger
from diffopt.storage import disk_cache

DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "FP8": torch.float8_e4m3fn,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}
"""The types that inputs and outputs of a plan may have, by TensorRT's name."""


@dataclass(frozen=True)
class Binding:
    """An input or an output of a plan.

    Attributes:
        name: Its name in the plan.
        shape: Its shape, with -1 for dynamic sizes.
        dtype: Its type.
        is_dynamic: Whether a size is dynamic.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_dynamic: bool


class PlanFunction:
    """A loaded plan, as a function of a component's flat arguments."""

    def __init__(
        self,
        name: str,
        library: Library,
        plan: memoryview,
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        stream_weights: bool = False,
        eager: bool = False,
    ) -> None:
        """Load a plan.

        Args:
            name: The component's name, for messages.
            library: The TensorRT that runs the plan.
            plan: The serialized engine.
            inputs: The names of the component's arguments in the plan.
            outputs: The names of its results.
            stream_weights: Stream the weights that do not fit from host memory.
            eager: Compile all kernels before they run, so that runs can be captured.
        """
        trt = library.trt
        self._name = name
        self._log = logger(trt)
        self._runtime = trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise DiffoptError(f"{name}: {library.name} cannot load its plan: {self._reason()}")
        if stream_weights:
            budget = self._engine.get_weight_streaming_automatic_budget()
            self._engine.weight_streaming_budget_v2 = budget
        self._cache = _KernelCache(library, plan) if library.name == "tensorrt-rtx" else None
        self._context = self._new_context(trt, eager)
        names = {self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)}
        # The builder removes inputs that nothing reads.
        self._inputs = [self._binding(n) if n in names else None for n in inputs]
        self._outputs = [self._binding(n) for n in outputs]

    def _new_context(self, trt: Any, eager: bool) -> Any:
        if self._cache is None:
            return self._engine.create_execution_context()
        config = self._engine.create_runtime_config()
        if eager:
            strategies = trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        self._cache.attach(config)
        return self._engine.create_execution_context(config)

    def _binding(self, name: str) -> Binding:
        shape = tuple(self._engine.get_tensor_shape(name))
        dtype = DTYPES[self._engine.get_tensor_dtype(name).name]
        return Binding(name, shape, dtype, -1 in shape)

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run the component asynchronously on the current stream."""
        context = self._context
        # Held until the kernels are in the stream, behind which freed memory may be used again.
        held = []
        for slot, tensor in zip(self._inputs, tensors, strict=True):
            if slot is None:
                continue
            tensor = tensor.to(slot.dtype).contiguous()
            held.append(tensor)
            if slot.is_dynamic:
                context.set_input_shape(slot.name, tuple(tensor.shape))
            context.set_tensor_address(slot.name, tensor.data_ptr())
        results = []
        for slot in self._outputs:
            shape = tuple(context.get_tensor_shape(slot.name)) if slot.is_dynamic else slot.shape
            results.append(torch.empty(shape, dtype=slot.dtype, device=DEVICE))
            context.set_tensor_address(slot.name, results[-1].data_ptr())
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise DiffoptError(f"{self._name}: its plan does not run: {self._reason()}")
        if self._cache is not None:
            self._cache.save()
        return results

    def _reason(self) -> str:
        errors = complaints(self._log.lines, "INTERNAL_ERROR", "ERROR")
        return next(errors, "no reason is given")


class _KernelCache:
    """The runtime cache of TensorRT for RTX: kernels that it compiles when a plan first runs."""

    def __init__(self, library: Library, plan: memoryview) -> None:
        # TensorRT checks what else the kernels depend on when it reads the cache.
        parts = {
            "plan": hashlib.sha256(plan).hexdigest(),
            "version": library.version,
            "device": torch.cuda.get_device_name(),
        }
        self._key = disk_cache.key(parts)
        self._cache: Any = None
        self._is_new = False

    def attach(self, config: Any) -> None:
        """Set the cache in a configuration, with the kernels of earlier loads."""
        self._cache = config.create_runtime_cache()
        entry = disk_cache.get(self._key, "runtime")
        self._is_new = entry is None or not self._cache.deserialize(entry["cache"])
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Save the kernels after the first run."""
        if self._is_new:
            self._is_new = False
            disk_cache.put(self._key, {"cache": bytes(self._cache.serialize())}, "runtime")
