"""Writes types into a body: casts where they change, weights in the type that they are read in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.analysis.dtype_regions import Cut, is_float
from diffopt.ir import graph as g
from diffopt.ir.nodes import args, calls, stored
from diffopt.ir.program import Program
from diffopt.ir.propagation import propagate
from diffopt.ir.step_tables import is_view

aten = torch.ops.aten
qd = torch.ops.quantized_decomposed

_DEQUANTIZE = (
    qd.dequantize_per_tensor.tensor,
    qd.dequantize_per_channel.default,
    qd.dequantize_per_channel_group.default,
    qd.dequantize_per_token.default,
)
# A dtype among their arguments is that of the model: it does not ask for more digits.
_FOLLOW = {
    *(aten._to_copy.default, aten.to.dtype, aten.zeros_like.default, aten.ones_like.default),
    *(aten.full_like.default, aten.new_zeros.default, aten.new_ones.default),
    *(aten.new_full.default, aten.empty_like.default),
}


class Weights:
    """Weights in the low type: each is converted once, for all bodies."""

    def __init__(self, low: torch.dtype) -> None:
        self.low = low
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return a weight or constant in the low type."""
        if id(tensor) not in self._made:
            new = tensor.detach().to(self.low)
            if isinstance(tensor, torch.nn.Parameter):
                new = torch.nn.Parameter(new, requires_grad=False)
            else:
                # A mask's most negative number has to stay one: two of them would give nan.
                limit = torch.finfo(self.low).max
                finite = tensor.isfinite() & ~new.isfinite()
                new = torch.where(finite, new.clamp(-limit, limit), new)
            self._made[id(tensor)] = tensor, new
        return self._made[id(tensor)][1]


def cast_body(cut: Cut, weights: Weights) -> fx.GraphModule:
    """Return a copy of a body with the types of a cut; nodes keep their names."""
    copy = g.clone(cut.body)
    _Caster(cut, copy, weights).run()
    g.prune_unused(copy)
    copy.recompile()
    return copy


class _Caster:
    def __init__(self, cut: Cut, body: fx.GraphModule, weights: Weights) -> None:
        self.cut, self.body, self.low, self.weights = cut, body, cut.low, weights
        own = dict(zip(cut.body.graph.nodes, body.graph.nodes, strict=True))
        self.kept = {own[n] for n in cut.kept()}
        self.layers = {own[n] for n in cut.layers}
        self.takes = {own[n] for n in cut.takes}
        self.floats = {n for n in body.graph.nodes if is_float(n)}
        self.changed: set[fx.Node] = set()
        self.made: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        self.first = next(n for n in body.graph.nodes if n.op != "placeholder")

    def run(self) -> None:
        """Go through the graph, and give every node what it reads in one type."""
        for node in self.takes:
            value = node.meta["val"]
            strides = tuple(value.shape), tuple(value.stride())
            node.meta["val"] = g.fake(torch.empty_strided(*strides, dtype=self.low))
            self.changed.add(node)
        for node in list(self.body.graph.nodes):
            if node.op == "call_function":
                self._retype(node)
        outputs = []
        for index, node in enumerate(g.outputs(self.body)):
            dtype = self.low if index in self.cut.gives else torch.float32
            outputs.append(self._cast(node, dtype) if node in self.floats else node)
        g.set_outputs(self.body, outputs)

    def _retype(self, node: fx.Node) -> None:
        given = node.args, node.kwargs
        dtype = self._type(node)
        if dtype is not None:
            self._give(node, dtype, scalars=False)
        is_same = (node.args, node.kwargs) == given
        if is_same and self.changed.isdisjoint(node.all_input_nodes):
            return
        try:
            value = propagate(node)
            if dtype == self.low and _widens(value, node.meta["val"], self.low):
                self._give(node, dtype, scalars=True)
                value = propagate(node)
        except (RuntimeError, ValueError, TypeError):
            node.args, node.kwargs = given  # the operator has no such type
            self._give(node, torch.float32, scalars=True)
            value = propagate(node)
        node.meta["val"] = value
        self.changed.add(node)

    def _type(self, node: fx.Node) -> torch.dtype | None:
        """Return in which type a node computes; None: in that of what it reads."""
        if calls(node, qd.quantize_per_tensor.tensor) or node.target in _DEQUANTIZE:
            return None
        if node in self.kept:
            return torch.float32
        types = {_dtype(n) for n in node.all_input_nodes if n in self.floats} - {None}
        if node not in self.floats:
            parts = node.meta["val"]
            parts = parts if isinstance(parts, (list, tuple)) else [parts]
            exact = (torch.complex64, torch.complex128, torch.float64)
            needs = any(isinstance(part, Tensor) and part.dtype in exact for part in parts)
            return torch.float32 if needs or len(types) > 1 else None
        return self.low if node in self.layers or self.low in types else None

    def _give(self, node: fx.Node, dtype: torch.dtype, scalars: bool) -> None:
        """Make a node read values, and say types, in one type."""

        def given(source: fx.Node) -> fx.Node:
            if source not in self.floats or not isinstance(source.meta["val"], Tensor):
                return source
            # A tensor of one number does not promote others, and may keep all of its bits.
            is_scalar = source.meta["val"].dim() == 0 and source.meta["val"].dtype != self.low
            if (
                is_scalar
                and not scalars
                and torch.Tag.pointwise in getattr(node.target, "tags", ())
            ):
                return source
            return self._cast(source, dtype)

        node.args = fx.map_arg(node.args, given)
        node.kwargs = fx.map_arg(node.kwargs, given)
        if dtype == self.low and node.target in _FOLLOW:
            node.args = tuple(self.low if a is torch.float32 else a for a in node.args)
            kwargs = {k: self.low if v is torch.float32 else v for k, v in node.kwargs.items()}
            node.kwargs = kwargs

    def _cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """Return a value in a type, which is made once."""
        if _dtype(node) in (dtype, None):
            return node
        if (node, dtype) not in self.made:
            made = self._convert(node) if dtype == self.low else None
            if made is None:
                with self._after(node):
                    made = g.call(
                        self.body.graph, aten._to_copy.default, node, dtype=dtype, like=node
                    )
            self.made[node, dtype] = made
            self.floats.add(made)
            self.changed.add(made)
        return self.made[node, dtype]

    def _convert(self, node: fx.Node) -> fx.Node | None:
        """Return a value in the low type where it can be made so, in place of cast."""
        graph = self.body.graph
        tensor = stored(self.body, node)
        if tensor is not None:
            with self._after(node):
                made = g.get_attr(self.body, str(node.target), self.weights(tensor))
            made.meta = {**node.meta, "val": made.meta["val"]}
            return made
        if node.target in _DEQUANTIZE:
            return self._copy(node, node.args, {**node.kwargs, "out_dtype": self.low})
        is_wide = calls(node, aten._to_copy.default) and node.kwargs == {"dtype": torch.float32}
        if is_wide and _dtype(args(node)[0]) == torch.float32:
            with self._after(node):
                return g.call(graph, node.target, args(node)[0], dtype=self.low, like=node)
        base = self._base(node)
        if is_view(node) and (base.op != "call_function" or base.target in _DEQUANTIZE):
            source, *rest = args(node)
            return self._copy(node, (self._lowered(source), *rest), node.kwargs)
        return None

    def _copy(self, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> fx.Node:
        """Insert the same operator with other arguments behind a node."""
        if node.target is qd.dequantize_per_channel_group.default:
            args, kwargs = (*args[:6], args[6], self.low), {}
        elif node.target is qd.dequantize_per_token.default:
            args, kwargs = (*args[:6], self.low), {}
        with self._after(node):
            return g.call(self.body.graph, node.target, *args, like=node, **kwargs)

    def _lowered(self, node: fx.Node) -> fx.Node:
        """Return a value, or the parts that a split gives, in the low type."""
        if isinstance(node.meta["val"], Tensor):
            return self._cast(node, self.low)
        if (node, self.low) not in self.made:
            source, *rest = args(node)
            made = self._copy(node, (self._lowered(source), *rest), node.kwargs)
            self.made[node, self.low] = made
            self.changed.add(made)
        return self.made[node, self.low]

    def _base(self, node: fx.Node) -> fx.Node:
        """Return what a value is a view of; casts of small parts are then one of the whole."""
        while is_view(node):
            node = args(node)[0]
        return node

    def _after(self, node: fx.Node) -> Any:
        graph = self.body.graph
        if node.op == "placeholder":
            return graph.inserting_before(self.first)
        return graph.inserting_after(node)


def _dtype(node: fx.Node) -> torch.dtype | None:
    value = node.meta["val"]
    return value.dtype if isinstance(value, Tensor) else None


def _widens(new: Any, old: Any, low: torch.dtype) -> bool:
    """Tell whether a value is still in float32."""
    return isinstance(new, Tensor) and new.dtype == old.dtype == torch.float32 != low


def update_calls(program: Program) -> None:
    """Record what components return now at their calls."""
    for call in program.calls():
        outputs = g.outputs(program.components[str(call.target)])
        call.meta["val"] = tuple(n.meta["val"] for n in outputs)
        for user in call.users:
            user.meta["val"] = call.meta["val"][args(user)[1]]
