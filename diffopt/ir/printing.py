"""Graphs as text with stable numbering, and hashes of them."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.ir.graph import attribute


def target_name(node: fx.Node) -> str:
    """Return a stable, readable name of a node's target."""
    if isinstance(node.target, str):
        return node.target
    if isinstance(node.target, torch._ops.OpOverload):
        name = str(node.target)
        return name.removesuffix(".default")
    return f"operator.{node.target.__name__}"


def format_type(value: Any) -> str:
    """Return a value's dtype and shape, such as `float32[2,3]`."""
    if isinstance(value, Tensor):
        shape = ",".join(str(s) for s in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}[{shape}]"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(format_type(item) for item in value) + ")"
    return type(value).__name__


def format_graph(gm: fx.GraphModule, constants: Callable[[Tensor], str] | None = None) -> str:
    """Return the graph as text with stable numbering, one node a line.

    `constants` describes the tensor of a `get_attr`, for hashes; see `graph_fingerprint`.
    """
    names: dict[fx.Node, str] = {}
    lines = []

    def show(arg: Any) -> str:
        if isinstance(arg, fx.Node):
            return names[arg]
        if isinstance(arg, (list, tuple)):
            inner = ", ".join(show(item) for item in arg)
            return f"[{inner}]" if isinstance(arg, list) else f"({inner})"
        return str(arg).removeprefix("torch.") if not isinstance(arg, str) else repr(arg)

    for node in gm.graph.nodes:
        if node.op == "output":
            lines.append(f"return {', '.join(names[n] for n in node.args[0])}")
            continue
        names[node] = f"%{node.name}" if node.op == "placeholder" else f"%{len(names)}"
        left = f"{names[node]}: {format_type(node.meta.get('val'))}"
        if node.op == "placeholder":
            lines.append(left)
        elif node.op == "get_attr":
            extra = f" {constants(attribute(gm, str(node.target)))}" if constants else ""
            lines.append(f"{left} = {node.target}{extra}")
        else:
            arguments = [show(a) for a in node.args]
            arguments += [f"{k}={show(v)}" for k, v in node.kwargs.items()]
            lines.append(f"{left} = {target_name(node)}({', '.join(arguments)})")
    return "\n".join(lines)


def identity_text(tensor: Tensor) -> str:
    """Describe a tensor by identity and version: tells a changed weight without reading it."""
    return f"#{id(tensor):x}v{tensor._version}"


def graph_fingerprint(
    gm: fx.GraphModule, constants: Callable[[Tensor], str] = identity_text
) -> str:
    """Return a hash of the graph and of its constants as `constants` describes them."""
    return hashlib.sha256(format_graph(gm, constants).encode()).hexdigest()
