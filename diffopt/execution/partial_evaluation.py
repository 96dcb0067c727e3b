"""Evaluates a body with some of its values given, and only as far as what is asked for needs it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.ir import graph as g
from diffopt.ir.program import Program

Values = dict[fx.Node, Tensor]


class Evaluator:
    """Runs a body, or the part of it that is needed."""

    def __init__(self, body: fx.GraphModule) -> None:
        self.results = g.outputs(body)
        self._takes = g.placeholders(body)
        self._nodes = [n for n in body.graph.nodes if n.op == "call_function"]
        self._constants: Values = {
            n: g.attribute(body, str(n.target)) for n in body.graph.nodes if n.op == "get_attr"
        }
        self._orders: dict[Any, list[fx.Node]] = {}

    def run(
        self,
        arguments: Sequence[Tensor],
        given: Mapping[fx.Node, Tensor] | None = None,
        keep: Iterable[fx.Node] = (),
        known: Mapping[fx.Node, Tensor] | None = None,
    ) -> Values:
        """Return the results and the values of `keep`, by node.

        Args:
            arguments: Of the body.
            given: Values that are not computed.
            keep: What to return beside the results.
            known: All values for the same arguments without `given`, to use where that changes
                nothing.
        """
        given = given or {}
        wanted = [*self.results, *keep]
        env: dict[fx.Node, Any] = {**self._constants}
        env.update(zip(self._takes, arguments, strict=True))
        env.update(given)
        for node in self._order(frozenset(given), tuple(wanted), known is not None):
            args, kwargs = fx.map_arg(
                (node.args, node.kwargs),
                lambda n: env[n] if n in env else known[n],  # type: ignore[index]
            )
            env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return {n: env[n] if n in env else known[n] for n in wanted}  # type: ignore[index]

    def everything(self, arguments: Sequence[Tensor]) -> Values:
        """Return all values."""
        return self.run(arguments, keep=self._nodes)

    def _order(
        self, given: frozenset[fx.Node], wanted: tuple[fx.Node, ...], is_partial: bool
    ) -> list[fx.Node]:
        key = given, wanted, is_partial
        if key not in self._orders:
            changed = (g.descendants(given) if is_partial else set(self._nodes)) - given
            needed = g.reachable(
                changed.intersection(wanted), lambda n: changed.intersection(n.all_input_nodes)
            )
            self._orders[key] = [n for n in self._nodes if n in needed]
        return self._orders[key]


def rerun(
    program: Program, known: Mapping[fx.Node, Any], changed: Mapping[fx.Node, Any]
) -> list[Tensor]:
    """Return the outputs of a run whose calls would have given something else.

    Args:
        program: What was run.
        known: All values of the outer graph in that run.
        changed: What some of its calls give now.
    """
    run = fx.Interpreter(program.root)
    run.env = {**known, **{call: tuple(made) for call, made in changed.items()}}
    late = g.descendants(changed) - set(changed)
    with torch.no_grad():
        for node in program.root.graph.nodes:
            if node in late:
                run.env[node] = run.run_node(node)
    return list(run.env[g.output_node(program.root)])
