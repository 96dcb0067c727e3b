"""A graph's nodes with their ancestors and descendants as bit sets, and what a value comes from.

With a bit for each node, "between a and b" is one `&`; see `anatomy` for the terms.
"""

import operator
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.ir import graph as g
from diffopt.ir import qdq

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
_NORMS = _packets("layer_norm group_norm rms_norm native_layer_norm native_group_norm rsqrt")
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
    """Return what a value is a part of, quantized or not; None if it is none."""
    if (quantized := qdq.activation(node)) is not None:
        return quantized.source
    is_part = packet(node) in _PIECES or node.target is operator.getitem
    return node.all_input_nodes[0] if is_part else None


class Walk:
    """A body's nodes with their ancestors and descendants as bit sets.

    Attributes:
        index: A node's place in the graph, which is its bit.
        above: A node and its ancestors.
        below: A node and its descendants.
        alive: All that depends on `changing` and that an output depends on.
    """

    def __init__(self, body: fx.GraphModule, changing: Collection[fx.Node]) -> None:
        self.nodes = list(body.graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.above: dict[fx.Node, int] = {}
        self.below = {node: 1 << i for i, node in enumerate(self.nodes)}
        for i, node in enumerate(self.nodes):
            self.above[node] = 1 << i
            for source in node.all_input_nodes:
                self.above[node] |= self.above[source]
        for node in reversed(self.nodes):
            for source in node.all_input_nodes:
                self.below[source] |= self.below[node]
        end = g.output_node(body)
        self.alive = 0
        for node in changing:
            self.alive |= self.below[node]
        self.alive &= self.above[end] & ~self.mask([end])
        self.arguments = self.mask(g.placeholders(body))
        self.layers = self.calls(LAYERS | PRODUCTS | FUSED)
        self.kernels = self.mask(n for n in self.nodes if _mixes_space(n))
        self.activations = self.calls(_ACTIVATIONS)
        self.nonlinear = self.activations | self.calls(_NORMS | FUSED)

    def mask(self, nodes: Iterable[fx.Node]) -> int:
        """Return a bit set of nodes."""
        bits = 0
        for node in nodes:
            bits |= 1 << self.index[node]
        return bits

    def calls(self, packets: Collection[Any]) -> int:
        """Return the nodes that call one of these operators."""
        return self.mask(n for n in self.nodes if packet(n) in packets)

    def lives(self, node: fx.Node) -> bool:
        """Tell whether a node changes with the latents."""
        return bool(self.alive >> self.index[node] & 1)

    def between(self, a: fx.Node, b: fx.Node) -> int:
        """Return the nodes on the paths from `a`, which is left out, to `b`."""
        return self.below[a] & self.above[b] & ~(1 << self.index[a])

    def living_inputs(self, node: fx.Node) -> list[fx.Node]:
        """Return the living nodes that a node reads."""
        return [n for n in node.all_input_nodes if self.lives(n)]

    def back(self, node: fx.Node) -> fx.Node | None:
        """Return what a value is with another layout, type, scale or offset; None if nothing."""
        kind, living = packet(node), self.living_inputs(node)
        if node.op != "call_function" or not living:
            return None
        if kind is aten.cat:
            return self._whole(node)
        if (quantized := qdq.activation(node)) is not None:
            return quantized.source if self.lives(quantized.source) else None
        if kind in _LAYOUT:
            return living[0] if living[0] is node.args[0] else None
        if kind not in _ARITHMETIC or node.args[0] is node.args[1]:
            return None
        if len(living) == 2 and kind is aten.add:
            # Features from outside (a ControlNet's) are an offset as well.
            outside = [n for n in living if not self.above[n] & self.layers]
            living = [n for n in living if n not in outside]
        if len(living) != 1 or (kind is aten.div and living[0] is not node.args[0]):
            return None
        return living[0]

    def trail(self, node: fx.Node) -> Iterator[fx.Node]:
        """Yield a value and all that it is with another layout, nearest first."""
        current: fx.Node | None = node
        while current is not None:
            yield current
            current = self.back(current)

    def _whole(self, cat: fx.Node) -> fx.Node | None:
        """Return the value of which a concatenation puts the pieces together again."""
        wholes = set()
        for piece in cat.all_input_nodes:
            while (part := _part_of(piece)) is not None:
                piece = part
            wholes.add(piece)
        whole = wholes.pop()
        return whole if not wholes and shape(whole) == shape(cat) else None
