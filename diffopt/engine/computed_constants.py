"""Constants of an engine that its own components compute, for when their weights have changed.

A prompt that is bound, an empty negative one above all, is encoded when the program is rewritten:
the engine stores what came out. Its file also says which calls of components gave it. Passes change
components after that: they drop arguments and results, and change types. So which results are meant
is found by trying: whichever give what is stored.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.ir import graph as g
from diffopt.ir import serialize

aten = torch.ops.aten

Run = Callable[[fx.GraphModule], Tensor]
"""Returns the result of an outer graph without inputs."""

_NEAR = 0.05
"""The largest relative error of a value that is computed again, in bfloat16 perhaps."""
_TRIES = 64


class ComputedConstant:
    """A stored tensor, and the graph that computes it.

    Attributes:
        tensor: Is changed in place.
        names: The weights of the pipeline that it depends on.
    """

    def __init__(
        self,
        tensor: Tensor,
        names: frozenset[str],
        graph: fx.GraphModule,
        components: Mapping[str, Any],
        requests: int | None,
    ) -> None:
        """Take a graph as it was when the tensor was computed.

        Args:
            tensor: The stored tensor.
            names: The weights of the pipeline that it depends on.
            graph: The graph.
            components: The JSON of those that the engine has now.
            requests: How many requests they serve at least, in a dimension in front; None: one, and
                there is no such dimension.
        """
        self.tensor, self.names = tensor, names
        self._graph, self._components = graph, components
        self._skipped = 0 if requests is None else 1
        self._is_found: bool | None = None
        if requests is not None:
            for call in list(self._calls()):
                _serve(call, requests)

    def is_found(self, run: Run) -> bool:
        """Tell whether it is known how to compute it; found out the first time, by running it."""
        if self._is_found is None:
            self._is_found = any(
                self._is_near(run)
                for _ in itertools.islice(self._variants(list(self._calls())), _TRIES)
            )
        return self._is_found

    def compute(self, run: Run) -> None:
        """Compute it anew."""
        self.tensor.copy_(run(self._graph))

    def _is_near(self, run: Run) -> bool:
        try:
            value = run(self._graph)
        except (RuntimeError, ValueError, TypeError, LookupError):
            return False  # a variant whose results the rest of the graph does not take
        if value.shape != self.tensor.shape:
            return False
        expected = self.tensor.double()
        return bool((value.cpu().double() - expected).norm() <= _NEAR * expected.norm())

    def _calls(self) -> Iterator[fx.Node]:
        yield from self._graph.graph.find_nodes(op="call_module")

    def _variants(self, calls: list[fx.Node]) -> Iterator[None]:
        """Let the graph's calls be of components as they are now, in each way in turn."""
        if not calls:
            yield
            return
        call, *rest = calls
        rows = self._components[str(call.target)]["nodes"]
        formals = [serialize.decode_value(r["val"]) for r in rows if r["op"] == "placeholder"]
        outputs = [rows[each["node"]]["val"] for each in rows[-1]["args"][0]["tuple"]]
        results = tuple(map(serialize.decode_value, outputs))
        items = [user for user in call.users if user.target is operator.getitem]
        choices = [
            [i for i, result in enumerate(results) if self._is_like(result, item.meta["val"])]
            for item in items
        ]
        given = call.args
        call.meta["val"] = results
        for arguments in itertools.combinations(given, len(formals)):
            values = [n.meta["val"] for n in g.nodes_in(arguments)]
            if len(values) != len(formals) or not all(map(self._is_like, values, formals)):
                continue
            call.args = arguments
            for chosen in itertools.product(*choices):
                for item, index in zip(items, chosen, strict=True):
                    item.args = (call, index)
                yield from self._variants(rest)
        call.args = given

    def _is_like(self, one: Any, other: Any) -> bool:
        """Compare types and shapes, for any number of requests."""
        if not isinstance(one, Tensor) or not isinstance(other, Tensor):
            return False
        shapes = one.shape[self._skipped :], other.shape[self._skipped :]
        return one.dtype == other.dtype and one.dim() == other.dim() and shapes[0] == shapes[1]


def _serve(call: fx.Node, requests: int) -> None:
    """Let a call be of as many requests, all the same, and take the result of the first."""
    graph = call.graph
    with graph.inserting_before(call):
        call.args = tuple(g.call(graph, aten.stack.default, [n] * requests) for n in call.args)
    for item in list(call.users):
        value = item.meta["val"]
        item.meta["val"] = g.fake(torch.empty([requests, *value.shape], dtype=value.dtype))
        with graph.inserting_after(item):
            first = g.call(graph, aten.select.int, item, 0, 0)
        item.replace_all_uses_with(first)
        first.args = (item, 0, 0)
