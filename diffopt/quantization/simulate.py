"""Runs a program with some of its layers quantized, without rewriting it.

A layer is computed by a small graph, in which `qdq` has written the same operators that
it writes into a quantized program, so that the numbers are those that this would give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.analysis.scope import Scope
from diffopt.execution.trajectories import run_root
from diffopt.ir import graph as g
from diffopt.ir import qdq
from diffopt.ir.interpreter import Interpreter
from diffopt.ir.nodes import args, stored_tensor
from diffopt.ir.program import Program
from diffopt.quantization.quantize_body import Format, RangeOf, WeightStore, range_qparams

ROOM = 1 << 30
"""How many bytes of widened weights of a component are kept between calls."""


class Layers:
    """The layers of one component, to be computed as if they were quantized."""

    def __init__(self, body: fx.GraphModule, ranges: RangeOf | None, store: WeightStore) -> None:
        self.body = body
        self.interpreter = Interpreter(body)
        self.ranges = ranges
        self.by_node = {layer.node: layer for layer in qdq.layers(body)}
        self._store = store
        self._known: dict[tuple[fx.Node, Format], tuple[fx.GraphModule, list[fx.Node]]] = {}
        self._wide: dict[tuple[fx.Node, Format], Tensor] = {}
        self._room = ROOM

    def value(
        self,
        node: fx.Node,
        how: Format,
        step: int,
        read: Callable[[fx.Node], Tensor],
    ) -> Tensor:
        """Return what a layer would give in a format, of values that `read` returns."""
        layer = self.by_node[node]
        if (node, how) not in self._known:
            self._known[node, how] = self._body(layer, how)
        body, reads = self._known[node, how]
        arguments = [self._weight(layer, how)]
        for n in reads:
            is_stored = n.op == "get_attr"
            arguments.append(g.attribute(self.body, str(n.target)) if is_stored else read(n))
        if how.activations == "static":
            assert self.ranges is not None
            scale, zero = range_qparams(how.input, *self.ranges(layer.x, step))
            arguments.append(torch.tensor(scale))
            arguments += [] if how.input == "fp8" else [torch.tensor(zero, dtype=torch.int32)]
        result: Tensor = body(*arguments)[0]
        return result

    def _weight(self, layer: qdq.Layer, how: Format) -> Tensor:
        """Return the weight that a quantized one stands for; little ones are kept."""
        key = layer.weight, how
        if key not in self._wide:
            tensor = stored_tensor(self.body, layer.weight)
            assert tensor is not None
            gm = g.new_body("weight")
            node = qdq.place_weight(gm, "weight", self._store(tensor, how), tensor.dtype)
            gm.graph.output((node,))
            gm.recompile()
            wide: Tensor = gm()[0]
            if wide.nbytes > self._room:
                return wide
            self._room -= wide.nbytes
            self._wide[key] = wide
        return self._wide[key]

    def _body(self, layer: qdq.Layer, how: Format) -> tuple[fx.GraphModule, list[fx.Node]]:
        """Return a graph of one layer, and what it reads between its weight and its scales."""
        gm, node = g.new_body("layer"), layer.node
        weight = _placeholder(gm, "weight", layer.weight.meta["val"])
        reads = [n for n in node.all_input_nodes if n is not layer.weight]
        env = {n: _placeholder(gm, f"x{i}", n.meta["val"]) for i, n in enumerate(reads)}
        qparams: list[fx.Node] = []
        if how.activations == "static":
            qparams = [_placeholder(gm, "scale", g.fake(torch.tensor(1.0)))]
            if how.input != "fp8":
                zero = g.fake(torch.tensor(0, dtype=torch.int32))
                qparams.append(_placeholder(gm, "zero", zero))
        x = env[layer.x]
        if how.activations != "none":
            x = qdq.quantize(gm, x, how.activations, *qparams, number=how.input)
        rest = fx.map_arg(args(node)[2:], env.__getitem__)
        more: dict[str, Any] = fx.map_arg(node.kwargs, env.__getitem__)
        result = g.call(gm.graph, node.target, x, weight, *rest, **more)
        gm.graph.output((result,))
        gm.recompile()
        return gm, reads


def _placeholder(gm: fx.GraphModule, name: str, value: Any) -> fx.Node:
    node = gm.graph.placeholder(name)
    node.meta["val"] = value
    return node


class Simulator:
    """Runs a program as if some layers of the components in scope were quantized.

    Attributes:
        program: Which.
        scope: The components, and their calls.
        layers: Of each component.
        steps: Of the calls of each component, in order.
    """

    def __init__(
        self, program: Program, scope: Scope, ranges: Mapping[str, RangeOf], store: WeightStore
    ) -> None:
        """Prepare to run a program.

        Args:
            program: Which.
            scope: The components, and their calls.
            ranges: The ranges of inputs with static scales, by component.
            store: Quantizes weights.
        """
        self.program, self.scope = program, scope
        bodies = program.components
        self.layers = {n: Layers(bodies[n], ranges.get(n), store) for n in scope.calls}
        self.steps = {n: sorted({step for _, step in calls}) for n, calls in scope.calls.items()}
        self._site = {
            call: (name, step) for name, calls in scope.calls.items() for call, step in calls
        }

    def call(
        self, name: str, formats: Mapping[fx.Node, Format], step: int, arguments: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the results of a call of a component whose layers have some formats."""
        layers = self.layers[name]

        def compute(run: Interpreter, node: fx.Node) -> Any:
            if node not in formats:
                return run.run_node(node)
            return layers.value(node, formats[node], step, run.env.__getitem__)

        with torch.no_grad():
            return list(layers.interpreter.run(*arguments, hook=compute))

    def run(
        self, inputs: Sequence[Tensor], formats: Mapping[str, Mapping[fx.Node, Format]]
    ) -> list[Tensor]:
        """Return the outputs of the program for a request if layers have some formats."""

        def quantized(call: fx.Node, arguments: Sequence[Tensor]) -> list[Tensor] | None:
            name, step = self._site.get(call, ("", 0))
            return self.call(name, formats[name], step, arguments) if name in formats else None

        return run_root(self.program, inputs, quantized)
