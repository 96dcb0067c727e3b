"""Which parts of the sampling loop's body each step computes: what the `cache` pass reports.

The map has a row for each part (see `rows`), in the order of execution, and in it a sign for each
step. It is about all calls of a step, as they are once the pass is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from diffopt.caching.layer_groups import rows
from diffopt.caching.reuse_plan import Step
from diffopt.core import Record
from diffopt.ir import call_tags
from diffopt.ir import graph as g
from diffopt.ir.flops import flop_counter, graph_flops
from diffopt.ir.program import Program
from diffopt.ir.sampling_loop import CallKey, Loop

LEGEND = {"#": "computed", "+": "in part", "-": "reused", "~": "extrapolated"}
COLOURS = {
    "computed": "#0072b2",
    "in part": "#7fb8d9",
    "reused": "#e3e3e3",
    "extrapolated": "#e69f00",
}

# Signs


@dataclass(frozen=True)
class Work:
    """What one call computes.

    Attributes:
        names: The nodes of the loop's body; bodies that are made of it keep their names.
        flops: What it costs.
        is_whole: Whether it is for all rows of a batch.
    """

    names: frozenset[str]
    flops: int
    is_whole: bool = True


NOTHING = Work(frozenset(), 0)


def works(program: Program, loop: Loop) -> dict[CallKey, Work]:
    """Return what each call computes."""
    there = set(calls(program, loop))
    names = {str(call.target) for call in there}
    known = {name: _work(program.components[name]) for name in names}
    return {k: known[str(c.target)] if c in there else NOTHING for k, c in loop.calls.items()}


def _work(body: fx.GraphModule) -> Work:
    names = (node.name for node in body.graph.nodes if node.op == "call_function")
    return Work(frozenset(names), graph_flops(body))


def calls(program: Program, loop: Loop) -> list[fx.Node]:
    """Return the calls that do the loop's work now: those with the tags of its calls."""
    own = {call_tags.tag(call) for call in loop.calls.values()}
    return [call for call in program.calls() if call_tags.tag(call) in own]


def finished(program: Program, loop: Loop, before: Mapping[CallKey, Work]) -> dict[CallKey, Work]:
    """Return what is left of the calls' work once a policy has rewritten what is around them.

    A call that has been replaced by a cheaper one is done for a part of its batch. One that is gone
    is done by an earlier call of its branch, if that has been replaced by a dearer one; else it was
    left out.
    """
    now = {call_tags.tag(call): call for call in calls(program, loop)}
    names = {str(call.target) for call in now.values()}
    costs = {name: graph_flops(program.components[name]) for name in names}
    merges: dict[int, bool] = {}  # by branch: whether the last call that is left does more than one
    left: dict[CallKey, Work] = {}
    for (step, branch), call in loop.calls.items():
        work = before[step, branch]
        found = now.get(call_tags.tag(call))
        if found is not None:
            cost = costs[str(found.target)]
            merges[branch] = cost > work.flops
            work = replace(work, is_whole=found is call or cost >= work.flops)
        left[step, branch] = work if found is not None or merges.get(branch) else NOTHING
    return left


def step_map(loop: Loop, steps: Sequence[Step], done: Mapping[CallKey, Work]) -> dict[str, str]:
    """Return for each row a sign for each step: see LEGEND."""
    by_step: dict[int, list[Work]] = {}
    for (step, _), work in done.items():
        by_step.setdefault(step, []).append(work)
    sums = _Sums()
    return {
        label: "".join(
            _sign({node.name for node in nodes}, by_step[index], sums.has(label, nodes, step))
            for index, step in enumerate(steps)
        )
        for label, nodes in rows(loop).items()
    }


class _Sums:
    """Tells where what a step takes in place of a row is a sum; steps alike are looked at once."""

    def __init__(self) -> None:
        self._known: dict[Any, bool] = {}

    def has(self, label: str, nodes: Sequence[fx.Node], step: Step) -> bool:
        """Tell whether the first values after some nodes that the step takes have a sum."""
        taken = {item.value: item.is_sum for item in step.taken}
        key = label, frozenset(taken.items())
        if key not in self._known:
            after = g.reachable(nodes, lambda n: () if n in taken else n.users)
            self._known[key] = any(taken.get(node, False) for node in after)
        return self._known[key]


def _sign(layers: set[str], done: Sequence[Work], is_sum: bool) -> str:
    if all(work.is_whole and layers <= work.names for work in done):
        return "#"
    if any(layers & work.names for work in done):
        return "+"
    return "~" if is_sum else "-"


# Costs


def predicted(loop: Loop, steps: Sequence[Step]) -> int:
    """Return the FLOPs of what is left of the loop's body in each call, by the plan alone.

    The sums of extrapolated values add none: only products of matrices are counted, as in torch.
    """
    costs = []
    for step in steps:
        taken = {item.value: item.base for item in step.taken}
        more = [node for kept in step.kept for node in kept if node is not None]
        costs.append(loop.cost(loop.live_nodes(taken, more) - taken.keys()))
    return sum(costs[step] for step, _ in loop.calls)


def measured(program: Program, loop: Loop) -> int:
    """Return the FLOPs that torch's counter sees while the loop's calls run, on fake values."""
    known: dict[str, int] = {}
    total = 0
    for call in calls(program, loop):
        name = str(call.target)
        if name not in known:
            given = fx.map_arg(call.args, lambda n: n.meta["val"])
            counter = flop_counter()
            with g.FAKE_MODE, torch.no_grad(), counter:
                program.components[name](*given)
            known[name] = int(counter.get_total_flops())
        total += known[name]
    return total


# Reading


@dataclass(frozen=True)
class Report:
    """The map that a pass noted down for one component.

    Attributes:
        text: The pass as pipeline text.
        component: Whose loop it is.
        relative: The error that the pass added to the outputs; None where they were not compared.
        note: What the pass noted: `map`, `legend`, `flops`, `bodies`, `peak cache bytes`.
    """

    text: str
    component: str
    relative: float | None
    note: Mapping[str, Any]

    @property
    def steps(self) -> int:
        """Count the steps."""
        return max(len(row) for row in self.note["map"].values())

    def colour(self, sign: str) -> str:
        """Return the colour of a sign."""
        return COLOURS.get(self.note["legend"].get(sign, ""), "#999999")

    @property
    def fewer(self) -> float:
        """Say how many times fewer FLOPs the loop takes."""
        flops = self.note["flops"]
        return float(flops["before"] / max(1, flops["measured"]))


def reports(records: Iterable[Record]) -> Iterator[Report]:
    """Yield the maps that passes noted down."""
    for record in records:
        for component, note in record.notes.items():
            if is_map(note):
                yield Report(record.text, component, record.relative, note)


def is_map(note: object) -> bool:
    """Tell whether what a pass noted down is a map with its numbers."""
    return isinstance(note, Mapping) and bool(note.get("map"))
