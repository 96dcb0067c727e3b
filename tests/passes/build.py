"""Programs written down node by node: exact aten graphs with components, and no export."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.host.inputs import Host
from diffopt.ir import graph as g
from diffopt.ir.program import Program

aten = torch.ops.aten


class Builder:
    """Adds nodes to a graph; tensors among the arguments become constants or weights of it."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.weights: dict[int, fx.Node] = {}

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = torch.utils._pytree.tree_map_only(Tensor, self.weight, (args, kwargs))
        return g.call(self.gm.graph, target, *args, **kwargs)

    def weight(self, tensor: Tensor, name: str = "") -> fx.Node:
        kind = "weight" if isinstance(tensor, torch.nn.Parameter) else "constant"
        if id(tensor) not in self.weights:
            self.weights[id(tensor)] = g.get_attr(self.gm, name or kind, tensor)
        return self.weights[id(tensor)]

    def call(self, component: str, *args: fx.Node | Tensor) -> list[fx.Node]:
        """Call a component; returns a node for each of its results."""
        nodes = tuple(self.weight(a) if isinstance(a, Tensor) else a for a in args)
        body = getattr(self.gm, component)
        node = self.gm.graph.call_module(component, nodes)
        node.meta["val"] = tuple(n.meta["val"] for n in g.outputs(body))
        indices = range(len(node.meta["val"]))
        return [g.call(self.gm.graph, operator.getitem, node, i) for i in indices]


Make = Callable[..., Any]


def body(
    make: Make, *samples: Tensor, name: str = "body", **parts: fx.GraphModule
) -> fx.GraphModule:
    """Return a graph of the nodes that `make(builder, *placeholders)` adds, and its results."""
    gm = g.new_body(name)
    for part, module in parts.items():
        gm.add_module(part, module)
    placeholders = []
    for index, sample in enumerate(samples):
        placeholders.append(gm.graph.placeholder(f"x{index}" if len(samples) > 1 else "x"))
        placeholders[-1].meta["val"] = g.fake(sample)
    returned = make(Builder(gm), *placeholders)
    results: Sequence[fx.Node] = returned if isinstance(returned, (list, tuple)) else [returned]
    gm.graph.output(tuple(results))
    g.set_outputs(gm, results)
    gm.recompile()
    return gm


def program(make: Make, *samples: Tensor, **components: fx.GraphModule) -> Program:
    """Return a program whose root graph is `make`'s, with these components to call."""
    root = body(make, *samples, name="program", **components)
    built = Program(root, Host([], {"tensor": 0}, {}), list(samples))
    built.verify()
    return built


def parameter(*shape: int, seed: int = 0) -> torch.nn.Parameter:
    """Return a random weight."""
    source = torch.Generator().manual_seed(seed)
    return torch.nn.Parameter(torch.randn(shape, generator=source), requires_grad=False)


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Return a random tensor."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
