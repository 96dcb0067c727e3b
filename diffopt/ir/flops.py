"""Floating point operations of graphs and nodes, counted by torch's `FlopCounterMode`."""

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from diffopt.ir.graph import FAKE_MODE

aten = torch.ops.aten


def graph_flops(gm: fx.GraphModule, components: Mapping[str, int] | None = None) -> int:
    """Return the floating point operations of one run: 2 a multiply-add.

    Matrix products, convolutions and attention count, as in torch's own counter. `components` are
    the FLOPs of the components that `gm` calls, by name; without, calls count nothing.
    """
    total = 0
    for node in gm.graph.nodes:
        if node.op == "call_module" and components is not None:
            total += components[str(node.target)]
        elif node.op == "call_function" and node.target is not operator.getitem:
            total += node_flops(node)
    return total


def node_flops(node: fx.Node) -> int:
    """Return the floating point operations of one `call_function` node."""
    if not _may_cost(node.target):
        return 0
    key = node.target, str(fx.map_arg((node.args, node.kwargs), _sizes))
    if key not in _FLOPS:
        counter = flop_counter()
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with FAKE_MODE, torch.no_grad(), counter:
            node.target(*args, **kwargs)  # type: ignore[operator]
        _FLOPS[key] = int(counter.get_total_flops())
    return _FLOPS[key]


# FLOPs by operator and sizes: the counter takes a millisecond, and graphs are counted after every
# pass.
_FLOPS: dict[tuple[Any, str], int] = {}


def _sizes(node: fx.Node) -> Any:
    value = node.meta["val"]
    return [int(size) for size in value.shape] if isinstance(value, Tensor) else value


def flop_counter() -> FlopCounterMode:
    """Return a mode that counts the floating point operations of all operators run in it."""
    # torch's counter has no formula for the CPU's fused attention, and would count it as 0.
    cpu_attention = {aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    return FlopCounterMode(display=False, custom_mapping=cpu_attention)


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    # The kernel repeats keys' heads where there are fewer, which torch 2.11's formula refuses.
    heads = query[1]
    key, value = ([batch, heads, *sizes] for batch, _, *sizes in (key, value))
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _may_cost(target: Any) -> bool:
    """Tell whether an operator may have FLOPs: running the counter on every node is slow."""
    name = str(target)
    return any(
        word in name
        for word in ("mm", "linear", "conv", "attention", "matmul", "einsum", "bilinear")
    )
