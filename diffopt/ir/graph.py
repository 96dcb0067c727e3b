"""Build, walk, copy, sort and prune fx graphs: the root graph and bodies of components alike.

A node's `meta["val"]` is a FakeTensor of the process-wide mode `FAKE_MODE`, so that values of
graphs captured at different times can be mixed.
"""

import keyword
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from diffopt.errors import VerifyError

aten = torch.ops.aten

FAKE_MODE = FakeTensorMode(allow_non_fake_inputs=True)
_CPU = torch.device("cpu")


def fake(value: Any, dtype: torch.dtype | None = None) -> Any:
    """Return `value` with every tensor replaced by a FakeTensor of the same shape and strides.

    `dtype` is their type, where it is to be another.
    """
    if isinstance(value, Tensor):
        device = _CPU if value.device.type == "meta" else value.device
        return fake_tensor(value.shape, value.stride(), dtype or value.dtype, device)
    if isinstance(value, (list, tuple)):
        return type(value)(fake(item, dtype) for item in value)
    return value


def is_identifier(name: str) -> bool:
    """Tell whether a name can stand in a graph: generated code and exporters write it as it is."""
    return name.isascii() and name.isidentifier() and not keyword.iskeyword(name)


def identifier(name: str) -> str:
    """Return a name near `name` that can stand in a graph."""
    name = re.sub(r"\W", "_", name, flags=re.ASCII) or "_"
    return f"_{name}" if name[0].isdigit() or keyword.iskeyword(name) else name


def fake_tensor(
    shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return a FakeTensor."""
    # Not `empty_strided` in the mode: to dispatch it takes six times as long.
    meta = torch.empty_strided(
        tuple(map(int, shape)), tuple(map(int, stride)), dtype=dtype, device="meta"
    )
    return FakeTensor(FAKE_MODE, meta, device)


def attribute(owner: torch.nn.Module, name: str) -> Any:
    """Return the attribute of `owner` with a dotted name."""
    for part in name.split("."):
        owner = getattr(owner, part)
    return owner


def add_attribute(gm: fx.GraphModule, name: str, value: Tensor) -> str:
    """Register a weight or constant on `gm` under a free name near `name`; return that name.

    A tensor that `gm` already has keeps its name, so that weights are never listed twice.
    """
    for existing, tensor in named_tensors(gm):
        if tensor is value:
            return existing
    return register(gm, name, value)


def register(gm: fx.GraphModule, name: str, value: Tensor) -> str:
    """Register a tensor that `gm` does not have under a free name near `name`; return that name."""
    name = identifier(name or "constant")
    base, count = name, 0
    while hasattr(gm, name):
        count += 1
        name = f"{base}_{count}"
    if isinstance(value, torch.nn.Parameter):
        gm.register_parameter(name, value)
    else:
        gm.register_buffer(name, value)
    return name


def named_tensors(gm: fx.GraphModule) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of `gm` itself by name, without those of submodules."""
    yield from gm._parameters.items()  # type: ignore[misc]
    yield from gm._buffers.items()  # type: ignore[misc]


def get_attr(gm: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    """Insert, at the graph's current insertion point, a `get_attr` node for a tensor."""
    node = gm.graph.get_attr(add_attribute(gm, name, value))
    node.meta["val"] = fake(value)
    return node


def call(
    graph: fx.Graph, target: Any, *args: Any, like: fx.Node | None = None, **kwargs: Any
) -> fx.Node:
    """Insert a `call_function` node at the current insertion point, and infer its value.

    The new node's provenance (`module`, `where`) is copied from `like`.
    """
    node = graph.call_function(target, args, kwargs)
    for key in ("module", "where"):
        if like is not None and key in like.meta:
            node.meta[key] = like.meta[key]
    node.meta["val"] = infer_value(node)
    return node


def to_dtype(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Return a node of the same tensor in `dtype`: the node itself if that is its dtype."""
    if node.meta["val"].dtype == dtype:
        return node
    return call(graph, aten._to_copy.default, node, dtype=dtype)


def infer_value(node: fx.Node) -> Any:
    """Return the fake value of a `call_function` node, inferred from its arguments' values."""
    return fake_call(node.target, node.args, node.kwargs)


def fake_call(target: Any, arguments: Any, kwargs: Mapping[str, Any] | None = None) -> Any:
    """Return the fake result of an operator on arguments that may be nodes or contain them."""
    args, kwargs = fx.map_arg((arguments, kwargs or {}), lambda n: n.meta["val"])
    with FAKE_MODE, torch.no_grad():
        return target(*args, **kwargs)


def prune_unused(gm: fx.GraphModule) -> bool:
    """Remove dead nodes, then unused tensors and submodules; return whether any were there."""
    changed = gm.graph.eliminate_dead_code(
        is_impure_node=lambda n: n.op in ("placeholder", "output")
    )
    used = {str(n.target) for n in gm.graph.nodes if n.op in ("get_attr", "call_module")}
    for store in (gm._parameters, gm._buffers, gm._modules):
        for name in [name for name in store if name not in used]:
            del store[name]
            changed = True
    return bool(changed)


def placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    """Return the placeholder nodes of `gm` in order."""
    return list(gm.graph.find_nodes(op="placeholder"))


def output_node(gm: fx.GraphModule) -> fx.Node:
    """Return the output node of `gm`."""
    return gm.graph.output_node()


def outputs(gm: fx.GraphModule) -> list[fx.Node]:
    """Return the nodes that `gm` returns, in order."""
    return list(output_node(gm).args[0])  # type: ignore[arg-type]


def set_outputs(gm: fx.GraphModule, nodes: Sequence[fx.Node]) -> None:
    """Make `gm` return `nodes`."""
    output_node(gm).args = (tuple(nodes),)
    output_node(gm).meta["val"] = tuple(n.meta["val"] for n in nodes)


class _CompileOnCall:
    """The `forward` of a graph whose code is written when it is first asked for."""

    def __get__(self, gm: "_Body | None", owner: type) -> Any:
        if gm is None:
            return self
        gm._real_recompile()
        return gm.forward


class _Body(_LazyGraphModule):
    """A graph that is compiled when it is called, not each time that it is copied or changed."""

    # torch's own stands for every signature, and exporters read the arguments' names.
    forward = _lazy_forward = _CompileOnCall()


def new_body(name: str) -> fx.GraphModule:
    """Return an empty GraphModule to build a component in."""
    return _Body(torch.nn.Module(), fx.Graph(), class_name=name)


def copy_nodes(
    nodes: Iterable[fx.Node],
    source: fx.GraphModule,
    target: fx.GraphModule,
    env: dict[fx.Node, fx.Node],
) -> None:
    """Append copies of `nodes` (in topological order) to `target`.

    `env` maps old nodes to new ones and is extended; nodes that it maps already are not copied.
    Weights and submodules are shared by reference.
    """
    for node in nodes:
        if node in env:
            continue
        if node.op == "get_attr":
            copy = get_attr(target, str(node.target), attribute(source, str(node.target)))
            copy.meta = {**node.meta, "val": copy.meta["val"]}
        else:
            copy = target.graph.node_copy(node, lambda n: env[n])
            if node.op == "call_module" and not hasattr(target, str(node.target)):
                target.add_submodule(str(node.target), attribute(source, str(node.target)))
        env[node] = copy


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the nodes and all nodes that they are computed from."""
    return reachable(nodes, lambda node: node.all_input_nodes)


def descendants(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the nodes and all nodes that are computed from them."""
    return reachable(nodes, lambda node: node.users)


def reachable(
    nodes: Iterable[fx.Node], neighbours: Callable[[fx.Node], Iterable[fx.Node]]
) -> set[fx.Node]:
    """Return the nodes and all nodes that can be reached from them over `neighbours`."""
    visited: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in visited:
            visited.add(node)
            stack.extend(neighbours(node))
    return visited


def extract_subgraph(
    body: fx.GraphModule, arguments: Sequence[fx.Node], results: Sequence[fx.Node], name: str
) -> fx.GraphModule:
    """Return a new body that computes `results` from `arguments`, placeholders of `body`."""
    subgraph, env = new_body(name), dict[fx.Node, fx.Node]()
    needed = ancestors(results) - set(arguments)
    copy_nodes([*arguments, *(n for n in body.graph.nodes if n in needed)], body, subgraph, env)
    subgraph.graph.output(tuple(env[v] for v in results))
    set_outputs(subgraph, [env[v] for v in results])
    subgraph.recompile()
    return subgraph


def copy_inlined(
    nodes: Iterable[fx.Node],
    source: fx.GraphModule,
    target: fx.GraphModule,
    env: dict[fx.Node, fx.Node],
) -> None:
    """Append copies of `nodes`, with the bodies of component calls inlined; see `copy_nodes`."""
    results: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        if node.op == "call_module":
            body = attribute(source, str(node.target))
            actual = [env[a] for a in node.args if isinstance(a, fx.Node)]
            inner = dict(zip(placeholders(body), actual, strict=True))
            copy_nodes(
                [n for n in body.graph.nodes if n.op not in ("placeholder", "output")],
                body,
                target,
                inner,
            )
            results[node] = [inner[n] for n in outputs(body)]
        elif node.target is operator.getitem and node.args[0] in results:
            env[node] = results[node.args[0]][node.args[1]]  # type: ignore[index]
        else:
            copy_nodes([node], source, target, env)


def sort_topologically(gm: fx.GraphModule) -> None:
    """Move nodes behind their inputs, in the order of before; a cycle is a `VerifyError`."""
    done: set[fx.Node] = set()
    begun: set[fx.Node] = set()
    nodes = list(gm.graph.nodes)
    last = gm.graph._root
    for node in nodes:
        stack = [node]
        while stack:
            top = stack[-1]
            waiting = [n for n in top.all_input_nodes if n not in done]
            if waiting:
                begun.add(top)
                if not begun.isdisjoint(waiting):
                    raise VerifyError(f"{top.name} depends on itself")
                stack.extend(waiting)
                continue
            stack.pop()
            if top not in done:
                done.add(top)
                last.append(top)
                last = top


def trace_batched(
    function: Callable[..., Any], in_dims: Sequence[int | None], examples: Sequence[Tensor]
) -> fx.GraphModule:
    """Return what `torch.vmap` makes of a function, as a graph that `import_traced` takes.

    Args:
        function: Of tensors.
        in_dims: As for `torch.vmap`.
        examples: The arguments, with the dimension where `in_dims` has one.
    """
    batched = torch.vmap(function, in_dims=tuple(in_dims))
    # Rules of batching write in place, which graphs do not.
    functional = torch.func.functionalize(batched, remove="mutations")
    with torch.no_grad():
        make = make_fx(functional, tracing_mode="fake", _allow_non_fake_inputs=True)
        traced = make(*examples)
    assert isinstance(traced, fx.GraphModule)
    return traced


def import_traced(traced: fx.GraphModule, source: fx.GraphModule, name: str) -> fx.GraphModule:
    """Return the graph that `make_fx` traced of `source` as a body that shares its weights."""
    body = new_body(name)
    names = {id(tensor): key for key, tensor in named_tensors(source)}
    env: dict[fx.Node, fx.Node] = {}
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            tensor = attribute(traced, str(node.target))
            env[node] = get_attr(body, names.get(id(tensor), str(node.target)), tensor)
            continue
        env[node] = body.graph.node_copy(node, lambda n: env[n])
        if node.op == "output":
            set_outputs(body, [env[n] for n in node.args[0]])
        else:
            env[node].meta = {"val": fake(node.meta["val"])}
    prune_unused(body)
    body.recompile()
    return body


def clone(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of the graph; weights and submodules are shared by reference."""
    copy = new_body(type(gm).__name__)
    copy._modules.update(gm._modules)
    copy._parameters.update(gm._parameters)
    copy._buffers.update(gm._buffers)
    env: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        env[node] = copy.graph.node_copy(node, env.__getitem__)
        if env[node].name != node.name:
            env[node].name = node.name
    copy.recompile()
    return copy


def memory_layout(value: Any) -> tuple[Any, ...] | None:
    """Return a tensor's dtype, device, shape, strides and offset; None for other values."""
    if not isinstance(value, Tensor):
        return None
    return value.dtype, value.device, tuple(value.shape), value.stride(), value.storage_offset()


def nodes_in(arguments: Any) -> list[fx.Node]:
    """Return the nodes in nested arguments."""
    nodes: list[fx.Node] = []
    fx.map_arg(arguments, nodes.append)
    return nodes


def value_bytes(value: Any) -> int:
    """Return the bytes of a node's value: of a tensor, of all in a tuple; 0 for anything else."""
    if isinstance(value, (list, tuple)):
        return sum(map(value_bytes, value))
    return value.nbytes if isinstance(value, Tensor) else 0


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors, each counted once."""
    unique = {id(t): t for t in tensors}  # holds them, so that no two share an id
    return sum(t.numel() * t.element_size() for t in unique.values())
