"""Runs a body with gradients to values that are given for some of its nodes, such as its weights.

Roundings let gradients straight through (`ste`). What no argument and no given value changes is
computed once, so that each run does only what it has to, on the device that is asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, fx

from diffopt.execution import straight_through
from diffopt.ir import graph as g
from diffopt.transforms import request_dimension

aten = torch.ops.aten

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The types of weights that gradients change; E4M3 numbers are stored for their bits."""


def device() -> torch.device:
    """Return where there is most to compute with: the GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def read_weights(gm: fx.GraphModule) -> dict[fx.Node, Tensor]:
    """Return the floating-point tensors that a body reads, by the nodes that read them."""
    nodes = {n: g.attribute(gm, str(n.target)) for n in gm.graph.find_nodes(op="get_attr")}
    return {n: t for n, t in nodes.items() if t.dtype in FLOATS and t.numel()}


class Body:
    """A body that is run many times.

    Attributes:
        results: The nodes that it returns.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        given: Collection[fx.Node] = (),
        keep: Sequence[fx.Node] = (),
        where: torch.device | None = None,
    ) -> None:
        """Prepare to run a body.

        Args:
            gm: The body.
            given: Nodes whose values each run brings.
            keep: What is wanted beside the results.
            where: The device; the CPU by default.
        """
        self.results = g.outputs(gm)
        self._wanted = {*self.results, *keep}
        self._takes = g.placeholders(gm)
        self._where = where or torch.device("cpu")
        given = set(given)
        needed = g.reachable(self._wanted, lambda n: () if n in given else n.all_input_nodes)
        living = g.descendants([*self._takes, *given])
        order = [n for n in gm.graph.nodes if n in needed]
        self._nodes = [n for n in order if n in living and n.op == "call_function"]
        self._nodes = [n for n in self._nodes if n not in given]
        self._constants = self._fixed(gm, [n for n in order if n not in living])
        self._last: dict[fx.Node, list[fx.Node]] = {}
        seen = set(self._wanted)
        for node in reversed(self._nodes):
            self._last[node] = [n for n in node.all_input_nodes if n not in seen]
            seen.update(self._last[node])

    def _fixed(self, gm: fx.GraphModule, nodes: Sequence[fx.Node]) -> straight_through.Values:
        """Return the values that are the same in all runs, as far as these read them."""
        values: straight_through.Values = {
            n: g.attribute(gm, str(n.target)).detach() for n in nodes if n.op == "get_attr"
        }
        with torch.no_grad():
            straight_through.run((n for n in nodes if n.op == "call_function"), values)
        read = {n for node in self._nodes for n in node.all_input_nodes} | self._wanted
        return {
            n: v.to(self._where) if isinstance(v, Tensor) else v
            for n, v in values.items()
            if n in read
        }

    def __call__(
        self,
        arguments: Sequence[Tensor],
        given: Mapping[fx.Node, Tensor] | None = None,
        *,
        straight: bool = True,
    ) -> dict[fx.Node, Tensor]:
        """Return the results and what is kept, by node.

        Args:
            arguments: Of the body, on any device.
            given: The values of the nodes that were said to be given.
            straight: Let gradients through roundings; numbers are floats all the way.
        """
        values: straight_through.Values = {**self._constants, **(given or {})}
        values |= {n: t.to(self._where) for n, t in zip(self._takes, arguments, strict=True)}
        for node in self._nodes:
            # Fused attention has a gradient, and does not store all scores.
            fused = node.target is aten.scaled_dot_product_attention.default
            straight_through.run([node], values, straight=straight and not fused)
            for dead in self._last[node]:
                values.pop(dead)
        return {node: values[node] for node in self._wanted}


class Calls:
    """A body that is run for several calls at once, whose values have a leading dimension.

    A body that cannot have that dimension is run call by call.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        given: Collection[fx.Node] = (),
        keep: Sequence[fx.Node] = (),
        where: torch.device | None = None,
    ) -> None:
        """Prepare to run a body; see `Body`."""
        self._wanted = dict.fromkeys([*g.outputs(gm), *keep])
        self._batched = _batched(gm)
        if self._batched is None:
            self._body = Body(gm, given, keep, where)
            return
        own = self._batched.nodes
        nodes = [own[n] for n in given], [own[n] for n in keep]
        self._body = Body(self._batched.graph, *nodes, where)

    def __call__(
        self,
        calls: Sequence[Sequence[Tensor]],
        given: Mapping[fx.Node, Tensor] | None = None,
        *,
        straight: bool = True,
    ) -> dict[fx.Node, Tensor]:
        """Return the results and what is kept, by node of the body; each [calls, ...].

        Args:
            calls: The arguments of each.
            given: The values of the nodes that were said to be given, for all of them.
            straight: Let gradients through roundings.
        """
        given = given or {}
        if self._batched is None:
            made = [self._body(arguments, given, straight=straight) for arguments in calls]
            return {n: torch.stack([values[n] for values in made]) for n in self._wanted}
        rows = [torch.stack(list(column)) for column in zip(*calls, strict=True)]
        nodes = self._batched.nodes
        own = {nodes[n]: value for n, value in given.items()}
        values = self._body(rows, own, straight=straight)
        found = {n: values[nodes[n]] for n in self._wanted}
        # What no argument changes is the same for all calls, and has no such dimension.
        changing = self._batched.batched
        return {n: v if n in changing else v.expand(len(calls), *v.shape) for n, v in found.items()}


def _batched(gm: fx.GraphModule) -> request_dimension.Batched | None:
    """Return a body for several calls, if there is one that gradients go through alike."""
    try:
        made = request_dimension.batch_body(gm, [True] * len(g.placeholders(gm)), 2)
    except request_dimension.Unbatchable:
        return None
    alike = straight_through.roundings(made.graph.graph.nodes) == straight_through.roundings(
        gm.graph.nodes
    )
    return made if alike else None
