"""Graphs as JSON: the whole IR without pickle and without the model's code."""

import dataclasses
import importlib
import operator
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.errors import DiffoptError
from diffopt.ir import graph as g
from diffopt.ir.call_tags import Tag
from diffopt.ir.printing import target_name

_ENUMS: dict[str, type] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}

_REGISTER = {"quantized_decomposed": "diffopt.ir.qdq", "diffopt": "diffopt.ir.qdq"}
"""The module that registers the operators of a namespace."""

_META = ("module", "where", "reuse")
"""Entries of a node's `meta` that are saved, besides its value and its tag."""


def encode(arg: Any, index: dict[fx.Node, int]) -> Any:
    """Return an fx argument as JSON; `index` numbers the nodes."""
    if arg is None or isinstance(arg, (bool, int, str)):
        return arg
    if isinstance(arg, float):
        return {"float": arg.hex()}  # exact, and has inf and nan
    if isinstance(arg, complex):
        return {"complex": [arg.real.hex(), arg.imag.hex()]}
    if isinstance(arg, fx.Node):
        return {"node": index[arg]}
    if isinstance(arg, list):
        return [encode(item, index) for item in arg]
    if isinstance(arg, tuple):
        return {"tuple": [encode(item, index) for item in arg]}
    if isinstance(arg, slice):
        return {"slice": [encode(item, index) for item in (arg.start, arg.stop, arg.step)]}
    if isinstance(arg, torch.device):
        return {"device": str(arg)}
    for key, kind in _ENUMS.items():
        if isinstance(arg, kind):
            return {key: str(arg).removeprefix("torch.")}
    raise TypeError(f"cannot serialize {arg!r}")


def decode(data: Any, nodes: list[fx.Node]) -> Any:
    """Return the fx argument that `encode` turned into `data`."""
    if isinstance(data, list):
        return [decode(item, nodes) for item in data]
    if not isinstance(data, dict):
        return data
    ((key, value),) = data.items()
    if key == "node":
        return nodes[value]
    if key == "float":
        return float.fromhex(value)
    if key == "complex":
        return complex(*(float.fromhex(part) for part in value))
    if key == "tuple":
        return tuple(decode(item, nodes) for item in value)
    if key == "slice":
        return slice(*(decode(item, nodes) for item in value))
    if key == "device":
        return torch.device(value)
    return getattr(torch, value)


def encode_value(value: Any) -> Any:
    """Return a node's fake value (shape, stride, dtype, device) as JSON."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return [dtype, list(value.shape), list(value.stride()), str(value.device)]
    if isinstance(value, (list, tuple)):
        return {"many": [encode_value(item) for item in value]}
    return {"int": value} if isinstance(value, int) else None


def decode_value(data: Any) -> Any:
    """Return the fake value that `encode_value` turned into `data`."""
    if isinstance(data, dict):
        return data["int"] if "int" in data else tuple(map(decode_value, data["many"]))
    if data is None:
        return None
    dtype, shape, stride, device = data
    with g.FAKE_MODE, torch.no_grad():
        return torch.empty_strided(shape, stride, dtype=getattr(torch, dtype), device=device)


def target_text(node: fx.Node) -> str:
    """Return a node's target as text from which `find_target` finds it."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    return target_name(node)


def find_target(name: str) -> Any:
    """Return the operator called `name`; an unknown one is a `DiffoptError`."""
    space, _, rest = name.partition(".")
    try:
        if space == "operator":
            return getattr(operator, rest)
        if space in _REGISTER:
            importlib.import_module(_REGISTER[space])
        packet, overload = rest.rsplit(".", 1)
        return getattr(getattr(getattr(torch.ops, space), packet), overload)
    except (AttributeError, ValueError):
        raise DiffoptError(
            f"the file needs the operator {name!r}, which this torch {torch.__version__} "
            "does not have; "
            "load it with the torch version that wrote it"
        ) from None


def graph_to_json(gm: fx.GraphModule) -> list[dict[str, Any]]:
    """Return the graph of `gm` as a list of JSON objects, one a node."""
    index: dict[fx.Node, int] = {}
    rows: list[dict[str, Any]] = []
    for node in gm.graph.nodes:
        row: dict[str, Any] = {"op": node.op, "name": node.name, "target": target_text(node)}
        if node.args:
            row["args"] = encode(node.args, index)["tuple"]
        if node.kwargs:
            row["kwargs"] = {k: encode(v, index) for k, v in node.kwargs.items()}
        if node.op != "output":
            row["val"] = encode_value(node.meta.get("val"))
        for key in _META:
            if key in node.meta:
                row[key] = node.meta[key]
        if "tag" in node.meta:
            row["tag"] = dataclasses.asdict(node.meta["tag"])
        index[node] = len(rows)
        rows.append(row)
    return rows


def graph_from_json(
    rows: list[dict[str, Any]],
    name: str,
    tensors: dict[str, Tensor],
    modules: dict[str, fx.GraphModule],
) -> fx.GraphModule:
    """Rebuild a GraphModule called `name` from `graph_to_json`'s rows, tensors and submodules."""
    gm = g.new_body(name)
    for key, tensor in tensors.items():
        if isinstance(tensor, torch.nn.Parameter):
            gm.register_parameter(key, tensor)
        else:
            gm.register_buffer(key, tensor)
    for key, module in modules.items():
        gm.add_module(key, module)
    nodes: list[fx.Node] = []
    for row in rows:
        target = find_target(row["target"]) if row["op"] == "call_function" else row["target"]
        args = tuple(decode(item, nodes) for item in row.get("args", []))
        kwargs = {k: decode(v, nodes) for k, v in row.get("kwargs", {}).items()}
        node = gm.graph.create_node(row["op"], target, args, kwargs, name=row["name"])
        if row["op"] == "output":
            node.meta["val"] = tuple(n.meta["val"] for n in args[0])
        else:
            node.meta["val"] = decode_value(row["val"])
        for key in _META:
            if key in row:
                node.meta[key] = row[key]
        if "tag" in row:
            node.meta["tag"] = Tag(**row["tag"])
        nodes.append(node)
    gm.recompile()
    return gm
