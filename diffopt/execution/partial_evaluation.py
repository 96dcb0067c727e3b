"""Evaluates a body with some of its values replaced, as far as what is asked for needs it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.ir import graph as g
from diffopt.ir.interpreter import Interpreter
from diffopt.ir.program import Program

Values = dict[fx.Node, Tensor]


class PartialEvaluator:
    """Runs a body, or the part of it that is needed.

    Attributes:
        results: The nodes that the body returns.
    """

    def __init__(self, body: fx.GraphModule) -> None:
        self.results = g.outputs(body)
        self._body = body
        self._operators = [n for n in body.graph.nodes if n.op == "call_function"]
        self._weights: Values = {
            n: g.attribute(body, str(n.target)) for n in body.graph.find_nodes(op="get_attr")
        }
        self._interpreters: dict[Any, Interpreter] = {}

    def run(
        self,
        arguments: Sequence[Tensor],
        replaced: Mapping[fx.Node, Tensor] | None = None,
        keep: Iterable[fx.Node] = (),
        known: Mapping[fx.Node, Tensor] | None = None,
    ) -> Values:
        """Return the results and the values of `keep`, by node.

        Args:
            arguments: Of the body.
            replaced: Values that are not computed.
            keep: What to return beside the results.
            known: All values for the same arguments without `replaced`, to use where that changes
                nothing.
        """
        replaced = replaced or {}
        key = frozenset(replaced), (*self.results, *keep), known is not None
        if key not in self._interpreters:
            self._interpreters[key] = self._interpreter(*key)
        values = {**(known or {}), **self._weights, **replaced}
        return self._interpreters[key].values(arguments, values)

    def everything(self, arguments: Sequence[Tensor]) -> Values:
        """Return the values of all operators."""
        return self.run(arguments, keep=self._operators)

    def _interpreter(
        self, replaced: frozenset[fx.Node], wanted: tuple[fx.Node, ...], is_partial: bool
    ) -> Interpreter:
        changed = g.descendants(replaced) if is_partial else set(self._operators)
        known = [n for n in self._body.graph.nodes if n not in changed or n in replaced]
        return Interpreter(self._body, wanted, known)


def rerun(
    program: Program, known: Mapping[fx.Node, Any], changed: Mapping[fx.Node, Sequence[Tensor]]
) -> list[Tensor]:
    """Return the outputs of a run in which some calls had returned other results.

    Args:
        program: What was run.
        known: All values of the outer graph in that run.
        changed: The other results, by call.
    """
    late = g.descendants(changed)
    early = [n for n in program.root.graph.nodes if n not in late or n in changed]
    results = {call: tuple(tensors) for call, tensors in changed.items()}
    with torch.no_grad():
        return list(Interpreter(program.root, known=early).run(initial_env={**known, **results}))
