"""Evaluate nodes that depend on constants alone, and store equal constants once."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._prims_common import is_non_overlapping_and_dense_or_false

from diffopt.ir import graph as g
from diffopt.ir import qdq, weight_origins
from diffopt.ir.aliasing import storage_owner
from diffopt.ir.interpreter import Interpreter
from diffopt.ir.nodes import is_pure, is_pure_graph, replace_node
from diffopt.ir.program import Program

Skip = Callable[[fx.Node, str], None]


def fold_constants(gm: fx.GraphModule, max_bytes: int, keep: set[fx.Node], skip: Skip) -> int:
    """Replace nodes that depend on constants alone by their values; return how many.

    Not folded are views of stored tensors, the nodes of `keep`, results larger than `max_bytes` and
    than their constant inputs together, quantized weights, and results larger than these.
    """
    constant = _constant_nodes(gm)
    widened = [node for node in constant if qdq.dequantizes_weight(node)]
    kept = keep | g.ancestors(widened)
    made_of_small = g.descendants(widened)
    stack = [n for n in constant if any(user not in constant for user in n.users)]
    folded: dict[fx.Node, None] = {}
    seen = set(stack)
    while stack:
        node = stack.pop()
        limit = 0 if node in made_of_small else max_bytes
        if node.op == "get_attr" or node in kept or _is_kept(gm, node, limit, skip):
            sources = [n for n in node.all_input_nodes if n not in seen]
            seen.update(sources)
            stack += sources
        else:
            folded[node] = None
    with torch.no_grad():
        values = Interpreter(gm, [n for n in constant if n in folded]).values()
    sources = {node: _sources(gm, node) for node in values}
    for node, tensor in values.items():
        # A slice of a larger temporary would keep all of its memory.
        tensor = tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
        weight_origins.record_computed(tensor, sources[node])
        with gm.graph.inserting_before(node):
            result = g.get_attr(gm, f"constant_{node.name}", tensor)
        if "module" in node.meta:
            result.meta["module"] = node.meta["module"]
        replace_node(node, result)
    return len(folded)


def _constant_nodes(gm: fx.GraphModule) -> dict[fx.Node, None]:
    """Return, in order, the nodes whose values depend on no input."""
    constant: dict[fx.Node, None] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module":
            body = g.attribute(gm, str(node.target))
            pure = isinstance(body, fx.GraphModule) and is_pure_graph(body)
        else:
            pure = is_pure(node)
        if pure and all(source in constant for source in node.all_input_nodes):
            constant[node] = None
    return constant


def _is_kept(gm: fx.GraphModule, node: fx.Node, max_bytes: int, skip: Skip) -> bool:
    """Tell whether a constant node is computed at run time, from stored arguments."""
    value = node.meta["val"]
    if not isinstance(value, Tensor) or not is_non_overlapping_and_dense_or_false(value):
        return True
    size = value.nbytes
    if storage_owner(node).op == "get_attr":
        return True
    sources = [n for n in g.ancestors([node]) if n.op == "get_attr"]
    if size > max_bytes and size > sum(n.meta["val"].nbytes for n in sources):
        if max_bytes:
            skip(node, f"the constant would take {size / 2**20:.3g} MB, over max-constant-mb")
        return True
    return False


def _sources(gm: fx.GraphModule, node: fx.Node) -> list[Tensor]:
    """Return the stored tensors that a node is computed from, those of components that it calls."""
    tensors = []
    for each in g.ancestors([node]):
        if each.op == "get_attr":
            tensors.append(g.attribute(gm, str(each.target)))
        elif each.op == "call_module":
            tensors += [t for _, t in g.named_tensors(g.attribute(gm, str(each.target)))]
    return tensors


def evaluate(gm: fx.GraphModule, node: fx.Node) -> Any:
    """Return the value of a constant node."""
    with torch.no_grad():
        value = Interpreter(gm, [node]).values()[node]
    return value.detach() if isinstance(value, Tensor) else value


def share_equal_constants(program: Program, keys: dict[int, tuple[Tensor, Any]]) -> int:
    """Store constants (not parameters) of equal layout and bytes once; return how many others.

    `keys` caches digests of tensors between calls.
    """
    first: dict[Any, Tensor] = {}
    count = 0
    for gm in program.graphs.values():
        for name, tensor in list(gm._buffers.items()):
            if tensor is None:
                continue
            if id(tensor) not in keys:
                keys[id(tensor)] = tensor, _content(tensor)
            same = first.setdefault(keys[id(tensor)][1], tensor)
            if same is not tensor:
                weight_origins.record_computed(same, (same, tensor))
                gm._buffers[name] = same
                count += 1
    return count


def _content(tensor: Tensor) -> Any:
    flat = tensor.detach().reshape(-1).clone(memory_format=torch.contiguous_format)
    data = flat.view(torch.uint8).numpy()
    digest = hashlib.sha256(data.tobytes()).digest()
    return tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), digest
