"""Floating point operations of graphs and of single nodes, as torch's own counter has them."""

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from diffopt.ir.graph import FAKE_MODE

aten = torch.ops.aten


def graph_flops(gm: fx.GraphModule, own: Mapping[str, int] | None = None) -> int:
    """Return the floating point operations of one run: 2 a multiply-add.

    Matrix products, convolutions and attention count, as in torch's own counter. `own` gives the
    cost of the submodules that `gm` calls, by name.
    """
    total = 0
    for node in gm.graph.nodes:
        if node.op == "call_module" and own is not None:
            total += own[str(node.target)]
        elif node.op == "call_function" and node.target is not operator.getitem:
            total += node_flops(node)
    return total


def node_flops(node: fx.Node) -> int:
    """Return the floating point operations of one `call_function` node."""
    if not _may_cost(node.target):
        return 0
    key = node.target, str(fx.map_arg((node.args, node.kwargs), _sizes))
    if key not in _COUNTED:
        counter = flop_counter()
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with FAKE_MODE, torch.no_grad(), counter:
            node.target(*args, **kwargs)  # type: ignore[operator]
        _COUNTED[key] = int(counter.get_total_flops())
    return _COUNTED[key]


# FLOPs by operator and sizes: the counter takes a millisecond, and graphs are counted after every
# pass.
_COUNTED: dict[tuple[Any, str], int] = {}


def _sizes(node: fx.Node) -> Any:
    value = node.meta["val"]
    return [int(size) for size in value.shape] if isinstance(value, Tensor) else value


def flop_counter() -> FlopCounterMode:
    """Return what counts the floating point operations of what runs inside it."""
    # The counter knows what attention is on GPUs alone, and would take it for free here.
    own = {aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    return FlopCounterMode(display=False, custom_mapping=own)


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _may_cost(target: Any) -> bool:
    """Tell whether FLOPs can come of an operator: running the counter on every node is slow."""
    name = str(target)
    return any(
        word in name
        for word in ("mm", "linear", "conv", "attention", "matmul", "einsum", "bilinear")
    )
