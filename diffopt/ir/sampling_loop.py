"""The sampling loop of an unrolled program: calls of one component, step after step."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from diffopt.errors import DiffoptError
from diffopt.ir import call_tags, nodes
from diffopt.ir import graph as g
from diffopt.ir.flops import graph_flops, node_flops
from diffopt.ir.program import Program

CallKey = tuple[int, int]
"""A call of the loop: its step and its branch."""


@dataclass(eq=False)
class Loop:
    """The calls of the component that a sampling loop spends most on.

    Attributes:
        program: The program.
        name: The component's name.
        body: The component's graph.
        calls: By step and branch, both counted from 0, in the order of the graph.
        steps: The number of steps.
        branches: The largest number of calls in a step.
    """

    program: Program
    name: str
    body: fx.GraphModule
    calls: dict[CallKey, fx.Node]
    steps: int
    branches: int

    def flops(self, values: Iterable[fx.Node] = ()) -> int:
        """Return the FLOPs of one call to which these values are passed as arguments."""
        reused = dict.fromkeys(values)
        return self.cost(self.live_nodes(reused) - reused.keys())

    def cost(self, nodes: Iterable[fx.Node]) -> int:
        """Return the FLOPs of some nodes of the body."""
        return sum(self._costs.get(node, 0) for node in nodes)

    @cached_property
    def _costs(self) -> dict[fx.Node, int]:
        functions = [n for n in self.body.graph.nodes if n.op == "call_function"]
        return {n: node_flops(n) for n in functions if n.target is not operator.getitem}

    @cached_property
    def positions(self) -> dict[fx.Node, int]:
        """The index of each node in the body."""
        return {node: i for i, node in enumerate(self.body.graph.nodes)}

    @cached_property
    def loop_variant(self) -> list[fx.Node]:
        """The placeholders of the body whose arguments depend on an earlier call of the loop."""
        variant = g.descendants(self.calls.values())
        calls = self.calls.values()
        formals = enumerate(g.placeholders(self.body))
        return [n for i, n in formals if any(call.args[i] in variant for call in calls)]

    def live_nodes(
        self, reused: Mapping[fx.Node, fx.Node | None], more: Iterable[fx.Node] = ()
    ) -> set[fx.Node]:
        """Return the nodes that the results and `more` need where values are reused.

        A reused value needs none of its inputs, only the base that `reused` has for it, if any.
        """

        def needs(node: fx.Node) -> Iterable[fx.Node]:
            if node not in reused:
                return node.all_input_nodes
            base = reused[node]
            return () if base is None else (base,)

        return g.reachable([*g.outputs(self.body), *more], needs)


def find_loop(program: Program) -> Loop:
    """Return the calls on which the program spends most; a `DiffoptError` without a loop."""
    loops: dict[str, dict[CallKey, fx.Node]] = {}
    for call in program.calls():
        if (tag := call_tags.tag(call)) is not None:
            loops.setdefault(str(call.target), {})[tag.step, tag.branch] = call
    loops = {n: calls for n, calls in loops.items() if len({step for step, _ in calls}) > 1}
    if not loops:
        raise DiffoptError(
            "no component is called in more than one step, so there are no values of an earlier "
            "step: sample in two or more steps, as with unroll(steps=20)"
        )
    name = max(loops, key=lambda n: graph_flops(program.components[n]) * len(loops[n]))
    if _passes_constants(program, name):
        raise DiffoptError(
            f"{name} is not unrolled, its calls pass the timestep: run `unroll` first, as in "
            "unroll,hoist,cache"
        )
    steps, branches = (sorted(set(numbers)) for numbers in zip(*loops[name], strict=True))
    calls = {(steps.index(s), branches.index(b)): call for (s, b), call in loops[name].items()}
    return Loop(program, name, program.components[name], calls, len(steps), len(branches))


def _passes_constants(program: Program, name: str) -> bool:
    """Tell whether some argument, such as the timestep, is another constant in each call."""
    for actual in zip(*(nodes.args(call) for call in program.calls(name)), strict=True):
        if all(node.op == "get_attr" for node in actual) and len({n.target for n in actual}) > 1:
            return True
    return False
