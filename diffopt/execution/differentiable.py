"""Runs a body with gradients to the values of some of its nodes, such as its weights.

Roundings let gradients straight through. What depends on no argument and no such variable is
computed once, so that each run does only what it has to, on the device that is asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.execution import straight_through
from diffopt.ir import graph as g
from diffopt.ir.interpreter import Interpreter
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


class DifferentiableBody:
    """A body that is run many times.

    Attributes:
        results: The nodes that it returns.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        variables: Collection[fx.Node] = (),
        keep: Sequence[fx.Node] = (),
        where: torch.device | None = None,
    ) -> None:
        """Prepare to run a body.

        Args:
            gm: The body.
            variables: Nodes whose values each run brings, such as its weights.
            keep: What is wanted beside the results.
            where: The device; the CPU by default.
        """
        self.results = g.outputs(gm)
        self._placeholders = g.placeholders(gm)
        self._where = where or torch.device("cpu")
        variables, wanted = set(variables), dict.fromkeys([*self.results, *keep])
        needed = g.reachable(wanted, lambda n: () if n in variables else n.all_input_nodes)
        variant = g.descendants([*self._placeholders, *variables])
        constant = [n for n in gm.graph.nodes if n in needed and n not in variant]
        self._interpreter = Interpreter(gm, wanted, [*variables, *constant])
        read = [n for n in constant if n in wanted or not variant.isdisjoint(n.users)]
        with torch.no_grad():
            values = Interpreter(gm, read).values()
        self._constants = {
            n: v.detach().to(self._where) if isinstance(v, Tensor) else v for n, v in values.items()
        }

    def __call__(
        self,
        arguments: Sequence[Tensor],
        variables: Mapping[fx.Node, Tensor] | None = None,
        *,
        straight: bool = True,
    ) -> dict[fx.Node, Tensor]:
        """Return the results and what is kept, by node.

        Args:
            arguments: Of the body, on any device.
            variables: The values of the variables.
            straight: Let gradients through roundings; numbers are floats all the way.
        """
        known = {**self._constants, **(variables or {})}
        moved = [tensor.to(self._where) for tensor in arguments]
        return self._interpreter.values(moved, known, _estimate if straight else None)


def _estimate(run: Interpreter, node: fx.Node) -> Any:
    # Fused attention has a gradient, and does not store all scores.
    if node.target is aten.scaled_dot_product_attention.default:
        return run.run_node(node)
    return straight_through.estimate(run, node)


class DifferentiableCalls:
    """A body that is run for several calls at once, whose values have a leading dimension.

    A body that cannot have that dimension is run call by call.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        variables: Collection[fx.Node] = (),
        keep: Sequence[fx.Node] = (),
        where: torch.device | None = None,
    ) -> None:
        """Prepare to run a body; see `DifferentiableBody`."""
        self._wanted = dict.fromkeys([*g.outputs(gm), *keep])
        self._batched = _batched(gm)
        if self._batched is None:
            self._body = DifferentiableBody(gm, variables, keep, where)
            return
        batched = self._batched.nodes
        nodes = [batched[n] for n in variables], [batched[n] for n in keep]
        self._body = DifferentiableBody(self._batched.graph, *nodes, where)

    def __call__(
        self,
        calls: Sequence[Sequence[Tensor]],
        variables: Mapping[fx.Node, Tensor] | None = None,
        *,
        straight: bool = True,
    ) -> dict[fx.Node, Tensor]:
        """Return the results and what is kept, by node of the body; each [calls, ...].

        Args:
            calls: The arguments of each.
            variables: The values of the variables, the same for all calls.
            straight: Let gradients through roundings.
        """
        variables = variables or {}
        if self._batched is None:
            each = [self._body(arguments, variables, straight=straight) for arguments in calls]
            return {n: torch.stack([values[n] for values in each]) for n in self._wanted}
        rows = [torch.stack(list(column)) for column in zip(*calls, strict=True)]
        nodes = self._batched.nodes
        batched = {nodes[n]: value for n, value in variables.items()}
        values = self._body(rows, batched, straight=straight)
        results = {n: values[nodes[n]] for n in self._wanted}
        # What no argument changes is the same for all calls, and has no such dimension.
        variant = self._batched.batched
        return {
            n: v if n in variant else v.expand(len(calls), *v.shape) for n, v in results.items()
        }


def _batched(gm: fx.GraphModule) -> request_dimension.Batched | None:
    """Return a body for several calls, if there is one that gradients go through alike."""
    try:
        batched = request_dimension.batch_body(gm, [True] * len(g.placeholders(gm)), 2)
    except request_dimension.Unbatchable:
        return None
    alike = straight_through.roundings(batched.graph.graph.nodes) == straight_through.roundings(
        gm.graph.nodes
    )
    return batched if alike else None
