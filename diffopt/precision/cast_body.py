"""Rewrite a body to a dtype plan: casts where dtypes change, weights in the type that is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.analysis.dtype_regions import DtypePlan, is_float
from diffopt.ir import graph as g
from diffopt.ir import weight_origins
from diffopt.ir.nodes import args, is_call, stored_tensor
from diffopt.ir.program import Program
from diffopt.ir.propagation import infer_or_reshape
from diffopt.ir.step_tables import is_view

aten = torch.ops.aten
qd = torch.ops.quantized_decomposed

_DEQUANTIZE = (
    qd.dequantize_per_tensor.tensor,
    qd.dequantize_per_channel.default,
    qd.dequantize_per_channel_group.default,
    qd.dequantize_per_token.default,
)
# A dtype among their arguments is that of the model, no request for more digits.
_MODEL_DTYPE = {
    *(aten._to_copy.default, aten.to.dtype, aten.zeros_like.default, aten.ones_like.default),
    *(aten.full_like.default, aten.new_zeros.default, aten.new_ones.default),
    *(aten.new_full.default, aten.empty_like.default),
}


class LowWeights:
    """Convert weights to the low type, each once for all bodies."""

    def __init__(self, low: torch.dtype) -> None:
        self.low = low
        self._converted: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return a weight or constant in the low type."""
        if id(tensor) not in self._converted:
            new = tensor.detach().to(self.low)
            if isinstance(tensor, torch.nn.Parameter):
                new = torch.nn.Parameter(new, requires_grad=False)
            else:
                # A mask's most negative number has to stay one: two of them would give nan.
                limit = torch.finfo(self.low).max
                finite = tensor.isfinite() & ~new.isfinite()
                new = torch.where(finite, new.clamp(-limit, limit), new)
            weight_origins.record(new, weight_origins.origin_of(tensor))
            self._converted[id(tensor)] = tensor, new
        return self._converted[id(tensor)][1]


def cast_body(plan: DtypePlan, weights: LowWeights) -> fx.GraphModule:
    """Return a copy of a body with the dtypes of a plan; nodes keep their names."""
    copy = g.clone(plan.body)
    _Caster(plan, copy, weights).run()
    g.prune_unused(copy)
    copy.recompile()
    return copy


class _Caster:
    def __init__(self, plan: DtypePlan, body: fx.GraphModule, weights: LowWeights) -> None:
        self.plan, self.body, self.low, self.weights = plan, body, plan.low, weights
        copies = dict(zip(plan.body.graph.nodes, body.graph.nodes, strict=True))
        self.all_float32 = {copies[n] for n in plan.all_float32()}
        self.layers = {copies[n] for n in plan.layers}
        self.low_arguments = {copies[n] for n in plan.low_arguments}
        self.float_nodes = {n for n in body.graph.nodes if is_float(n)}
        self.retyped: set[fx.Node] = set()
        self.converted: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        self.first = next(n for n in body.graph.nodes if n.op != "placeholder")

    def run(self) -> None:
        """Rewrite every node, in order, to read its arguments in one type."""
        for node in self.low_arguments:
            value = node.meta["val"]
            node.meta["val"] = g.fake(value, self.low)
            self.retyped.add(node)
        for node in list(self.body.graph.nodes):
            if node.op == "call_function":
                self._retype(node)
        outputs = []
        for index, node in enumerate(g.outputs(self.body)):
            dtype = self.low if index in self.plan.low_results else torch.float32
            outputs.append(self._cast(node, dtype) if node in self.float_nodes else node)
        g.set_outputs(self.body, outputs)

    def _retype(self, node: fx.Node) -> None:
        arguments = node.args, node.kwargs
        dtype = self._compute_dtype(node)
        if dtype is not None:
            self._cast_arguments(node, dtype, scalars=False)
        is_same = (node.args, node.kwargs) == arguments
        if is_same and self.retyped.isdisjoint(node.all_input_nodes):
            return
        try:
            value = infer_or_reshape(node)
            if dtype == self.low and _widens(value, node.meta["val"], self.low):
                self._cast_arguments(node, dtype, scalars=True)
                value = infer_or_reshape(node)
        except (RuntimeError, ValueError, TypeError):
            node.args, node.kwargs = arguments  # the operator has no such type
            self._cast_arguments(node, torch.float32, scalars=True)
            value = infer_or_reshape(node)
        node.meta["val"] = value
        self.retyped.add(node)

    def _compute_dtype(self, node: fx.Node) -> torch.dtype | None:
        """Return the type that a node computes in; None: that of its arguments."""
        if is_call(node, qd.quantize_per_tensor.tensor) or node.target in _DEQUANTIZE:
            return None
        if node in self.all_float32:
            return torch.float32
        types = {_dtype(n) for n in node.all_input_nodes if n in self.float_nodes} - {None}
        if node not in self.float_nodes:
            parts = node.meta["val"]
            parts = parts if isinstance(parts, (list, tuple)) else [parts]
            exact = (torch.complex64, torch.complex128, torch.float64)
            needs = any(isinstance(part, Tensor) and part.dtype in exact for part in parts)
            return torch.float32 if needs or len(types) > 1 else None
        return self.low if node in self.layers or self.low in types else None

    def _cast_arguments(self, node: fx.Node, dtype: torch.dtype, scalars: bool) -> None:
        """Cast a node's arguments, and the dtypes among them, to one type."""

        def cast_argument(source: fx.Node) -> fx.Node:
            if source not in self.float_nodes or not isinstance(source.meta["val"], Tensor):
                return source
            # A 0-dimensional tensor does not promote others: it can keep all of its bits.
            is_scalar = source.meta["val"].dim() == 0 and source.meta["val"].dtype != self.low
            if (
                is_scalar
                and not scalars
                and torch.Tag.pointwise in getattr(node.target, "tags", ())
            ):
                return source
            return self._cast(source, dtype)

        node.args = fx.map_arg(node.args, cast_argument)
        node.kwargs = fx.map_arg(node.kwargs, cast_argument)
        if dtype == self.low and node.target in _MODEL_DTYPE:
            node.args = tuple(self.low if a is torch.float32 else a for a in node.args)
            kwargs = {k: self.low if v is torch.float32 else v for k, v in node.kwargs.items()}
            node.kwargs = kwargs

    def _cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """Return a value in a type; it is cast once for all readers."""
        if _dtype(node) in (dtype, None):
            return node
        if (node, dtype) not in self.converted:
            result = self._convert(node) if dtype == self.low else None
            if result is None:
                with self._after(node):
                    result = g.call(
                        self.body.graph, aten._to_copy.default, node, dtype=dtype, like=node
                    )
            self.converted[node, dtype] = result
            self.float_nodes.add(result)
            self.retyped.add(result)
        return self.converted[node, dtype]

    def _convert(self, node: fx.Node) -> fx.Node | None:
        """Return a value that is produced in the low type, with no cast; None if it cannot be."""
        graph = self.body.graph
        tensor = stored_tensor(self.body, node)
        if tensor is not None:
            with self._after(node):
                constant = g.get_attr(self.body, str(node.target), self.weights(tensor))
            constant.meta = {**node.meta, "val": constant.meta["val"]}
            return constant
        if node.target in _DEQUANTIZE:
            return self._copy_with(node, node.args, {**node.kwargs, "out_dtype": self.low})
        is_wide = is_call(node, aten._to_copy.default) and node.kwargs == {"dtype": torch.float32}
        if is_wide and _dtype(args(node)[0]) == torch.float32:
            with self._after(node):
                return g.call(graph, node.target, args(node)[0], dtype=self.low, like=node)
        base = self._viewed(node)
        if is_view(node) and (base.op != "call_function" or base.target in _DEQUANTIZE):
            source, *rest = args(node)
            return self._copy_with(node, (self._in_low_type(source), *rest), node.kwargs)
        return None

    def _copy_with(self, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> fx.Node:
        """Insert a node's operator with other arguments behind it."""
        if node.target is qd.dequantize_per_channel_group.default:
            args, kwargs = (*args[:6], args[6], self.low), {}
        elif node.target is qd.dequantize_per_token.default:
            args, kwargs = (*args[:6], self.low), {}
        with self._after(node):
            return g.call(self.body.graph, node.target, *args, like=node, **kwargs)

    def _in_low_type(self, node: fx.Node) -> fx.Node:
        """Return a value, or the results of a split, in the low type."""
        if isinstance(node.meta["val"], Tensor):
            return self._cast(node, self.low)
        if (node, self.low) not in self.converted:
            source, *rest = args(node)
            result = self._copy_with(node, (self._in_low_type(source), *rest), node.kwargs)
            self.converted[node, self.low] = result
            self.retyped.add(result)
        return self.converted[node, self.low]

    def _viewed(self, node: fx.Node) -> fx.Node:
        """Return the base of a view: casting it once is cheaper than casting each of its slices."""
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
    """Update the metadata of calls to the results that components have now."""
    for call in program.calls():
        outputs = g.outputs(program.components[str(call.target)])
        call.meta["val"] = tuple(n.meta["val"] for n in outputs)
        for user in call.users:
            user.meta["val"] = call.meta["val"][args(user)[1]]
