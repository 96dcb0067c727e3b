"""Ancestors and descendants of a graph's nodes as bit sets, and the origins of values.

With a bit for each node, "between a and b" is one `&`; see `denoiser_structure` for the terms.
"""

import operator
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.ir import graph as g
from diffopt.ir import qdq
from diffopt.ir.op_sets import NORMS

aten = torch.ops.aten


def _packets(names: str) -> frozenset[Any]:
    return frozenset(getattr(aten, name) for name in names.split())


LAYERS = _packets(
    "linear conv1d conv2d conv3d convolution _convolution addmm mm conv_transpose1d "
    "conv_transpose2d conv_transpose3d"
)
_CONVOLUTIONS = _packets("conv1d conv2d conv3d convolution")
PRODUCTS = _packets("matmul bmm baddbmm einsum")
FUSED = _packets(
    "scaled_dot_product_attention _scaled_dot_product_flash_attention "
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention "
    "_scaled_dot_product_cudnn_attention"
)
_ACTIVATIONS = _packets(
    "gelu silu relu relu6 leaky_relu elu tanh sigmoid mish softplus hardswish hardtanh glu prelu"
)
_ARITHMETIC = _packets("add sub mul div")
_LAYOUT = _packets(
    "view _unsafe_view reshape permute transpose t clone contiguous alias detach _to_copy to "
    "type_as squeeze unsqueeze expand flatten unflatten dropout pixel_shuffle pixel_unshuffle "
    "avg_pool1d avg_pool2d avg_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d"
)
_PIECES = _packets("slice narrow split split_with_sizes chunk unsafe_chunk")


def packet(node: fx.Node) -> Any:
    """Return the operator that a node calls, whichever overload."""
    return getattr(node.target, "overloadpacket", node.target)


def shape(node: fx.Node) -> tuple[int, ...] | None:
    """Return a value's shape; None if it is no tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _mixes_space(node: fx.Node) -> bool:
    """Tell whether a node is a convolution with a kernel, and not one for each channel alone."""
    if packet(node) not in _CONVOLUTIONS:
        return False
    weight = shape(node.args[1]) if isinstance(node.args[1], fx.Node) else None
    return weight is not None and weight[1] > 1 and any(size > 1 for size in weight[2:])


def _part_of(node: fx.Node) -> fx.Node | None:
    """Return the tensor of which a value is a slice, quantized or not; None if it is no slice."""
    if (quantized := qdq.activation(node)) is not None:
        return quantized.source
    is_part = packet(node) in _PIECES or node.target is operator.getitem
    return node.all_input_nodes[0] if is_part else None


class Reach:
    """A body's nodes with their ancestors and descendants as bit sets (Python integers).

    Attributes:
        index: A node's place in the graph, which is its bit.
        ancestors: A node and its ancestors.
        descendants: A node and its descendants.
        loop_variant: All that depends on loop-variant arguments and that an output depends on.
        layers: Matrix products, convolutions and fused attentions.
        spatial: Convolutions with a kernel over mixed channels.
        nonlinear: Activation functions, norms and fused attentions.
    """

    def __init__(self, body: fx.GraphModule, loop_variant: Collection[fx.Node]) -> None:
        self.nodes = list(body.graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.ancestors: dict[fx.Node, int] = {}
        self.descendants = {node: 1 << i for i, node in enumerate(self.nodes)}
        for i, node in enumerate(self.nodes):
            self.ancestors[node] = 1 << i
            for source in node.all_input_nodes:
                self.ancestors[node] |= self.ancestors[source]
        for node in reversed(self.nodes):
            for source in node.all_input_nodes:
                self.descendants[source] |= self.descendants[node]
        end = g.output_node(body)
        self.loop_variant = 0
        for node in loop_variant:
            self.loop_variant |= self.descendants[node]
        self.loop_variant &= self.ancestors[end] & ~self.bits([end])
        self.arguments = self.bits(g.placeholders(body))
        self.layers = self.calling(LAYERS | PRODUCTS | FUSED)
        self.spatial = self.bits(n for n in self.nodes if _mixes_space(n))
        self.activations = self.calling(_ACTIVATIONS)
        self.nonlinear = self.activations | self.calling(NORMS | FUSED | {aten.rsqrt})

    def bits(self, nodes: Iterable[fx.Node]) -> int:
        """Return a bit set of nodes."""
        result = 0
        for node in nodes:
            result |= 1 << self.index[node]
        return result

    def calling(self, packets: Collection[Any]) -> int:
        """Return the nodes that call one of these operators."""
        return self.bits(n for n in self.nodes if packet(n) in packets)

    def is_loop_variant(self, node: fx.Node) -> bool:
        """Tell whether a node's value changes from step to step of the sampling loop."""
        return bool(self.loop_variant >> self.index[node] & 1)

    def between(self, a: fx.Node, b: fx.Node) -> int:
        """Return the nodes on the paths from `a` (excluded) to `b` (included)."""
        return self.descendants[a] & self.ancestors[b] & ~(1 << self.index[a])

    def loop_variant_inputs(self, node: fx.Node) -> list[fx.Node]:
        """Return the loop-variant nodes that a node reads."""
        return [n for n in node.all_input_nodes if self.is_loop_variant(n)]

    def origin(self, node: fx.Node) -> fx.Node | None:
        """Return the value that a node only lays out, casts, scales or offsets; else None."""
        kind, inputs = packet(node), self.loop_variant_inputs(node)
        if node.op != "call_function" or not inputs:
            return None
        if kind is aten.cat:
            return self._split_source(node)
        if (quantized := qdq.activation(node)) is not None:
            return quantized.source if self.is_loop_variant(quantized.source) else None
        if kind in _LAYOUT:
            return inputs[0] if inputs[0] is node.args[0] else None
        if kind not in _ARITHMETIC or node.args[0] is node.args[1]:
            return None
        if len(inputs) == 2 and kind is aten.add:
            # Features from outside (a ControlNet's) are an offset as well.
            outside = [n for n in inputs if not self.ancestors[n] & self.layers]
            inputs = [n for n in inputs if n not in outside]
        if len(inputs) != 1 or (kind is aten.div and inputs[0] is not node.args[0]):
            return None
        return inputs[0]

    def origins(self, node: fx.Node) -> Iterator[fx.Node]:
        """Yield a value and the chain of its origins, nearest first."""
        current: fx.Node | None = node
        while current is not None:
            yield current
            current = self.origin(current)

    def _split_source(self, cat: fx.Node) -> fx.Node | None:
        """Return the value whose slices a concatenation joins again; None if there is no one."""
        wholes = set()
        for piece in cat.all_input_nodes:
            while (part := _part_of(piece)) is not None:
                piece = part
            wholes.add(piece)
        whole = wholes.pop()
        return whole if not wholes and shape(whole) == shape(cat) else None
