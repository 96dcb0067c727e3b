"""Compiles components with Torch-TensorRT: TensorRT plans, and torch for unsupported operators.

Torch-TensorRT partitions a component: runs of supported operators become a plan each, and
AOTInductor compiles the rest. Both are in one package, with their weights. A component without any
plan is compiled by AOTInductor alone.

What needs no GPU is done anywhere, the rest on the GPU (see `device_compilation`), where the
package torch-tensorrt has to be installed: importing it needs CUDA. Types are those of the graph.
"""

from __future__ import annotations

import importlib
import logging
import operator
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from diffopt import optional
from diffopt.errors import DiffoptError
from diffopt.ir import graph as g
from diffopt.ir.dynamic_sizes import Bounds
from diffopt.ir.printing import target_name
from diffopt.ir.program import Program
from diffopt.lowering import aoti, cuda_runtime
from diffopt.lowering.compile_inputs import dynamic_shapes, example_tensor
from diffopt.lowering.device_compilation import Deferred, Package
from diffopt.lowering.target import option
from diffopt.lowering.trt.builder import Settings
from diffopt.storage.temporary import work_folder
from diffopt.transforms.sparsity_2_4 import sparse_layers

_REPORTS = "torch_tensorrt.dynamo._DryRunTracker"
"""The logger of Torch-TensorRT's reports about partitions."""
_OPERATORS = re.compile(r"Number of Operators in Engine: (\d+)")
_PLAN = "_run_on_acc"
"""The prefix of the names of submodules that are plans."""


@dataclass(frozen=True)
class TorchTensorrt(Deferred):
    """Compile for NVIDIA GPUs with TensorRT, and with AOTInductor what TensorRT lacks."""

    embeds_weights: ClassVar[bool] = True
    reads_weights: ClassVar[bool] = False

    level: int | None = option(
        None, "how long to search for faster kernels, from 0 to 5; none: TensorRT's own default"
    )
    workspace: int = option(0, "MiB that kernels may use besides their data; 0: all there is")
    min_block: int = option(5, "the fewest operators in a row that are worth a plan")
    tf32: bool = option(False, "multiply float32 with 10 bits of mantissa, which is faster")
    truncate_double: bool = option(False, "compute in float32 what is in float64")
    cuda_graph: bool = option(
        False, "replay a whole run as one CUDA graph, from the second on with inputs of a shape"
    )

    def __post_init__(self) -> None:
        Settings(self.level, self.workspace)  # says what cannot be
        if self.min_block < 1:
            raise DiffoptError(f"min-block={self.min_block}: wants 1 or more")

    def refuses(self, program: Program) -> str | None:
        """Refuse programs that are not on the CPU, and float64 unless it may be truncated."""
        reason = super().refuses(program)
        return reason or (None if self.truncate_double else _double(program))

    def package(self, gm: fx.GraphModule, sizes: Bounds) -> Package:
        """Compile a component with its weights."""
        library = _library()
        values = [node.meta["val"] for node in g.placeholders(gm)]
        arguments = tuple(example_tensor(value, cuda_runtime.DEVICE) for value in values)
        shapes = dynamic_shapes(len(values), sizes) if sizes else None
        inputs = [_input(library, v, sizes.get(i, {})) for i, v in enumerate(values)]
        with work_folder() as folder, aoti.quiet_inductor():
            exported = torch.export.export(gm, arguments, dynamic_shapes=shapes, strict=False)
            with _reports() as reports:
                # Types are the graph's: by default up to 2.12, and always from 2.13 on.
                partitioned = library.dynamo.compile(
                    exported,
                    arg_inputs=inputs,
                    sparse_weights=any(True for _ in sparse_layers(gm)),
                    **self.settings(),
                )
            about = _about(partitioned, "".join(reports))
            if not about["tensorrt"]["plans"]:
                return Package(aoti.compile_package(gm, {}, sizes, cuda_runtime.DEVICE), about)
            path = Path(folder, "body.pt2")
            library.save(
                partitioned,
                str(path),
                output_format="aot_inductor",
                arg_inputs=list(arguments),
                dynamic_shapes=shapes,
                retrace=True,
            )
            return Package(path.read_bytes(), about)

    def settings(self) -> dict[str, Any]:
        """Return the options of Torch-TensorRT."""
        return {
            "min_block_size": self.min_block,
            "optimization_level": self.level,
            "workspace_size": self.workspace << 20,
            "disable_tf32": not self.tf32,
            "truncate_double": self.truncate_double,
            "attn_bias_is_causal": False,  # its default takes any mask to be a causal one
        }

    def compiler(self) -> dict[str, Any]:
        """Return the versions that plans can be used with: those of TensorRT too."""
        versions = {
            "torch-tensorrt": _library().__version__,  # it imports its TensorRT
            "tensorrt": importlib.import_module("tensorrt").__version__,
        }
        return {**super().compiler(), **versions}


def _double(program: Program) -> str | None:
    """Return which value of a component is in float64, None if none is."""
    for name, gm in program.components.items():
        for node in gm.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, Tensor) and value.dtype == torch.float64:
                return (
                    f"{node.name} of {name} is in float64, which TensorRT lacks;"
                    " truncate-double=true computes it in float32"
                )
    return None


def _library() -> Any:
    """Import Torch-TensorRT, which adds the operators that packages call."""
    library = optional.module_or_reason("torch_tensorrt")
    if isinstance(library, str):
        version = ".".join(torch.__version__.split(".")[:2])
        raise DiffoptError(
            f"the target torch-tensorrt needs the package torch-tensorrt, which {library};"
            f' pip install "torch-tensorrt=={version}.*"'
        )
    return library


def _input(library: Any, value: Tensor, axes: Mapping[int, tuple[int, int]]) -> Any:
    """Return the description of an argument for Torch-TensorRT."""
    shape = tuple(value.shape)
    if not axes:
        return library.Input(shape=shape, dtype=value.dtype)
    low, high = (
        tuple(axes[axis][end] if axis in axes else size for axis, size in enumerate(shape))
        for end in (0, 1)
    )
    # Kernels are tuned for the sizes of the example.
    return library.Input(min_shape=low, opt_shape=shape, max_shape=high, dtype=value.dtype)


@contextmanager
def _reports() -> Iterator[list[str]]:
    """Collect Torch-TensorRT's reports, which it does not show by default."""
    texts: list[str] = []
    logger = logging.getLogger(_REPORTS)
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield texts
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def _about(partitioned: fx.GraphModule, report: str) -> dict[str, Any]:
    """Return the number of plans and of operators in them, and the operators that torch runs."""
    parts = dict(partitioned.named_children())
    plans = [name for name in parts if name.startswith(_PLAN)]
    counts = [int(count) for count in _OPERATORS.findall(report)]
    in_torch = [part for part in parts.values() if isinstance(part, fx.GraphModule)]
    operators = Counter(
        target_name(node)
        for graph in [partitioned, *in_torch]
        for node in graph.graph.nodes
        if node.op == "call_function" and node.target is not operator.getitem
    )
    # Every plan is reported; should that change, no number is better than a wrong one.
    in_plans = sum(counts) if len(counts) == len(plans) else None
    return {"tensorrt": {"plans": len(plans), "operators": in_plans}, "torch": dict(operators)}
