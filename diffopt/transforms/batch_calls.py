"""Merge independent calls into one call with a leading dimension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from diffopt.ir import call_tags, nodes
from diffopt.ir import graph as g
from diffopt.ir.program import Program
from diffopt.transforms import request_dimension

aten = torch.ops.aten

Merged = tuple[str, list[bool]]
"""A batched body's name as a component, and which of its results have a row for each call."""


def merge_calls(program: Program, calls: Sequence[fx.Node]) -> int:
    """Merge consecutive independent calls of a branch into one batched call.

    Exact up to the order of sums. Equal arguments are passed once; others are stacked.

    Args:
        program: The program to rewrite, in place.
        calls: Calls of a loop in order. Of each branch, consecutive ones with the same body and no
            dependency on each other are merged. Calls that were removed from the program are
            ignored.

    Returns:
        By how many calls the program has fewer.
    """
    alive = set(program.calls())
    runs: dict[int, list[list[fx.Node]]] = {}  # by branch
    for call in calls:
        tag = call_tags.tag(call)
        if call not in alive or tag is None:
            continue
        runs_of_branch = runs.setdefault(tag.branch, [[]])
        last = runs_of_branch[-1]
        if last and last[0].target == call.target and g.ancestors([call]).isdisjoint(last):
            last.append(call)
        else:
            runs_of_branch.append([call])
    together = [run for runs_of_branch in runs.values() for run in runs_of_branch if len(run) > 1]
    merged: dict[Any, Merged] = {}
    for run in together:
        _merge(program, run, merged)
    program.refresh()
    return sum(len(run) - 1 for run in together)


def _merge(program: Program, calls: Sequence[fx.Node], known: dict[Any, Merged]) -> None:
    graph, first = program.root.graph, calls[0]
    columns = list(zip(*(nodes.args(call) for call in calls), strict=True))
    differ = [len({_value(node) for node in column}) > 1 for column in columns]
    name, batched = _body(program, str(first.target), differ, len(calls), known)
    with graph.inserting_before(first):
        arguments = [
            g.call(graph, aten.stack.default, list(column)) if many else column[0]
            for column, many in zip(columns, differ, strict=True)
        ]
        results = program.insert_call(name, arguments, call_tags.tag(first))
        for row, call in enumerate(calls):
            for user in list(call.users):
                index = nodes.args(user)[1]
                result = results[index]
                if batched[index]:
                    result = g.call(graph, aten.select.int, result, 0, row)
                user.replace_all_uses_with(result)
    g.sort_topologically(program.root)


def _body(
    program: Program, name: str, differ: Sequence[bool], size: int, known: dict[Any, Merged]
) -> Merged:
    """Return the body of `size` calls; runs of as many calls share it."""
    key = name, tuple(differ), size
    if key not in known:
        batched = request_dimension.batch_body(program.components[name], differ, size)
        _fix_sizes(batched.graph)
        known[key] = program.add_component(f"{name}_merged", batched.graph), batched.results
    return known[key]


def _value(node: fx.Node) -> object:
    """Return a key that is equal for nodes that read the same constant."""
    return node.target if node.op == "get_attr" else node


def _fix_sizes(body: fx.GraphModule) -> None:
    """Replace the sizes that a batched body reads from its values by constants."""
    sizes = {n: n.meta["val"] for n in body.graph.nodes if isinstance(n.meta.get("val"), int)}

    def known(node: fx.Node) -> Any:
        return sizes.get(node, node)

    for node in body.graph.nodes:
        node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), known)
    g.prune_unused(body)
