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
from diffopt.ir.nodes import is_pure, is_pure_graph, replace_node, stored_tensor
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
    origins = {node: _origin(gm, node) for node in values}
    for node, tensor in values.items():
        # A slice of a larger temporary would keep all of its memory.
        tensor = tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
        weight_origins.record(tensor, origins[node])
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


def _origin(gm: fx.GraphModule, node: fx.Node) -> weight_origins.Origin:
    """Return where the value of a constant node comes from."""
    above = g.ancestors([node])
    stored = [g.attribute(gm, str(n.target)) for n in above if n.op == "get_attr"]
    origins = [weight_origins.origin_of(tensor) for tensor in stored]
    bodies = [g.attribute(gm, str(n.target)) for n in above if n.op == "call_module"]
    inner = [tensor for body in bodies for _, tensor in g.named_tensors(body)]
    shape = tuple(node.meta["val"].shape)
    result = weight_origins.unknown([*stored, *inner], shape)
    # Weights that are read here, and not in components, may be replaced: what then?
    is_of_calls = all(isinstance(origin, _OF_CALLS) for origin in origins)
    if not isinstance(result, weight_origins.Unknown) or not is_of_calls:
        return result
    graph = _recipe(gm, [n for n in gm.graph.nodes if n in above])
    return weight_origins.Computed(result.names, shape, graph)


_OF_CALLS = weight_origins.Computed | weight_origins.Constant


def _recipe(gm: fx.GraphModule, nodes: list[fx.Node]) -> fx.GraphModule:
    """Return a graph of nodes, the last of which is its result, that names components."""
    recipe, env = g.new_body("constant"), dict[fx.Node, fx.Node]()
    for node in nodes:
        tensor = stored_tensor(gm, node)
        origin = None if tensor is None else weight_origins.origin_of(tensor)
        if isinstance(origin, weight_origins.Computed):
            inner = dict[fx.Node, fx.Node]()
            parts = [n for n in origin.graph.graph.nodes if n.op != "output"]
            g.copy_nodes(parts, origin.graph, recipe, inner)
            env[node] = inner[g.outputs(origin.graph)[0]]
        elif node.op == "call_module":
            env[node] = recipe.graph.node_copy(node, env.__getitem__)
        else:
            g.copy_nodes([node], gm, recipe, env)
    recipe.graph.output((env[nodes[-1]],))
    g.set_outputs(recipe, [env[nodes[-1]]])
    return recipe


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
                weight_origins.merge(same, tensor)
                gm._buffers[name] = same
                count += 1
    return count


def _content(tensor: Tensor) -> Any:
    flat = tensor.detach().reshape(-1).clone(memory_format=torch.contiguous_format)
    data = flat.view(torch.uint8).numpy()
    digest = hashlib.sha256(data.tobytes()).digest()
    return tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), digest
