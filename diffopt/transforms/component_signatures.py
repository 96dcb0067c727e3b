"""Trim parameters and results of components that no call needs, and merge equal components."""

from typing import Any

from torch import fx

from diffopt.ir import graph as g
from diffopt.ir.cse import structural_key
from diffopt.ir.nodes import args, replace_node, stored_tensor
from diffopt.ir.program import Program


def merge_equal_components(program: Program) -> int:
    """Merge components with equal graphs and weights; return how many were removed."""
    first: dict[Any, str] = {}
    count = 0
    for name, body in program.components.items():
        same = first.setdefault(structural_key(body), name)
        if same == name:
            continue
        for node in program.calls(name):
            node.target = same
        del program.root._modules[name]
        count += 1
    return count


def trim_outputs(program: Program, name: str) -> int:
    """Remove results that are unused, duplicates, arguments or constants; return how many."""
    body, sites = program.components[name], program.calls(name)
    outputs = g.outputs(body)
    formals = g.placeholders(body)
    kept: list[int] = []
    position: dict[int, int] = {}
    for index, node in enumerate(outputs):
        users = [u for site in sites for u in site.users if args(u)[1] == index]
        if node.op in ("placeholder", "get_attr"):
            for user in users:
                _bypass(program, user, body, node, formals)
        elif users:
            first = outputs.index(node)
            if first not in kept:
                kept.append(first)
            position[index] = kept.index(first)
    if len(kept) == len(outputs):
        return 0
    for site in sites:
        for user in list(site.users):
            user.args = (site, position[args(user)[1]])
        site.meta["val"] = tuple(site.meta["val"][i] for i in kept)
    g.set_outputs(body, [outputs[i] for i in kept])
    g.prune_unused(body)
    return len(outputs) - len(kept)


def _bypass(
    program: Program, user: fx.Node, body: fx.GraphModule, output: fx.Node, formals: list[fx.Node]
) -> None:
    """Replace an output that is an argument or a constant of its component."""
    tensor = stored_tensor(body, output)
    if tensor is None:
        replace_node(user, args(args(user)[0])[formals.index(output)])
        return
    with program.root.graph.inserting_before(user):
        replace_node(user, g.get_attr(program.root, str(output.target), tensor))


def trim_arguments(program: Program, name: str) -> int:
    """Remove parameters that are unused, duplicates, or the same constant; return how many."""
    body, sites = program.components[name], program.calls(name)
    formals = g.placeholders(body) if sites else []
    kept: list[int] = []
    first_with: dict[Any, fx.Node] = {}
    for index, formal in enumerate(formals):
        actual = [args(site)[index] for site in sites]
        if not formal.users:
            continue
        first = first_with.setdefault((tuple(actual), g.memory_layout(formal.meta["val"])), formal)
        tensors = [stored_tensor(program.root, node) for node in actual]
        if tensors[0] is not None and all(t is tensors[0] for t in tensors):
            with body.graph.inserting_after(formals[-1]):
                formal.replace_all_uses_with(g.get_attr(body, str(actual[0].target), tensors[0]))
        elif first is not formal:
            formal.replace_all_uses_with(first)
        else:
            kept.append(index)
    return drop_unread_arguments(program, name) if len(kept) < len(formals) else 0


def drop_unread_arguments(program: Program, name: str) -> int:
    """Remove the parameters that a component does not read; return how many."""
    body = program.components[name]
    g.prune_unused(body)
    formals = g.placeholders(body)
    read = [bool(formal.users) for formal in formals]
    for site in program.calls(name):
        site.args = tuple(arg for arg, keep in zip(site.args, read, strict=True) if keep)
    for formal in formals:
        if not formal.users:
            body.graph.erase_node(formal)
    return read.count(False)
