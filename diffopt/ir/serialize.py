"""Graphs as JSON: the whole IR without pickle and without the model's code.

What is read is data of others: operators, types and devices are looked up in lists, names are
identifiers, and a node takes only nodes before it. Whatever else a file says is a `DiffoptError`,
or a `ValueError` or the like, which those who read files turn into one.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.ir import allowed_operators
from diffopt.ir import graph as g
from diffopt.ir.call_tags import Tag
from diffopt.ir.printing import target_name

_ENUMS: dict[str, type] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}

_DEVICE = re.compile(r"(cpu|cuda|xpu|mps|meta)(:\d{1,3})?")

# Earlier versions wrote names of weights with the hyphens of their modules.
_ATTRIBUTE = re.compile(r"[A-Za-z_][\w-]*", re.ASCII)

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
    """Return the fx argument that `encode` turned into `data`; a `ValueError` for other data."""
    if isinstance(data, list):
        return [decode(item, nodes) for item in data]
    if not isinstance(data, dict):
        if isinstance(data, float):
            raise ValueError(f"{data} is not written as a number of a graph")
        return data
    ((key, value),) = data.items()
    if key == "node":
        return nodes[_count(value)]
    if key == "float":
        return float.fromhex(value)
    if key == "complex":
        real, imaginary = value
        return complex(float.fromhex(real), float.fromhex(imaginary))
    if key == "tuple":
        return tuple(decode(item, nodes) for item in value)
    if key == "slice":
        start, stop, step = (decode(item, nodes) for item in value)
        return slice(start, stop, step)
    if key == "device":
        return _device(value)
    return _member(key, value)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no number of a node")
    return value


def _device(text: str) -> torch.device:
    if not _DEVICE.fullmatch(text):
        raise ValueError(f"{text!r} is no device")
    return torch.device(text)


def _member(kind: str, name: str) -> Any:
    """Return torch's dtype, layout or memory format of a name."""
    value = getattr(torch, name) if name.isidentifier() else None
    if not isinstance(value, _ENUMS[kind]):
        raise ValueError(f"{name!r} is no {kind}")
    return value


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
        ((kind, value),) = data.items()
        if kind == "int" and isinstance(value, int):
            return value
        if kind != "many":
            raise ValueError(f"{kind!r} is no kind of value")
        return tuple(map(decode_value, value))
    if data is None:
        return None
    dtype, shape, stride, device = data
    if not all(type(number) is int and number >= 0 for number in (*shape, *stride)):
        raise ValueError(f"{shape} with strides {stride} is no shape")
    return g.fake_tensor(shape, stride, _member("dtype", dtype), _device(device))


def target_text(node: fx.Node) -> str:
    """Return a node's target as text from which `find_target` finds it."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    return target_name(node)


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
            tag = dataclasses.asdict(node.meta["tag"])
            row["tag"] = {key: value for key, value in tag.items() if value is not None}
        index[node] = len(rows)
        rows.append(row)
    return rows


def graph_from_json(
    rows: list[dict[str, Any]],
    name: str,
    tensors: dict[str, Tensor],
    modules: dict[str, fx.GraphModule],
    find: Callable[[str], Any] = allowed_operators.find_target,
) -> fx.GraphModule:
    """Rebuild a GraphModule called `name` from `graph_to_json`'s rows, tensors and submodules.

    `find` returns the operator of a name, by default one that any file may call.
    """
    gm = g.new_body(name)
    for key, tensor in tensors.items():
        if not _ATTRIBUTE.fullmatch(key):
            raise ValueError(f"{key[:80]!r} is no name of a tensor")
        if isinstance(tensor, torch.nn.Parameter):
            gm.register_parameter(key, tensor)
        else:
            gm.register_buffer(key, tensor)
    for key, module in modules.items():
        _expect_identifier(key)
        gm.add_module(key, module)
    nodes: list[fx.Node] = []
    for row in rows:
        nodes.append(_node(row, gm, nodes, find))
    ops = [node.op for node in nodes]
    count = ops.count("placeholder")
    if ops.count("output") != 1 or ops[-1] != "output" or "placeholder" in ops[count:]:
        raise ValueError(f"graph {name!r} has not its arguments first and one output last")
    return gm


def _node(
    row: dict[str, Any], gm: fx.GraphModule, nodes: list[fx.Node], find: Callable[[str], Any]
) -> fx.Node:
    """Append the node of a row to the graph; it may take `nodes`, those before it."""
    op, name, target = row["op"], row["name"], row["target"]
    args = tuple(decode(item, nodes) for item in row.get("args", []))
    kwargs = {k: decode(v, nodes) for k, v in row.get("kwargs", {}).items()}
    for each in (name, *kwargs):
        _expect_identifier(each)
    if op == "call_function":
        target = find(target)
    elif op == "output":
        (results,) = args
        if target != "output" or not all(isinstance(n, fx.Node) for n in results):
            raise ValueError(f"{name} does not return values of the graph")
    else:
        if op != "get_attr":
            _expect_identifier(target)
        elif target not in gm._parameters and target not in gm._buffers:
            raise ValueError(f"{name} reads {target!r}, which the file lacks")
        if op != "call_module" and (args or kwargs):
            raise ValueError(f"{name} takes no arguments")
    node = gm.graph.create_node(op, target, args, kwargs, name=name)
    if op == "output":
        node.meta["val"] = tuple(n.meta["val"] for n in args[0])
    else:
        node.meta["val"] = decode_value(row["val"])
    for key in _META:
        if key in row:
            node.meta[key] = row[key]
    if "tag" in row:
        node.meta["tag"] = Tag(**row["tag"])
    return node


def expect_allowed(gm: fx.GraphModule) -> None:
    """Raise a `DiffoptError` for a graph that no file may hold; see `allowed_operators`."""
    for target in {n.target for n in gm.graph.nodes if n.op == "call_function"}:
        allowed_operators.expect_allowed(target)


def _expect_identifier(name: str) -> None:
    if not g.is_identifier(name):
        raise ValueError(f"{name[:80]!r} is no name in a graph")
