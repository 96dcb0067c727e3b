"""Runs graphs, whole or in part: torch.fx's interpreter, with a hook for nodes.

    Interpreter(gm).run(x, y)                                     # the results
    Interpreter(gm, [node]).values([x, y])                        # {node: its value}
    Interpreter(gm, known=[node]).run(initial_env={node: value})  # the rest of a run

torch's opens a context for each node, so that errors and traces name it: that takes 5 µs, this
2 µs, and the search for formats or caching schedules runs small operators by the million. Its hooks
are methods to override; here one function computes what a subclass would, and can close over what
it measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import fx

from diffopt.ir import graph as g

Values = dict[fx.Node, Any]

Hook = Callable[["Interpreter", fx.Node], Any]
"""Returns a node's value, from those in the interpreter's `env`; `run_node` is what it replaces."""


class Interpreter(fx.Interpreter):
    """Computes what some nodes of a graph need, and frees each value after its last use.

    What to compute is worked out once, for any number of runs. Gradients are recorded as the caller
    says; components that are called are interpreted too.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        wanted: Iterable[fx.Node] | None = None,
        known: Iterable[fx.Node] = (),
        *,
        also: Iterable[fx.Node] = (),
    ) -> None:
        """Prepare to run a graph.

        Args:
            gm: The outer graph of a program, or a component.
            wanted: The nodes whose values are asked for; by default the graph's outputs.
            known: Nodes whose values each run begins with; what these alone need is not computed.
            also: Nodes that are computed too, for what a hook does there.
        """
        super().__init__(gm, garbage_collect_values=False)
        self._gm = gm
        self._outputs = g.outputs(gm)
        self._wanted = dict.fromkeys(self._outputs if wanted is None else wanted)
        known = set(known)
        needed = g.reachable(
            [*self._wanted, *also], lambda n: () if n in known else n.all_input_nodes
        )
        self._placeholders = g.placeholders(gm)
        self._components: dict[str, Interpreter] = {}
        self._steps: list[tuple[fx.Node, list[fx.Node]]] = []
        read_later = set(self._wanted)
        for node in reversed(gm.graph.nodes):
            if node in needed and node not in known and node.op not in ("placeholder", "output"):
                dead = [n for n in (node, *node.all_input_nodes) if n not in read_later]
                read_later.update(dead)
                self._steps.append((node, dead))
        self._steps.reverse()

    def run(
        self,
        *args: Any,
        initial_env: Mapping[fx.Node, Any] | None = None,
        enable_io_processing: bool = False,
        hook: Hook | None = None,
    ) -> tuple[Any, ...]:
        """Return the graph's results; see `values`."""
        values = self.values(args, initial_env, hook)
        return tuple(values[n] for n in self._outputs)

    def values(
        self,
        arguments: Sequence[Any] = (),
        known: Mapping[fx.Node, Any] | None = None,
        hook: Hook | None = None,
    ) -> Values:
        """Return the values of the wanted nodes.

        Args:
            arguments: Values of all placeholders in order; none where `known` has those needed.
            known: The values of the known nodes.
            hook: Computes each node, apart from placeholders.
        """
        for _ in self.steps(arguments, known, hook):
            pass
        values = {n: self.env[n] for n in self._wanted}
        self.env = {}
        return values

    def steps(
        self,
        arguments: Sequence[Any] = (),
        known: Mapping[fx.Node, Any] | None = None,
        hook: Hook | None = None,
    ) -> Iterator[fx.Node]:
        """Run as `values` does; yield each node once it is computed."""
        self.env = dict(zip(self._placeholders, arguments, strict=True)) if arguments else {}
        self.env.update(known or {})
        compute = hook or Interpreter.run_node
        for node, dead in self._steps:
            self.env[node] = compute(self, node)
            yield node
            for n in dead:
                del self.env[n]

    def arguments(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the values of a node's arguments."""
        return fx.map_arg((n.args, n.kwargs), self.env.__getitem__)

    def run_node(self, n: fx.Node) -> Any:
        """Return a node's value, from those of its arguments."""
        args, kwargs = self.arguments(n)
        return getattr(self, n.op)(n.target, args, kwargs)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Interpret a component: its graph may have changed since it was last compiled."""
        if target not in self._components:
            self._components[target] = Interpreter(g.attribute(self._gm, target))
        return self._components[target].run(*args)
