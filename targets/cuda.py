"""Compiles every component for an NVIDIA GPU with AOTInductor.

What needs no GPU is done anywhere, the rest on the GPU (see `deferred`). Convolutions' weights are
laid out channels last. Components share their weights, which are stored once, and are on the GPU
once. A whole run, all steps of the sampling loop, is replayed as one CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from diffopt.ir import qdq
from diffopt.ir.dynamic_sizes import Bounds
from diffopt.lowering import aoti, cuda_runtime
from diffopt.lowering.device_compilation import Deferred, Package
from diffopt.lowering.target import option

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Cuda(Deferred):
    """Compile for NVIDIA GPUs with AOTInductor."""

    max_autotune: bool = option(False, "time several kernels for each product and convolution")
    attention: Literal["auto", "flash", "efficient", "cudnn", "math"] = option(
        "auto", "whose kernels to compute attention with, where they can"
    )
    channels_last: bool = option(True, "compute convolutions with channels as the last axis")
    cuda_graph: bool = option(
        True, "replay a whole run as one CUDA graph, from the second on with inputs of a shape"
    )

    def strides(self, gm: fx.GraphModule) -> dict[str, list[int]]:
        """Let convolutions read weights whose last axis are the channels."""
        return _channels_last(gm) if self.channels_last else {}

    def package(self, gm: fx.GraphModule, sizes: Bounds) -> Package:
        """Compile a component, which gets its weights when it is loaded."""
        with _attention(self.attention):
            return Package(aoti.compile_package(gm, self._inductor(), sizes, cuda_runtime.DEVICE))

    def settings(self) -> dict[str, Any]:
        """Return the configuration of the compiler, and whose kernels it is to prefer."""
        return {"attention": self.attention, "inductor": self._inductor()}

    def _inductor(self) -> dict[str, Any]:
        return {
            "aot_inductor.package_constants_in_so": False,
            # A small weight written into the code could not be shared with other components.
            "always_keep_tensor_constants": True,
            "layout_optimization": self.channels_last,
            "force_layout_optimization": self.channels_last,
            "max_autotune": self.max_autotune,
            # Some products would be tuned all the same, in 8 bits for minutes.
            **({} if self.max_autotune else {"max_autotune_gemm_backends": "ATEN"}),
            "coordinate_descent_tuning": self.max_autotune,
            "max_autotune_report_choices_stats": False,
            "aot_inductor.enable_line_tables": False,
            "aot_inductor.enable_frame_pointer": False,
        }


def _channels_last(gm: fx.GraphModule) -> dict[str, list[int]]:
    """Return the strides of the weights that convolutions read, with channels as the last axis."""
    strides = {}
    for layer in qdq.layers(gm):
        value = layer.weight.meta["val"]
        if layer.convolution and layer.weight.op == "get_attr" and value.dim() in _CHANNELS_LAST:
            turned = value.contiguous(memory_format=_CHANNELS_LAST[value.dim()])
            strides[str(layer.weight.target)] = list(turned.stride())
    return strides


@contextmanager
def _attention(kernels: str) -> Iterator[None]:
    """Let the compiler prefer some kernels for attention to others."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,
    }
    if kernels == "auto":
        yield
        return
    first = order[kernels]
    others = [other for other in order.values() if other is not first]
    with sdpa_kernel([first, *others], set_priority=True):
        yield
