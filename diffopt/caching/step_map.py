"""The step map of the `cache` pass: which layers of the loop's body each step computes.

The map has a row for each group of layers (see `layer_groups`), in the order of execution, with a
sign for each step. A sign stands for all calls of a step, as the pass has rewritten them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from diffopt.caching.layer_groups import layer_groups
from diffopt.caching.reuse_plan import StepPlan
from diffopt.core import Record
from diffopt.ir import call_tags
from diffopt.ir import graph as g
from diffopt.ir.flops import graph_flops
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
    """The computation of one call.

    Attributes:
        names: Names of the loop body's nodes; bodies that are copied from it keep their names.
        flops: Its cost.
        is_whole: Whether all rows of a batch are computed.
    """

    names: frozenset[str]
    flops: int
    is_whole: bool = True


NOTHING = Work(frozenset(), 0)


def work_by_call(program: Program, loop: Loop) -> dict[CallKey, Work]:
    """Return the computation of each call."""
    left = set(loop_calls(program, loop))
    names = {str(call.target) for call in left}
    by_body = {name: _work(program.components[name]) for name in names}
    return {k: by_body[str(c.target)] if c in left else NOTHING for k, c in loop.calls.items()}


def _work(body: fx.GraphModule) -> Work:
    names = (node.name for node in body.graph.nodes if node.op == "call_function")
    return Work(frozenset(names), graph_flops(body))


def loop_calls(program: Program, loop: Loop) -> list[fx.Node]:
    """Return the calls that have the tags of the loop's calls, in the program as it is now."""
    tags = {call_tags.tag(call) for call in loop.calls.values()}
    return [call for call in program.calls() if call_tags.tag(call) in tags]


def remaining_work(
    program: Program, loop: Loop, before: Mapping[CallKey, Work]
) -> dict[CallKey, Work]:
    """Return the computation of each call after `Policy.finish`.

    A call that a cheaper one replaces is computed for a part of its batch. A removed call is
    computed by an earlier call of its branch, if a dearer one replaces that; else it is skipped.
    """
    now = {call_tags.tag(call): call for call in loop_calls(program, loop)}
    names = {str(call.target) for call in now.values()}
    costs = {name: graph_flops(program.components[name]) for name in names}
    merges: dict[int, bool] = {}  # by branch: whether the last call that is left does more than one
    remaining: dict[CallKey, Work] = {}
    for (step, branch), call in loop.calls.items():
        work = before[step, branch]
        replacement = now.get(call_tags.tag(call))
        if replacement is not None:
            cost = costs[str(replacement.target)]
            merges[branch] = cost > work.flops
            work = replace(work, is_whole=replacement is call or cost >= work.flops)
        remaining[step, branch] = work if replacement is not None or merges.get(branch) else NOTHING
    return remaining


def step_map(loop: Loop, steps: Sequence[StepPlan], done: Mapping[CallKey, Work]) -> dict[str, str]:
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
        for label, nodes in layer_groups(loop).items()
    }


class _Sums:
    """Find rows that a step replaces by weighted sums; equal steps are analysed once."""

    def __init__(self) -> None:
        self._known: dict[Any, bool] = {}

    def has(self, label: str, nodes: Sequence[fx.Node], step: StepPlan) -> bool:
        """Tell whether a first reused value after some nodes is a weighted sum."""
        sums = {item.value: item.is_sum for item in step.reuses}
        key = label, frozenset(sums.items())
        if key not in self._known:
            after = g.reachable(nodes, lambda n: () if n in sums else n.users)
            self._known[key] = any(sums.get(node, False) for node in after)
        return self._known[key]


def _sign(layers: set[str], done: Sequence[Work], is_sum: bool) -> str:
    if all(work.is_whole and layers <= work.names for work in done):
        return "#"
    if any(layers & work.names for work in done):
        return "+"
    return "~" if is_sum else "-"


# Costs


def predicted_flops(loop: Loop, steps: Sequence[StepPlan]) -> int:
    """Return the FLOPs of all calls that the plan alone predicts.

    Weighted sums add none: only matrix products are counted, as in torch.
    """
    costs = [step.flops(loop) for step in steps]
    return sum(costs[step] for step, _ in loop.calls)


def measured_flops(program: Program, loop: Loop) -> int:
    """Return the FLOPs of the loop's calls as they are in the program."""
    calls = Counter(str(call.target) for call in loop_calls(program, loop))
    return sum(n * graph_flops(program.components[name]) for name, n in calls.items())


# Reading


@dataclass(frozen=True)
class StepMapReport:
    """The step map of one component in a pass's record.

    Attributes:
        text: The pass as pipeline text.
        component: The loop's component.
        relative: The error that the pass added to the outputs; None where they were not compared.
        note: The pass's note: `map`, `legend`, `flops`, `bodies`, `peak cache bytes`.
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
    def flops_ratio(self) -> float:
        """The factor by which the loop's FLOPs fell."""
        flops = self.note["flops"]
        return float(flops["before"] / max(1, flops["measured"]))


def step_map_reports(records: Iterable[Record]) -> Iterator[StepMapReport]:
    """Yield the step maps in the records of passes."""
    for record in records:
        for component, note in record.notes.items():
            if is_map(note):
                yield StepMapReport(record.text, component, record.relative, note)


def is_map(note: object) -> bool:
    """Tell whether a note is a step map with its numbers."""
    return isinstance(note, Mapping) and bool(note.get("map"))
