"""Rewrites a component so that what it does has a form in ONNX.

- Bytes with two 4-bit numbers each become plain int8 numbers in the graph; `export` stores them in
  4 bits again.
- E4M3 numbers with a scale, which graphs write in plain operators, become one operator each.
- Complex numbers are cut up as pairs of real ones.
- Limits of numbers are floats.
- Convolutions get a stride, padding and dilation for each axis.
- Attention that is causal gets its mask, and heads that share keys get them repeated.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.ir import graph as g
from diffopt.ir import qdq
from diffopt.ir.nodes import args, argument, conv_geometry, is_call, replace_node, stored_tensor
from diffopt.ir.op_sets import CONVOLUTIONS

aten = torch.ops.aten

# Operators along an axis that the exporter has for real numbers alone: the position of the axis.
_ALONG: dict[Any, int] = {
    aten.split.Tensor: 2,
    aten.split_with_sizes.default: 2,
    aten.unsqueeze.default: 1,
    aten.select.int: 1,
}


@torch.library.custom_op("diffopt::quantize_fp8", mutates_args=())
def quantize_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """Return E4M3 numbers: x divided by a scale, and clamped."""
    return (x.float() / scale).clamp(-qdq.FP8_MAX, qdq.FP8_MAX).to(qdq.FP8)


@quantize_fp8.register_fake
def _(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=qdq.FP8)


@torch.library.custom_op("diffopt::dequantize_fp8", mutates_args=())
def dequantize_fp8(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return E4M3 numbers multiplied by a scale: one for all, or one for each of the first axis."""
    rows = scale if scale.dim() == 0 else scale.reshape(-1, *[1] * (values.dim() - 1))
    return (values.float() * rows).to(dtype)


@dequantize_fp8.register_fake
def _(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(values, dtype=dtype)


@dataclass
class Prepared:
    """A component whose operators all have a form in ONNX.

    Attributes:
        gm: The component, a copy.
        packed: Of each tensor that stands for 4-bit numbers as int8: the bytes that the component
            has them in.
    """

    gm: fx.GraphModule
    packed: dict[str, Tensor] = field(default_factory=dict)


def prepare(gm: fx.GraphModule) -> Prepared:
    """Return a copy of a component with operators that have a form in ONNX."""
    prepared = Prepared(g.clone(gm))
    for node in list(prepared.gm.graph.nodes):
        with prepared.gm.graph.inserting_before(node):
            if is_call(node, torch.ops.diffopt.unpack_int4.default):
                _unpack(prepared, node)
            elif is_call(node, aten.scaled_dot_product_attention.default):
                _attention(prepared.gm.graph, node)
            elif is_call(node, aten.expand.default, *_ALONG):
                _complex(prepared.gm.graph, node)
            elif is_call(node, *CONVOLUTIONS):
                _convolution(node)
            elif is_call(node, aten.clamp.default) and node.meta["val"].is_floating_point():
                # The exporter takes no limits of which one is a whole number.
                limits = argument(node, 1, "min"), argument(node, 2, "max")
                node.args = (args(node)[0], *(n if n is None else float(n) for n in limits))
                node.kwargs = {}
            elif is_call(node, aten._to_copy.default, aten.mul.Tensor):
                _fp8(prepared.gm.graph, node)
    g.prune_unused(prepared.gm)
    prepared.gm.recompile()
    return prepared


def _unpack(prepared: Prepared, node: fx.Node) -> None:
    """Put the numbers in the place of the bytes, in the shape that is dequantized."""
    source = args(node)[0]
    packed = stored_tensor(prepared.gm, source)
    assert packed is not None
    values: Tensor = torch.ops.diffopt.unpack_int4(packed, args(node)[1])
    users = list(node.users)
    views = [user for user in users if is_call(user, aten.view.default)]
    last = views[0] if len(views) == len(users) == 1 else node
    name = str(source.target)
    delattr(prepared.gm, name)
    prepared.packed[name] = packed.detach()
    replace_node(last, g.get_attr(prepared.gm, name, values.reshape(last.meta["val"].shape)))


def _fp8(graph: fx.Graph, node: fx.Node) -> None:
    """Put one operator each in the place of what scales to E4M3 numbers and from them."""
    dtype = node.meta["val"].dtype
    weight, x = qdq.weight(node), qdq.activation(node)
    if weight is not None and weight.number == "fp8":
        target = torch.ops.diffopt.dequantize_fp8.default
        replace_node(node, g.call(graph, target, weight.values, weight.scales, dtype))
    elif x is not None and x.number == "fp8" and not x.rows:
        q = g.call(graph, torch.ops.diffopt.quantize_fp8.default, x.source, x.scale)
        target = torch.ops.diffopt.dequantize_fp8.default
        replace_node(node, g.call(graph, target, q, x.scale, dtype))


def _complex(graph: fx.Graph, node: fx.Node) -> None:
    """Let an operator work on complex numbers as pairs of real ones."""
    x, place = args(node)[0], _ALONG.get(node.target)
    if not x.meta["val"].is_complex():
        return
    rank = x.meta["val"].dim() + (node.target is aten.unsqueeze.default)
    arguments = list(args(node)[1:])
    # The pairs are one more axis, behind all others.
    if place is None:
        arguments[0] = [*arguments[0], 2]
    elif len(node.args) > place:
        arguments[place - 1] %= rank
    result = g.call(graph, node.target, g.call(graph, aten.view_as_real.default, x), *arguments)
    if isinstance(node.meta["val"], torch.Tensor):
        replace_node(node, g.call(graph, aten.view_as_complex.default, result))
        return
    for user in list(node.users):
        piece = g.call(graph, operator.getitem, result, args(user)[1])
        user.replace_all_uses_with(g.call(graph, aten.view_as_complex.default, piece))


def _convolution(node: fx.Node) -> None:
    """Give a convolution a size for each axis where one stands for all."""
    node.args = (*args(node)[:2], argument(node, 2, "bias"), *conv_geometry(node))
    node.kwargs = {}


def _attention(graph: fx.Graph, node: fx.Node) -> None:
    """Write out the mask of causal attention, and keys and values that several heads share."""
    query, key, value = args(node)[:3]
    mask = argument(node, 3, "attn_mask")
    if argument(node, 5, "is_causal", False):
        sizes = [int(n.meta["val"].shape[-2]) for n in (query, key)]
        ones = g.call(graph, aten.ones.default, sizes, dtype=torch.bool)
        mask = g.call(graph, aten.tril.default, ones)
    elif not node.kwargs.get("enable_gqa"):
        return
    repeats = int(query.meta["val"].shape[-3]) // int(key.meta["val"].shape[-3])
    if node.kwargs.get("enable_gqa") and repeats > 1:
        repeat = aten.repeat_interleave.self_int
        key, value = (g.call(graph, repeat, n, repeats, -3) for n in (key, value))
    arguments: tuple[Any, ...] = (query, key, value, mask)
    scale = node.kwargs.get("scale")
    replace_node(node, g.call(graph, node.target, *arguments, like=node, scale=scale))
