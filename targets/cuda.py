"""Compiles every component for an NVIDIA GPU with AOTInductor.

What needs no GPU is done anywhere, the rest on the GPU (see `device_compilation`). Weights of
convolutions have the channels-last layout. Components share their weights, which are stored once,
and loaded to the GPU once. A whole run, all steps of the sampling loop, is replayed as one CUDA
graph.
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
        """Return channels-last strides for the weights of convolutions."""
        return _channels_last(gm) if self.channels_last else {}

    def package(self, gm: fx.GraphModule, sizes: Bounds) -> Package:
        """Compile a component without its weights, which are set when it is loaded."""
        with _attention(self.attention):
            return Package(aoti.compile_package(gm, self._inductor(), sizes, cuda_runtime.DEVICE))

    def settings(self) -> dict[str, Any]:
        """Return the configuration of Inductor, and the preferred attention kernels."""
        return {"attention": self.attention, "inductor": self._inductor()}

    def _inductor(self) -> dict[str, Any]:
        return {
            "aot_inductor.package_constants_in_so": False,
            # A small weight written into the code could not be shared with other components.
            "always_keep_tensor_constants": True,
            "layout_optimization": self.channels_last,
            "force_layout_optimization": self.channels_last,
            "max_autotune": self.max_autotune,
            # By default Inductor tunes some products even so, those of 8 bits for minutes.
            **({} if self.max_autotune else {"max_autotune_gemm_backends": "ATEN"}),
            "coordinate_descent_tuning": self.max_autotune,
            "max_autotune_report_choices_stats": False,
            "aot_inductor.enable_line_tables": False,
            "aot_inductor.enable_frame_pointer": False,
        }


def _channels_last(gm: fx.GraphModule) -> dict[str, list[int]]:
    """Return channels-last strides of the stored weights that convolutions read."""
    strides = {}
    for layer in qdq.layers(gm):
        value = layer.weight.meta["val"]
        if layer.convolution and layer.weight.op == "get_attr" and value.dim() in _CHANNELS_LAST:
            channels_last = value.contiguous(memory_format=_CHANNELS_LAST[value.dim()])
            strides[str(layer.weight.target)] = list(channels_last.stride())
    return strides


@contextmanager
def _attention(kernels: str) -> Iterator[None]:
    """Set the preferred backend of scaled_dot_product_attention."""
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
