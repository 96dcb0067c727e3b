"""Which values share storage: with one another, with weights, with a program's inputs."""

import operator
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.ir import graph as g
from diffopt.ir.nodes import args, is_call, stored_tensor
from diffopt.ir.program import Program

aten = torch.ops.aten


def view_source(node: fx.Node) -> fx.Node | None:
    """Return the input of an operator of which its result is a view; None for a new tensor."""
    producer = args(node)[0] if is_call(node, operator.getitem) else node
    if producer.op != "call_function":
        return None
    result = g.infer_value(producer)
    if producer is not node:
        result = result[args(node)[1]]
    if not isinstance(result, Tensor):
        return None
    storage = result.untyped_storage()._cdata
    for source in producer.all_input_nodes:
        value = source.meta["val"]
        if isinstance(value, Tensor) and value.untyped_storage()._cdata == storage:
            return source
    return None


def storage_owner(node: fx.Node) -> fx.Node:
    """Return the node that allocates the storage of a value."""
    source = view_source(node)
    while source is not None:
        node, source = source, view_source(source)
    return node


def storage_origin(program: Program, node: fx.Node) -> tuple[Any, ...]:
    """Return the source of a root value's storage: "input", "weight" or "value", and which one."""
    node = storage_owner(node)
    tensor = stored_tensor(program.root, node)
    if node.op == "placeholder":
        return "input", node.name
    if is_call(node, operator.getitem) and args(node)[0].op == "call_module":
        call = args(node)[0]
        body = program.components[call.target]
        inner = storage_owner(g.outputs(body)[args(node)[1]])
        if inner.op == "placeholder":
            return storage_origin(program, call.args[g.placeholders(body).index(inner)])
        tensor = stored_tensor(body, inner)
        if tensor is None:
            return "value", call.name, inner.name
    if tensor is not None:
        return "weight", tensor.untyped_storage().data_ptr()
    return "value", node.name


def output_aliases(program: Program) -> set[tuple[Any, ...]]:
    """Return the outputs that share storage with an input, a weight or an earlier output.

    Each row is the output's index, the other's kind and its name, address or index.
    """
    aliases: set[tuple[Any, ...]] = set()
    first: dict[tuple[Any, ...], int] = {}
    for index, node in enumerate(g.outputs(program.root)):
        origin = storage_origin(program, node)
        if origin[0] != "value":
            aliases.add((index, *origin))
        elif first.setdefault(origin, index) != index:
            aliases.add((index, "output", first[origin]))
    return aliases


def clone_aliased_outputs(program: Program, before: set[tuple[Any, ...]]) -> None:
    """Clone each output that has an alias which is not in `before`; see `output_aliases`."""
    outputs = g.outputs(program.root)
    for index in {row[0] for row in output_aliases(program) - before}:
        with program.root.graph.inserting_before(g.output_node(program.root)):
            copy = g.call(
                program.root.graph, aten.clone.default, outputs[index], like=outputs[index]
            )
        outputs[index] = copy
    g.set_outputs(program.root, outputs)
