"""Which values are handed from component to component in 16 bits.

A value crosses in the low type if components alone make it and components alone take it, unless it
would lose what is used in float32: one that is neither computed in the low type nor cast to it at
once, or that arithmetic on results reads, such as latents.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping

import torch
from torch import fx

from diffopt.analysis.dtype_regions import Cut
from diffopt.ir import graph as g
from diffopt.ir.nodes import args, calls
from diffopt.ir.program import Program
from diffopt.ir.step_tables import is_view

Port = tuple[str, bool, int]
"""A component, whether it is a result (or else an argument), and which one."""


def find_crossings(program: Program, cuts: Mapping[str, Cut]) -> None:
    """Set which arguments and results of components cross in the low type."""
    groups = _groups(program, cuts)
    while True:
        for name, cut in cuts.items():
            takes = g.placeholders(cut.body)
            cut.takes = {t for i, t in enumerate(takes) if (name, False, i) in groups}
            cut.gives = {i for i in range(len(g.outputs(cut.body))) if (name, True, i) in groups}
        bad = [
            group for group in {id(x): x for x in groups.values()}.values() if _loses(group, cuts)
        ]
        if not bad:
            return
        for port in (port for group in bad for port in group):
            del groups[port]


def _groups(program: Program, cuts: Mapping[str, Cut]) -> dict[Port, set[Port]]:
    """Return the ports at which values could cross, each with all that have to agree with it."""
    groups: dict[Port, set[Port]] = {}
    blocked: set[Port] = set()
    for call in program.calls():
        name = str(call.target)
        for index, actual in enumerate(args(call)):
            taken = groups.setdefault((name, False, index), {(name, False, index)})
            maker = _maker(actual)
            if maker is None or name not in cuts:
                blocked.add((name, False, index))
                continue
            given = groups.setdefault(maker, {maker})
            if given is not taken:
                given |= taken
                groups.update(dict.fromkeys(taken, given))
    for node in program.root.graph.nodes:
        maker = _maker(node)
        if maker is None:
            continue
        inside = all(user.op == "call_module" for user in node.users)
        narrow = node.meta["val"].dtype != torch.float32
        if maker[0] not in cuts or not inside or narrow:
            blocked.add(maker)
    return {port: group for port, group in groups.items() if group.isdisjoint(blocked)}


def _maker(node: fx.Node) -> Port | None:
    if not calls(node, operator.getitem) or args(node)[0].op != "call_module":
        return None
    return str(args(node)[0].target), True, args(node)[1]


def _loses(group: Iterable[Port], cuts: Mapping[str, Cut]) -> bool:
    """Tell whether a value that crosses in the low type would lose what is used in float32."""
    made_low = read_low = True
    for name, is_result, index in group:
        cut = cuts[name]
        if is_result:
            made_low &= g.outputs(cut.body)[index] in cut.lows()
            continue
        formal = g.placeholders(cut.body)[index]
        users = _readers(formal)
        if not users.isdisjoint(cut.tail()):
            return True
        read_low &= users <= cut.lows(cut.takes - {formal})
    return not (made_low or read_low)


def _readers(node: fx.Node) -> set[fx.Node]:
    """Return what computes with a value, through views."""
    seen = g.reach([node], lambda n: n.users if n is node or is_view(n) else ())
    return {n for n in seen if n.op == "call_function" and n is not node and not is_view(n)}
