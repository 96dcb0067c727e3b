"""What components take and return: drops what no call needs, and components that are equal."""

from typing import Any

from torch import fx

from diffopt.ir import graph as g
from diffopt.ir.cse import structural_key
from diffopt.ir.nodes import args, memory_layout, replace_node, stored_tensor
from diffopt.ir.program import Program


def merge_equal_components(program: Program) -> int:
    """Let one component stand for all with the same graph and weights; return how many went."""
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
    """Make a component return only what some call uses, once, and nothing that it was given."""
    body, sites = program.components[name], program.calls(name)
    outputs = g.outputs(body)
    takes = g.placeholders(body)
    kept: list[int] = []
    place: dict[int, int] = {}
    for index, node in enumerate(outputs):
        users = [u for site in sites for u in site.users if args(u)[1] == index]
        if node.op in ("placeholder", "get_attr"):
            for user in users:
                _bypass(program, user, body, node, takes)
        elif users:
            first = outputs.index(node)
            if first not in kept:
                kept.append(first)
            place[index] = kept.index(first)
    if len(kept) == len(outputs):
        return 0
    for site in sites:
        for user in list(site.users):
            user.args = (site, place[args(user)[1]])
        site.meta["val"] = tuple(site.meta["val"][i] for i in kept)
    g.set_outputs(body, [outputs[i] for i in kept])
    g.prune_unused(body)
    return len(outputs) - len(kept)


def _bypass(
    program: Program, user: fx.Node, body: fx.GraphModule, output: fx.Node, takes: list[fx.Node]
) -> None:
    """Replace an output that is an argument or a constant of its component."""
    tensor = stored_tensor(body, output)
    if tensor is None:
        replace_node(user, args(args(user)[0])[takes.index(output)])
        return
    with program.root.graph.inserting_before(user):
        replace_node(user, g.get_attr(program.root, str(output.target), tensor))


def trim_arguments(program: Program, name: str) -> int:
    """Drop arguments that a component does not use, gets twice, or gets as the same constant."""
    body, sites = program.components[name], program.calls(name)
    takes = g.placeholders(body) if sites else []
    kept: list[int] = []
    same: dict[Any, fx.Node] = {}
    for index, formal in enumerate(takes):
        actual = [args(site)[index] for site in sites]
        if not formal.users:
            continue
        first = same.setdefault((tuple(actual), memory_layout(formal.meta["val"])), formal)
        tensors = [stored_tensor(program.root, node) for node in actual]
        if tensors[0] is not None and all(t is tensors[0] for t in tensors):
            with body.graph.inserting_after(takes[-1]):
                formal.replace_all_uses_with(g.get_attr(body, str(actual[0].target), tensors[0]))
        elif first is not formal:
            formal.replace_all_uses_with(first)
        else:
            kept.append(index)
    return drop_unread_arguments(program, name) if len(kept) < len(takes) else 0


def drop_unread_arguments(program: Program, name: str) -> int:
    """Drop the arguments that a component does not read; return how many."""
    body = program.components[name]
    g.prune_unused(body)
    takes = g.placeholders(body)
    read = [bool(formal.users) for formal in takes]
    for site in program.calls(name):
        site.args = tuple(arg for arg, keep in zip(site.args, read, strict=True) if keep)
    for formal in takes:
        if not formal.users:
            body.graph.erase_node(formal)
    return read.count(False)
