"""Runs some calls of a program's components again without some of their units.

What the results then differ by, from those of the whole program on what it has read there, is the
error of leaving the units out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.core.equivalence import squared_relative_error
from diffopt.execution import trajectories
from diffopt.ir import call_tags
from diffopt.ir.flops import graph_flops
from diffopt.ir.interpreter import Interpreter
from diffopt.ir.nodes import args
from diffopt.ir.program import Program
from diffopt.pruning import removal
from diffopt.pruning.coupling import Coupling, Unit

STEPS = 4
"""In how many steps of the loop results are compared, in all branches of guidance."""

FEW = 2
"""On how many requests, which take turns."""


class Ablation:
    """What some calls of a program's components have read and returned.

    Attributes:
        program: The whole one.
        components: Whose calls these are.
    """

    def __init__(
        self,
        program: Program,
        coupling: Coupling,
        components: Sequence[str],
        inputs: Sequence[Sequence[Tensor]],
    ) -> None:
        """Run requests, and keep what some calls read and return.

        Args:
            program: The whole one, which is not changed.
            coupling: Of it.
            components: Whose calls are run again, and cost FLOPs.
            inputs: The flat inputs of requests.
        """
        self.program, self.components = program, list(components)
        self._coupling, self._inputs = coupling, inputs
        self._visits: list[_Visit] = []
        probes = _probes(program, components)
        for turn, request in enumerate(inputs):
            known = trajectories.root_values(program, request)
            for family, steps in probes.items():
                for calls in steps[turn % len(steps) :: len(inputs)]:
                    for call in calls:
                        arguments = [known[n] for n in args(call)]
                        results = list(known[call])
                        self._visits.append(_Visit(family, str(call.target), arguments, results))

    def key(self) -> dict[str, Any]:
        """Return what its numbers depend on beside the units, as JSON."""
        identity = trajectories.identity(self.program, self._inputs)
        return {"ablation": 1, **identity, "components": self.components, "steps": STEPS}

    def without(self, units: Sequence[Unit]) -> Program:
        """Return the program without some units."""
        clone = self.program.clone()
        removal.remove(clone, _moved(self._coupling, self.program, clone), units)
        return clone

    def cost(self, program: Program) -> int:
        """Return the FLOPs of all calls of the components."""
        counts = {name: len(self.program.calls(name)) for name in self.components}
        return sum(n * graph_flops(program.components[name]) for name, n in counts.items())

    def error(self, program: Program) -> float:
        """Return the squared relative error of what calls return: a mean for each component."""
        errors: dict[str, list[float]] = {}
        for visit in self._visits:
            with torch.no_grad():
                results = Interpreter(program.components[visit.name]).run(*visit.arguments)
            error = squared_relative_error(results, visit.results)
            errors.setdefault(visit.family, []).append(error)
        return sum(sum(each) / len(each) for each in errors.values())


@dataclass(frozen=True, eq=False)
class _Visit:
    """One call: what the whole program's component has read and returned."""

    family: str
    name: str
    arguments: list[Tensor]
    results: list[Tensor]


def _probes(program: Program, components: Sequence[str]) -> dict[str, list[list[fx.Node]]]:
    """Return the calls of a few steps, by step, of each component in all of its bodies."""
    calls: dict[str, dict[int, list[fx.Node]]] = {}
    for call in program.calls():
        name, tag = str(call.target), call_tags.tag(call)
        if name in components:
            family, step = (tag.component, tag.step) if tag else (name, 0)
            calls.setdefault(family, {}).setdefault(step, []).append(call)
    return {family: [steps[s] for s in _spread(sorted(steps))] for family, steps in calls.items()}


def _spread(steps: Sequence[int]) -> list[int]:
    """Return a few of some steps, the first and the last among them."""
    places = torch.linspace(0, len(steps) - 1, min(STEPS, len(steps))).round().int()
    return [steps[at] for at in places.tolist()]


def _moved(coupling: Coupling, program: Program, clone: Program) -> Coupling:
    """Return what is coupled in a clone: as in the program, whose weights it shares."""
    nodes: dict[fx.Node, fx.Node] = {}
    for name, gm in program.graphs.items():
        nodes.update(zip(gm.graph.nodes, clone.graphs[name].graph.nodes, strict=True))
    flow = coupling.flow
    moved = replace(
        flow,
        index_selects={
            nodes[n]: [replace(each, operand=nodes[each.operand]) for each in selects]
            for n, selects in flow.index_selects.items()
        },
        values={
            name: {nodes[n]: value for n, value in body.items()}
            for name, body in flow.values.items()
        },
    )
    return replace(coupling, flow=moved)
