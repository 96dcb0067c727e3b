"""What rewrites of graphs have in common: purity, memory that is shared, equal nodes, constants.

Every function here keeps results equal bit by bit.
"""

import operator
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from diffopt import graph as g
from diffopt.program import Program

aten = torch.ops.aten

_UNINITIALISED = (
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
)


def graphs(program: Program) -> dict[str, fx.GraphModule]:
    """Return the root graph, as "", and the components by name."""
    return {"": program.root, **program.components}


def args(node: fx.Node) -> tuple[Any, ...]:
    """Return a node's arguments, which fx types too closely to be looked at."""
    return node.args


def calls(node: Any, *targets: Any) -> bool:
    """Tell whether a value is a call of one of these functions."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """Return an argument that may be given by position, by name or not at all."""
    return args(node)[position] if len(node.args) > position else node.kwargs.get(name, default)


def geometry(node: fx.Node) -> tuple[list[int], list[int], list[int], int]:
    """Return a convolution's strides, paddings, dilations, each for every axis, and groups."""
    count = args(node)[1].meta["val"].dim() - 2

    def each(position: int, name: str, default: int) -> list[int]:
        given = argument(node, position, name, default)
        sizes = [given] if isinstance(given, int) else list(given)
        return sizes * count if len(sizes) == 1 else sizes

    sizes = each(3, "stride", 1), each(4, "padding", 0), each(5, "dilation", 1)
    return *sizes, argument(node, 6, "groups", 1)


def stored(gm: fx.GraphModule, node: Any) -> Tensor | None:
    """Return the tensor that a `get_attr` node reads; None for anything else."""
    if isinstance(node, fx.Node) and node.op == "get_attr":
        tensor: Tensor = g.attribute(gm, str(node.target))
        return tensor
    return None


def is_pure(node: fx.Node) -> bool:
    """Tell whether a node's result depends on its arguments alone and it writes into none."""
    if node.op != "call_function":
        return node.op == "get_attr"
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
        return False
    if node.target is aten.scaled_dot_product_attention.default:
        return bool(argument(node, 4, "dropout_p", 0.0) == 0.0)
    random = torch.Tag.nondeterministic_seeded in node.target.tags
    return not random and node.target not in _UNINITIALISED


def is_pure_graph(gm: fx.GraphModule) -> bool:
    """Tell whether every node of a component is pure."""
    return all(is_pure(n) for n in gm.graph.nodes if n.op not in ("placeholder", "output"))


def replace(node: fx.Node, by: fx.Node) -> None:
    """Let `by` stand for `node` everywhere, and erase `node`."""
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def layout(value: Any) -> tuple[Any, ...] | None:
    """Return what a tensor is in memory: type, shape, strides, offset; None for other values."""
    if not isinstance(value, Tensor):
        return None
    return value.dtype, value.device, tuple(value.shape), value.stride(), value.storage_offset()


def same_layout(a: fx.Node, b: fx.Node) -> bool:
    """Tell whether two values have the same type, shape and strides."""
    one, other = layout(a.meta["val"]), layout(b.meta["val"])
    return one is not None and other is not None and one[:4] == other[:4]


def fake_call(target: Any, arguments: Any, kwargs: Mapping[str, Any] | None = None) -> Any:
    """Run an operator on values, of which nodes stand for their fake values."""
    given = fx.map_arg((arguments, dict(kwargs or {})), lambda n: n.meta["val"])
    with g.FAKE, torch.no_grad():
        return target(*given[0], **given[1])


# Memory


def viewed(node: fx.Node) -> fx.Node | None:
    """Return the node whose memory the result of an operator is in; None if it has its own."""
    producer = args(node)[0] if calls(node, operator.getitem) else node
    if producer.op != "call_function":
        return None
    result = g.propagate(producer)
    if producer is not node:
        result = result[args(node)[1]]
    if not isinstance(result, Tensor):
        return None
    memory = result.untyped_storage()._cdata
    for source in producer.all_input_nodes:
        value = source.meta["val"]
        if isinstance(value, Tensor) and value.untyped_storage()._cdata == memory:
            return source
    return None


def owner(node: fx.Node) -> fx.Node:
    """Return the node that made the memory that a value is in."""
    source = viewed(node)
    while source is not None:
        node, source = source, viewed(source)
    return node


def memory(program: Program, node: fx.Node) -> tuple[Any, ...]:
    """Return whose memory a root value is in: "input", "weight" or "value", and which one."""
    node = owner(node)
    tensor = stored(program.root, node)
    if node.op == "placeholder":
        return "input", node.name
    if calls(node, operator.getitem) and args(node)[0].op == "call_module":
        call = args(node)[0]
        body = program.components[call.target]
        inner = owner(g.outputs(body)[args(node)[1]])
        if inner.op == "placeholder":
            return memory(program, call.args[g.placeholders(body).index(inner)])
        tensor = stored(body, inner)
        if tensor is None:
            return "value", call.name, inner.name
    if tensor is not None:
        return "weight", tensor.untyped_storage().data_ptr()
    return "value", node.name


def shared_memory(program: Program) -> set[tuple[Any, ...]]:
    """Return which outputs share memory with an input, with a weight or with an earlier output."""
    found: set[tuple[Any, ...]] = set()
    first: dict[tuple[Any, ...], int] = {}
    for index, node in enumerate(g.outputs(program.root)):
        where = memory(program, node)
        if where[0] != "value":
            found.add((index, *where))
        elif first.setdefault(where, index) != index:
            found.add((index, "output", first[where]))
    return found


def separate_outputs(program: Program, before: set[tuple[Any, ...]]) -> None:
    """Copy each output that shares memory now and did not before, as `shared_memory` said."""
    outputs = g.outputs(program.root)
    for index in {row[0] for row in shared_memory(program) - before}:
        with program.root.graph.inserting_before(g.output_node(program.root)):
            copy = g.call(
                program.root.graph, aten.clone.default, outputs[index], like=outputs[index]
            )
        outputs[index] = copy
    g.set_outputs(program.root, outputs)


# Values that change


def propagate(node: fx.Node) -> Any:
    """Return a node's value; a view that another layout does not allow becomes a `reshape`."""
    try:
        return g.propagate(node)
    except (RuntimeError, ValueError):
        if node.target not in (aten.view.default, aten._unsafe_view.default):
            raise
        node.target = aten.reshape.default
        return g.propagate(node)


def repropagate(gm: fx.GraphModule, changed: set[fx.Node]) -> None:
    """Record the values behind nodes whose memory layout changed.

    A view that the new layout does not allow becomes a `reshape`.
    """
    for node in gm.graph.nodes:
        if node.op != "call_function" or changed.isdisjoint(node.all_input_nodes):
            continue
        value = propagate(node)
        if _layouts(value) != _layouts(node.meta["val"]):
            node.meta["val"] = value
            changed.add(node)


def keep_outputs(program: Program, name: str, kept: Collection[object]) -> None:
    """Give the outputs of a graph the memory layout back that they had."""
    gm = graphs(program)[name]
    outputs = g.outputs(gm)
    for index, (node, before) in enumerate(zip(outputs, kept, strict=True)):
        if layout(node.meta["val"]) != before:
            with gm.graph.inserting_before(g.output_node(gm)):
                outputs[index] = g.call(gm.graph, aten.clone.default, node, like=node)
    g.set_outputs(gm, outputs)
    for site in program.calls(name) if name else []:
        site.meta["val"] = tuple(node.meta["val"] for node in outputs)
        repropagate(program.root, {site})


def _layouts(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(layout, value))
    return layout(value)


def weight_uses(program: Program) -> dict[int, int]:
    """Return how often each stored tensor is used in all graphs, by identity."""
    counts: dict[int, int] = {}
    for gm in graphs(program).values():
        for node in gm.graph.find_nodes(op="get_attr"):
            key = id(stored(gm, node))
            counts[key] = counts.get(key, 0) + len(node.users)
    return counts


# Equal nodes


def share_equal_nodes(gm: fx.GraphModule, keep: Collection[fx.Node] = ()) -> int:
    """Compute what is computed twice once, but for `keep`; return how many nodes that saved."""
    seen: dict[Any, fx.Node] = {}
    count = 0
    for node in list(gm.graph.nodes):
        if node in keep or not (node.op == "call_module" or is_pure(node)):
            continue
        tensor = stored(gm, node)
        what = node.target if tensor is None else id(tensor)
        first = seen.setdefault((node.op, what, freeze(node.args), freeze(node.kwargs)), node)
        if first is not node:
            replace(node, first)
            count += 1
    return count


def freeze(value: Any, names: Mapping[fx.Node, Any] | None = None) -> Any:
    """Return an argument as something hashable that tells 1 from 1.0 and 0.0 from -0.0.

    `names` gives nodes other names than their identity, to compare different graphs.
    """
    if isinstance(value, fx.Node):
        return ("node", names[value] if names else id(value))
    if isinstance(value, (list, tuple)):
        return tuple(freeze(item, names) for item in value)
    if isinstance(value, Mapping):
        return tuple((key, freeze(value[key], names)) for key in sorted(value))
    return type(value), repr(value)


def structure(gm: fx.GraphModule) -> tuple[Any, ...]:
    """Return what a component does, by its weights' identity and without its nodes' names."""
    names: dict[fx.Node, Any] = {}
    rows = []
    for node in gm.graph.nodes:
        tensor = stored(gm, node)
        if node.op == "placeholder":
            row: tuple[Any, ...] = (node.op, layout(node.meta["val"]), bool(node.meta.get("reuse")))
        elif tensor is not None:
            row = (node.op, id(tensor))
        else:
            row = (node.op, node.target, freeze(node.args, names), freeze(node.kwargs, names))
        names[node] = len(names)
        rows.append(row)
    return tuple(rows)
