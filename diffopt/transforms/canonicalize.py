"""Remove operators that return an argument unchanged, and merge chains of views."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.analysis.axis_rules import permutation
from diffopt.ir import graph as g
from diffopt.ir.aliasing import storage_owner
from diffopt.ir.nodes import (
    args,
    argument,
    is_call,
    same_layout,
    stored_tensor,
)
from diffopt.ir.op_sets import COPIES, PERMUTES, SPLITS, STRIDED, VIEWS

aten = torch.ops.aten

# Each returns its first argument's values whenever type, shape and strides are the argument's.
_LAYOUT = {
    *(aten.alias.default, aten.detach.default, aten.lift.default, aten.lift_fresh.default),
    *(aten.lift_fresh_copy.default, aten.clone.default, aten.contiguous.default),
    *(aten._to_copy.default, aten.to.device, aten.to.dtype, aten.to.dtype_layout, aten.to.other),
    *(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.view_as.default),
    *(aten.reshape_as.default, aten.expand.default, aten.expand_as.default, aten.type_as.default),
    *(aten.broadcast_to.default, aten.slice.Tensor, aten.narrow.default, aten.repeat.default),
    *(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.positive.default),
    *(aten.flatten.using_ints, aten.unflatten.int),
}
_DROPOUTS = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default}


def identity_source(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Return the argument that a node returns unchanged; None if it computes something."""
    if node.op != "call_function" or not node.args:
        return None
    if any(is_call(user, *STRIDED) for user in node.users):
        return None  # a copy has memory of its own
    for rule in (_same_layout, _only_chunk, _eval_dropout, _cast_and_back, _neutral, _not_permuted):
        source = rule(gm, node)
        # vmap leaves operators on bare numbers behind.
        if isinstance(source, fx.Node) and same_layout(node, source):
            return source
    return None


def _same_layout(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    if node.target in (aten.constant_pad_nd.default, aten.pad.default):
        return args(node)[0] if not any(args(node)[1]) else None
    if is_call(node, aten.cat.default) and len(args(node)[0]) == 1:
        operand: fx.Node = args(node)[0][0]
        return operand
    return args(node)[0] if node.target in _LAYOUT else None


def _only_chunk(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    whole = args(node)[0]
    if not is_call(node, operator.getitem) or not is_call(whole, *SPLITS):
        return None
    return args(whole)[0] if len(whole.meta["val"]) == 1 else None


def _eval_dropout(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    whole = args(node)[0]
    if node.target in _DROPOUTS:
        return whole if args(node)[2] is False else None
    if is_call(node, operator.getitem) and is_call(whole, aten.native_dropout.default):
        return args(whole)[0] if args(node)[1] == 0 and args(whole)[2] is False else None
    return None


def _cast_and_back(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Match a cast to a type that represents every value of the first one, and back."""
    inner = args(node)[0]
    if not is_call(node, aten._to_copy.default) or not is_call(inner, aten._to_copy.default):
        return None
    source: fx.Node = args(inner)[0]
    narrow, wide = source.meta["val"].dtype, inner.meta["val"].dtype
    if any(dtype.is_floating_point and dtype.itemsize == 1 for dtype in (narrow, wide)):
        return None  # torch has no promotion for the floats of 8 bits
    if narrow == wide or torch.promote_types(narrow, wide) != wide or narrow == torch.bool:
        return None
    # Promotion is no promise for integers: int64 and float32 promote to float32.
    if wide.is_floating_point and not narrow.is_floating_point:
        return None
    return source


def _neutral(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Match arithmetic with a neutral element; x + 0.0 is none, since -0.0 + 0.0 is 0.0."""
    if node.target in (aten.mul.Tensor, aten.mul.Scalar):
        one, other = args(node)[:2]
        if _holds(gm, other, lambda c: c == 1):
            return one if isinstance(one, fx.Node) else None
        return other if isinstance(other, fx.Node) and _holds(gm, one, lambda c: c == 1) else None
    if node.target in (aten.div.Tensor, aten.div.Scalar):
        return args(node)[0] if _holds(gm, args(node)[1], lambda c: c == 1) else None
    if node.target is aten.pow.Tensor_Scalar:
        return args(node)[0] if args(node)[1] == 1 else None
    signs = {
        aten.sub.Tensor: False,
        aten.sub.Scalar: False,
        aten.add.Tensor: True,
        aten.add.Scalar: True,
    }
    if node.target not in signs or argument(node, 2, "alpha", 1) != 1:
        return None
    negative = signs[node.target]
    dtype = node.meta["val"].dtype
    exact = not (dtype.is_floating_point or dtype.is_complex)

    def is_zero(c: Tensor) -> Tensor:
        return (c == 0) & (exact | (torch.signbit(c) == negative))

    return args(node)[0] if _holds(gm, args(node)[1], is_zero) else None


def _not_permuted(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    if node.target not in PERMUTES:
        return None
    order = permutation(node)
    return args(node)[0] if order == list(range(len(order))) else None


def _holds(gm: fx.GraphModule, value: Any, check: Callable[[Tensor], Any]) -> bool:
    """Tell whether a number, or every value of a constant, passes a check."""
    if isinstance(value, (bool, int, float)):
        return bool(check(torch.tensor(value)))
    tensor = stored_tensor(gm, value)
    if gm._modules:
        # The pipeline's constants belong to its steps: where one happens to be neutral, dropping it
        # would make that step unlike the others, with which it is to share a body.
        return False
    if tensor is None or tensor.numel() == 0 or tensor.is_complex():
        return False
    # The first value settles it for almost all weights.
    return bool(check(tensor.flatten()[0])) and bool(torch.as_tensor(check(tensor)).all())


# Views


def collapse_views(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Return the source or the one view that replaces a chain of views; None if there is none.

    A view is determined by its dtype, shape, strides and offset into its storage.
    """
    chain = _chain(node)
    if len(chain) < 2:
        return None
    for start in range(len(chain) - 1):
        source = args(chain[start])[0]
        value = source.meta["val"]
        for link in chain[start:]:
            value = g.fake_call(link.target, (value, *args(link)[1:]), link.kwargs)
        if g.memory_layout(value) == g.memory_layout(source.meta["val"]):
            return source if isinstance(source, fx.Node) else None
        if len(chain) - start >= 2:
            shorter = _as_one(node, chain[start:], source, value)
            if shorter is not None:
                return shorter
    return None


def _chain(node: fx.Node) -> list[fx.Node]:
    """Return the chain of views that ends in `node`, the first one first."""
    chain: list[fx.Node] = []
    while node.op == "call_function" and node.target in VIEWS and _is_view(node):
        chain.insert(0, node)
        node = args(node)[0]
    return chain


def _is_view(node: fx.Node) -> bool:
    if node.target not in (aten.reshape.default, aten._unsafe_view.default):
        return True
    source = args(node)[0].meta["val"]
    value = g.fake_call(node.target, (source, *args(node)[1:]))
    return bool(value.untyped_storage()._cdata == source.untyped_storage()._cdata)


def _as_one(node: fx.Node, chain: list[fx.Node], source: fx.Node, value: Tensor) -> fx.Node | None:
    targets = {link.target for link in chain}
    shape = list(value.shape)
    candidates: list[tuple[Any, list[int]]] = []
    if targets <= {*PERMUTES}:
        order = list(range(value.dim()))
        for link in chain:
            order = [order[d] for d in permutation(link)]
        candidates.append((aten.permute.default, order))
    elif targets == {aten.expand.default}:
        candidates.append((aten.expand.default, shape))
    elif aten.slice.Tensor not in targets and aten.select.int not in targets:
        candidates.append((aten.view.default, shape))
    for target, numbers in candidates:
        try:
            single = g.fake_call(target, (source, numbers))
        except (RuntimeError, ValueError):
            continue  # this shape is no view of the source
        if g.memory_layout(single) == g.memory_layout(value):
            with node.graph.inserting_before(node):
                return g.call(node.graph, target, source, numbers, like=node)
    return None


def keeps_output_apart(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether `node` copies an output that would share memory with others without it."""
    if node.target not in COPIES:
        return False
    if all(n.op != "placeholder" for n in g.ancestors([node])):
        return True  # a constant, which is stored
    if identity_source(gm, node) is None:
        return False
    base = storage_owner(args(node)[0])
    others = [n for n in g.outputs(gm) if n is not node]
    return base.op != "call_function" or any(storage_owner(n) is base for n in others)
