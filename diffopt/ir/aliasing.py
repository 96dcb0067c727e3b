"""Which values share memory, with one another and with what a program is given."""

import operator
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.ir import graph as g
from diffopt.ir.nodes import args, calls, stored
from diffopt.ir.program import Program

aten = torch.ops.aten


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
