"""Decide which values are passed from component to component in 16 bits.

A value is passed in the low type if components alone produce and read it, unless it would lose
digits that are used in float32: it is neither computed in the low type nor cast to it at once, or
arithmetic on results reads it, as with latents.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping

import torch
from torch import fx

from diffopt.analysis.dtype_regions import DtypePlan
from diffopt.ir import graph as g
from diffopt.ir.nodes import args, is_call
from diffopt.ir.program import Program
from diffopt.ir.step_tables import is_view

Port = tuple[str, bool, int]
"""A component, whether it is a result (or else an argument), and which one."""


def assign_boundary_dtypes(program: Program, plans: Mapping[str, DtypePlan]) -> None:
    """Set `low_arguments` and `low_results` of the plans of all components."""
    groups = _groups(program, plans)
    while True:
        for name, plan in plans.items():
            formals = g.placeholders(plan.body)
            plan.low_arguments = {t for i, t in enumerate(formals) if (name, False, i) in groups}
            plan.low_results = {
                i for i in range(len(g.outputs(plan.body))) if (name, True, i) in groups
            }
        rejected = [
            group
            for group in {id(x): x for x in groups.values()}.values()
            if _loses_digits(group, plans)
        ]
        if not rejected:
            return
        for port in (port for group in rejected for port in group):
            del groups[port]


def _groups(program: Program, plans: Mapping[str, DtypePlan]) -> dict[Port, set[Port]]:
    """Return ports where values could be in the low type, each with all that have to agree."""
    groups: dict[Port, set[Port]] = {}
    blocked: set[Port] = set()
    for call in program.calls():
        name = str(call.target)
        for index, actual in enumerate(args(call)):
            read = groups.setdefault((name, False, index), {(name, False, index)})
            producer = _producer(actual)
            if producer is None or name not in plans:
                blocked.add((name, False, index))
                continue
            produced = groups.setdefault(producer, {producer})
            if produced is not read:
                produced |= read
                groups.update(dict.fromkeys(read, produced))
    for node in program.root.graph.nodes:
        producer = _producer(node)
        if producer is None:
            continue
        inside = all(user.op == "call_module" for user in node.users)
        narrow = node.meta["val"].dtype != torch.float32
        if producer[0] not in plans or not inside or narrow:
            blocked.add(producer)
    return {port: group for port, group in groups.items() if group.isdisjoint(blocked)}


def _producer(node: fx.Node) -> Port | None:
    if not is_call(node, operator.getitem) or args(node)[0].op != "call_module":
        return None
    return str(args(node)[0].target), True, args(node)[1]


def _loses_digits(group: Iterable[Port], plans: Mapping[str, DtypePlan]) -> bool:
    """Tell whether a value that is passed in the low type would lose digits used in float32."""
    computed_low = read_low = True
    for name, is_result, index in group:
        plan = plans[name]
        if is_result:
            computed_low &= g.outputs(plan.body)[index] in plan.low_nodes()
            continue
        formal = g.placeholders(plan.body)[index]
        users = _readers_through_views(formal)
        if not users.isdisjoint(plan.tail()):
            return True
        read_low &= users <= plan.low_nodes(plan.low_arguments - {formal})
    return not (computed_low or read_low)


def _readers_through_views(node: fx.Node) -> set[fx.Node]:
    """Return the operators that compute with a value, through views."""
    seen = g.reachable([node], lambda n: n.users if n is node or is_view(n) else ())
    return {n for n in seen if n.op == "call_function" and n is not node and not is_view(n)}
