"""Lowers quantized layers to oneDNN's integer kernels, and packs weights once, on loading.

A layer whose weight and input are both quantized becomes one operator on integers; other quantized
weights are widened, and packed for the kernels of their type where that saves time. What follows
from stored tensors alone (4-bit numbers, widened ones, packed ones) is computed on loading
(see `setup`):

    %w: float32[16,8] = quantized_decomposed.dequantize_per_channel(%values, %scales, None, 0, …)
    %y: float32[4,16] = aten.linear(%d, %w, %bias)

    setup:     %packed: int8[8,16] = onednn.qlinear_prepack(%values, [4, 8])
    component: %u: uint8[4,8] = quantized_decomposed.quantize_per_tensor(%x, %scale, %zero2, …)
               %y: float32[4,16] = onednn.qlinear_pointwise.tensor(%u, %scale, %zero2, %packed, …)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import fx

from diffopt.ir import graph as g
from diffopt.ir import qdq
from diffopt.ir.insert import insert
from diffopt.ir.nodes import argument, conv_geometry, is_call, replace_node
from diffopt.lowering import load_time_graph

aten = torch.ops.aten
qd = torch.ops.quantized_decomposed
onednn = torch.ops.onednn
mkldnn = torch.ops.mkldnn

_Post = tuple[str, list[float], str]  # what a kernel applies to its results
_NO_POST: _Post = ("none", [], "")
_UNSIGNED = 128
"""What is added to signed numbers: convolutions read unsigned ones alone, and for signed ones a CPU
without AMX has a reference product that is hundreds of times as slow."""

# A call of oneDNN is some 10 µs slower than torch's own product in float32, which transposes
# weights as it reads them: with fewer multiply-adds that is more than a packed weight saves.
_WORTH_PACKING = 2**22


def lower(
    components: Mapping[str, fx.GraphModule], pack: bool, lack: str | None
) -> load_time_graph.Lowered:
    """Return components with kernels for integers, and what these need on loading.

    Args:
        components: Components by name.
        pack: Also pack the weights of layers in floats, which are then no longer those stored; not
            those of small products in float32, at the sizes of the sample.
        lack: Why nothing can run on integers.
    """
    return load_time_graph.lower(
        components,
        lambda gm: pack or any(map(qdq.dequantizes_weight, gm.graph.nodes)),
        lambda name, gm: _lower_body(gm, pack, lack),
        widen=True,
    )


# Layers


def _lower_body(gm: fx.GraphModule, pack: bool, lack: str | None) -> load_time_graph.Rewritten:
    """Put kernels with packed weights in place of layers."""
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    changed: set[fx.Node] = set()
    inputs = _Inputs(gm)
    for node in list(gm.graph.nodes):
        layer = qdq.layer(node)  # at this point: its input may have been replaced
        if layer is None:
            continue
        weight, x = qdq.weight(layer.weight), qdq.activation(layer.x)
        if weight is None and not pack:
            continue
        reason = None if weight is None or x is None else lack or _obstacle(layer, weight, x)
        on_integers = weight is not None and x is not None and reason is None
        counts["int8" if on_integers else "float"] += 1
        reasons.update([reason] if reason else [])
        if not on_integers:
            if not _has_kernel(layer):
                continue
            if _is_of_pixels(layer):
                layer = _as_product(gm.graph, layer, changed)
            if not _is_worth_packing(layer):
                continue
        with gm.graph.inserting_before(layer.node):
            if weight is not None and x is not None and reason is None:
                last, post = _activated(layer, x.rows)
                lowering = _convolution if layer.convolution else _linear
                new = lowering(gm.graph, layer, weight, x, inputs, post)
            else:
                last, post = _activated(layer)
                new = _float(gm.graph, layer, post)
        replace_node(last, new)
        if last is not layer.node:
            gm.graph.erase_node(layer.node)
        changed.add(new)
    notes = [f"{n} layers with quantized inputs run on floats: {why}" for why, n in reasons.items()]
    return load_time_graph.Rewritten(changed, dict(counts), notes)


def _obstacle(layer: qdq.Layer, weight: qdq.Weight, x: qdq.Activation) -> str | None:
    """Say why a layer cannot run on integers."""
    if weight.number == "fp8":
        return "weights in fp8"
    if weight.group is not None:
        return f"weights with a scale for every {weight.group} inputs"
    if layer.convolution and x.rows:
        return "a convolution adds over rows, whose scales differ"
    if layer.convolution and x.node.meta["val"].dim() != layer.weight.meta["val"].dim():
        return "a convolution without a batch axis"
    return None


class _Inputs:
    """A body's quantized inputs in the form that kernels read, each inserted once."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        self._inputs: dict[tuple[fx.Node, bool], tuple[fx.Node, fx.Node]] = {}

    def unsigned(self, x: qdq.Activation, line: bool = False) -> tuple[fx.Node, fx.Node]:
        """Return unsigned numbers and their zero point; a `line` gets the axis of an image."""
        key = x.quantized, line
        if key not in self._inputs:
            graph = self._gm.graph
            with graph.inserting_before(x.quantized):
                unsigned = _unsigned_rows(graph, x) if x.rows else _unsigned(graph, x, line)
                self._inputs[key] = unsigned
        return self._inputs[key]


def _unsigned(graph: fx.Graph, x: qdq.Activation, line: bool) -> tuple[fx.Node, fx.Node]:
    zero = g.call(graph, aten.add.Tensor, x.zero, _UNSIGNED)
    source = g.call(graph, aten.unsqueeze.default, x.source, 2) if line else x.source
    limits = (x.scale, zero, 0, 255, torch.uint8)
    return g.call(graph, qd.quantize_per_tensor.tensor, source, *limits), zero


def _unsigned_rows(graph: fx.Graph, x: qdq.Activation) -> tuple[fx.Node, fx.Node]:
    """Return the same of rows that have scales of their own, in plain operators."""
    q = insert(graph, qdq.rounded_rows, x.quantized, _UNSIGNED)
    return q, _full(graph, [1], _UNSIGNED, torch.int32)


def _linear(
    graph: fx.Graph,
    layer: qdq.Layer,
    weight: qdq.Weight,
    x: qdq.Activation,
    inputs: _Inputs,
    post: _Post,
) -> fx.Node:
    shape, dtype = x.node.meta["val"].shape, layer.node.meta["val"].dtype
    rows = [math.prod(shape[:-1]), shape[-1]]
    packed = _packed(graph, onednn.qlinear_prepack.default, weight.values, rows)
    zeros = _zeros(graph, weight)
    q, zero = inputs.unsigned(x)
    if not x.rows:
        start: tuple[Any, ...] = (q, x.scale, zero, packed, weight.scales, zeros)
        end: tuple[Any, ...] = (_bias(graph, layer), 1.0, 0, _computed(dtype), *post)
        result = g.call(graph, onednn.qlinear_pointwise.tensor, *start, *end, like=layer.node)
        return g.to_dtype(graph, result, dtype)
    one = _full(graph, [1], 1.0, torch.float32)
    start = (q, one, zero, packed, weight.scales, zeros)
    end = (None, 1.0, 0, torch.float32, *post)
    product = g.call(graph, onednn.qlinear_pointwise.tensor, *start, *end, like=layer.node)
    result = g.call(graph, aten.mul.Tensor, product, x.scale)
    if layer.bias is not None:
        result = g.call(graph, aten.add.Tensor, result, _bias(graph, layer))
    return g.to_dtype(graph, result, dtype)


def _convolution(
    graph: fx.Graph,
    layer: qdq.Layer,
    weight: qdq.Weight,
    x: qdq.Activation,
    inputs: _Inputs,
    post: _Post,
) -> fx.Node:
    rank, dtype = layer.weight.meta["val"].dim(), layer.node.meta["val"].dtype
    sizes = _geometry(layer)
    values = weight.values
    if rank == 3:  # kernels have two axes or more
        values = g.call(graph, aten.unsqueeze.default, values, 2)
    q, zero = inputs.unsigned(x, line=rank == 3)
    unpacked = (values, weight.scales, 1.0, _UNSIGNED, *sizes, list(q.meta["val"].shape))
    packed = _packed(graph, onednn.qconv_prepack.default, *unpacked)
    start = (q, x.scale, zero, packed, weight.scales, _zeros(graph, weight), _bias(graph, layer))
    end: tuple[Any, ...] = (*sizes, 1.0, 0, _computed(dtype), *post)
    result = g.call(graph, onednn.qconv_pointwise.tensor, *start, *end, like=layer.node)
    if rank == 3:
        result = g.call(graph, aten.squeeze.dim, result, 2)
    return g.to_dtype(graph, result, dtype)


def _is_of_pixels(layer: qdq.Layer) -> bool:
    """Tell whether a layer is a convolution that multiplies each pixel by a matrix."""
    if not layer.convolution:
        return False
    stride, padding, _, groups = conv_geometry(layer.node)
    kernel = layer.weight.meta["val"].shape[2:]
    return (*kernel, *stride, *padding, groups) == (1, 1, 1, 1, 0, 0, 1)


def _as_product(graph: fx.Graph, layer: qdq.Layer, changed: set[fx.Node]) -> qdq.Layer:
    """Put a matrix product in place of a convolution of single pixels.

    Kernels of packed convolutions read and write channels last, where it needs no copy.
    """
    with graph.inserting_before(layer.node):
        x = g.call(graph, aten.permute.default, layer.x, [0, 2, 3, 1])
        weight = g.call(graph, aten.squeeze.dims, layer.weight, [2, 3])
        product = g.call(graph, aten.linear.default, x, weight, layer.bias, like=layer.node)
        image = g.call(graph, aten.permute.default, product, [0, 3, 1, 2])
    replace_node(layer.node, image)
    changed.add(image)
    return qdq.Layer(product, x, weight, layer.bias, convolution=False)


def _has_kernel(layer: qdq.Layer) -> bool:
    """Tell whether a layer on floats has a kernel for a packed weight."""
    weight, dtype = layer.weight.meta["val"], layer.node.meta["val"].dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return False
    return not layer.convolution or weight.dim() == layer.x.meta["val"].dim() == 4


def _is_worth_packing(layer: qdq.Layer) -> bool:
    """Tell whether a layer on floats is faster with the kernel for a packed weight."""
    result = layer.node.meta["val"]
    if layer.convolution or result.dtype != torch.float32:
        return True
    return bool(result.numel() * layer.weight.meta["val"].shape[1] >= _WORTH_PACKING)


def _activated(layer: qdq.Layer, rows: bool = False) -> tuple[fx.Node, _Post]:
    """Return the activation function that follows a layer, or the layer, and what a kernel does.

    Results are multiplied by the scales of `rows` behind the kernel, so nothing can follow in it.
    """
    users, dtype = list(layer.node.users), layer.node.meta["val"].dtype
    if len(users) == 1 and not rows and dtype == _computed(dtype):
        if is_call(users[0], aten.gelu.default):
            return users[0], ("gelu", [], argument(users[0], 1, "approximate", "none"))
        if is_call(users[0], aten.silu.default):
            return users[0], ("swish", [], "")
    return layer.node, _NO_POST


def _float(graph: fx.Graph, layer: qdq.Layer, post: _Post) -> fx.Node:
    shape, like = layer.x.meta["val"].shape, layer.node
    if not layer.convolution:
        rows = math.prod(shape[:-1])
        packed = _packed(graph, mkldnn._reorder_linear_weight.default, layer.weight, rows)
        arguments: tuple[Any, ...] = (layer.x, packed, layer.bias)
        return g.call(graph, mkldnn._linear_pointwise.default, *arguments, *post, like=like)
    stride, padding, dilation, groups = _geometry(layer)
    sizes = (padding, stride, dilation, groups)
    target = mkldnn._reorder_convolution_weight.default
    packed = _packed(graph, target, layer.weight, *sizes, list(shape))
    arguments = (layer.x, packed, layer.bias, *sizes)
    return g.call(graph, mkldnn._convolution_pointwise.default, *arguments, *post, like=like)


def _geometry(layer: qdq.Layer) -> tuple[list[int], list[int], list[int], int]:
    """Return a convolution's geometry in two dimensions or more; a first one is left as it is."""
    stride, padding, dilation, groups = conv_geometry(layer.node)
    if len(stride) == 1:
        stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
    return stride, padding, dilation, groups


def _packed(graph: fx.Graph, target: Any, values: fx.Node, *arguments: Any) -> fx.Node:
    """Insert a packed weight. To a graph it is a plain tensor: its layout is for kernels alone.

    It counts as contiguous, whatever the weight's layout: a compiler would transpose another one.
    """
    node = graph.call_function(target, (values, *arguments))
    weight = values.meta["val"]
    with g.FAKE_MODE:
        is_transposed = target is onednn.qlinear_prepack.default
        packed = torch.empty(weight.shape, dtype=weight.dtype)
        node.meta["val"] = packed.t() if is_transposed else packed
    return node


def _zeros(graph: fx.Graph, weight: qdq.Weight) -> fx.Node:
    return _full(graph, list(weight.scales.meta["val"].shape), 0, torch.int32)


def _full(graph: fx.Graph, shape: list[int], value: float, dtype: torch.dtype) -> fx.Node:
    return g.call(graph, aten.full.default, shape, value, dtype=dtype)


def _bias(graph: fx.Graph, layer: qdq.Layer) -> fx.Node | None:
    return layer.bias if layer.bias is None else g.to_dtype(graph, layer.bias, torch.float32)


def _computed(dtype: torch.dtype) -> torch.dtype:
    """Return the type of a kernel's results: kernels lack some."""
    return dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32


# The compiler


@contextmanager
def kernels() -> Iterator[None]:
    """Let the compiler accept packed weights as arguments; its own rules want constants."""
    from torch._inductor import lowering, mkldnn_ir

    rules = {onednn.qlinear_pointwise.tensor: _rule(mkldnn_ir.QLinearPointwisePT2E, 3)}
    products = ((mkldnn_ir.LinearUnary, 1, "default"), (mkldnn_ir.LinearBinary, 2, "binary"))
    for kernel, at, overload in products:
        target = getattr(mkldnn._linear_pointwise, overload)
        if target in lowering.lowerings:
            rules[target] = _rule(kernel, at, lowering.lowerings[target])
    with mock.patch.dict(lowering.lowerings, rules):
        yield


def _rule(kernel: Any, at: int, known: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Return how the compiler is to call a kernel on matrices.

    Args:
        kernel: The compiler's class for it.
        at: Which argument is the weight.
        known: The compiler's own rule, for weights that are constants.
    """
    from torch._inductor.ir import TensorBox
    from torch._inductor.lowering import view
    from torch._inductor.virtualized import V

    def lower_call(x: Any, *arguments: Any) -> Any:
        if known is not None and arguments[at - 1].get_name() in V.graph.constants:
            return known(x, *arguments)
        sizes = x.get_size()
        matrices = [x, *arguments[: at - 1]] if known is not None else [x]
        flat = [view(m, [-1, m.get_size()[-1]]) if len(sizes) != 2 else m for m in matrices]
        result = TensorBox.create(kernel.create(*flat, *arguments[len(matrices) - 1 :]))
        return view(result, [*sizes[:-1], result.get_size()[-1]]) if len(sizes) != 2 else result

    return lower_call
