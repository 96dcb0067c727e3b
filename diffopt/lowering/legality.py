"""Formats of numbers in which programs multiply and store, and what a device lacks of them."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from diffopt.ir import qdq
from diffopt.ir.nodes import is_call
from diffopt.ir.program import Program
from diffopt.lowering.hardware import SPARSE, Hardware
from diffopt.transforms import sparsity_2_4

_NAMES = {
    torch.float64: "fp32",  # devices are not described for it; programs have only a few values
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "int8",
    qdq.FP8: "fp8",
}


def product_format(node: fx.Node) -> str:
    """Return the format in which an operator multiplies."""
    layer = qdq.layer(node)
    if layer is not None and (x := low_precision_input(layer)) is not None:
        return x.number
    values = (source.meta["val"] for source in node.all_input_nodes)
    formats = (_NAMES.get(v.dtype) for v in values if isinstance(v, Tensor))
    return next((name for name in formats if name is not None), "fp32")


def low_precision_input(layer: qdq.Layer) -> qdq.Activation | None:
    """Return a layer's quantized input if its products are in that format.

    Otherwise they are in floats, and the result is None: weights alone are quantized, or in another
    format than the input, or with a scale for each group of inputs, which would split integer sums.
    """
    x, weight = qdq.activation(layer.x), qdq.weight(layer.weight)
    if x is None or weight is None or weight.group is not None:
        return None
    return x if (x.number == "fp8") == (weight.number == "fp8") else None


def unsupported(program: Program, hardware: Hardware) -> str | None:
    """Return which format or sparsity of a program a device lacks, None if it has all."""
    bodies = {name or "the program": gm for name, gm in program.graphs.items()}
    for name, gm in bodies.items():
        for layer in qdq.layers(gm):
            if (reason := _unsupported_input(layer, hardware)) is not None:
                return f"in {name} {reason}"
    for name, gm in bodies.items():
        for node in gm.graph.nodes:
            number = _value_format(node)
            if number is not None and not hardware.can_store(number):
                reason = f"{node.name} is in {number}, and {hardware.lacks(number)}"
                return f"in {name} {reason}; {_instead(number, hardware)}"
    if (lacking := hardware.lacks(SPARSE)) is not None:
        for name, gm in bodies.items():
            sparse_layer = next(sparsity_2_4.sparse_layers(gm), None)
            if sparse_layer is not None:
                sparse = f"the weight of {sparse_layer.node.name} is {SPARSE} sparse, and {lacking}"
                return f"in {name} {sparse}; prune to another pattern, or take the target eager"
    return None


def _instead(number: str, hardware: Hardware) -> str:
    if number in ("fp16", "bf16"):
        return "cast to " + " or ".join(n for n in ("fp16", "bf16", "fp32") if n in hardware.peak)
    return "quantize to " + " or ".join(n for n in ("int8", "int4", "fp8") if hardware.can_store(n))


def _unsupported_input(layer: qdq.Layer, hardware: Hardware) -> str | None:
    x = qdq.activation(layer.x)
    if x is None or (reason := hardware.lacks(x.number)) is None:
        return None
    instead = "" if x.number == "int8" or hardware.lacks("int8") else "activations to int8, or "
    return (
        f"the input of {layer.node.name} is in {x.number}, and {reason};"
        f" quantize {instead}weights alone"
    )


def _value_format(node: fx.Node) -> str | None:
    """Return the format of a node's value; None for types that every device has."""
    if is_call(node, torch.ops.diffopt.unpack_int4.default):
        return "int4"
    value = node.meta.get("val")
    return _NAMES.get(value.dtype) if isinstance(value, Tensor) else None
