"""fx helpers shared by capture, passes and targets: values, printing, hashing, copying, costs.

Everything here works on the two levels of a program alike. A node's `meta["val"]` is a FakeTensor
of the process-wide mode `FAKE`, so values of graphs captured at different times can be mixed.
"""

import hashlib
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from diffopt.errors import VerifyError

aten = torch.ops.aten

FAKE = FakeTensorMode(allow_non_fake_inputs=True)


def fake(value: Any) -> Any:
    """Return `value` with every tensor replaced by a FakeTensor of `FAKE` of the same layout."""
    if isinstance(value, Tensor):
        # A parameter's fake would count as one more leaf that requires a gradient.
        with FAKE, torch.no_grad():
            return torch.empty_strided(
                tuple(int(s) for s in value.shape),
                tuple(int(s) for s in value.stride()),
                dtype=value.dtype,
                device=value.device if value.device.type != "meta" else "cpu",
            )
    if isinstance(value, (list, tuple)):
        return type(value)(fake(item) for item in value)
    return value


def attribute(owner: torch.nn.Module, name: str) -> Any:
    """Return what a dotted attribute name means on `owner`."""
    for part in name.split("."):
        owner = getattr(owner, part)
    return owner


def add_attribute(gm: fx.GraphModule, name: str, value: Tensor) -> str:
    """Register a weight or constant on `gm` under a free name near `name`; return that name.

    A tensor that `gm` already has keeps the name it has, so weights are never listed twice.
    """
    for existing, tensor in named_tensors(gm):
        if tensor is value:
            return existing
    name = name.replace(".", "_") or "constant"
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
    """Yield the parameters and buffers that belong to `gm` itself, not to its submodules."""
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
    """Insert a `call_function` node at the current insertion point, with its value propagated.

    `like` gives the new node its provenance (`module`, `where`).
    """
    node = graph.call_function(target, args, kwargs)
    for key in ("module", "where"):
        if like is not None and key in like.meta:
            node.meta[key] = like.meta[key]
    node.meta["val"] = propagate(node)
    return node


def to_dtype(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Return a tensor in another type, which is itself if it has that."""
    if node.meta["val"].dtype == dtype:
        return node
    return call(graph, aten._to_copy.default, node, dtype=dtype)


def propagate(node: fx.Node, gm: fx.GraphModule | None = None) -> Any:
    """Return the fake value of a `call_function` node from its arguments' values."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with FAKE, torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def prune_unused(gm: fx.GraphModule) -> bool:
    """Drop dead nodes, then tensors and submodules that no node names; return whether any went."""
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


def new_body(name: str) -> fx.GraphModule:
    """Return an empty GraphModule to build a component in."""
    return fx.GraphModule(torch.nn.Module(), fx.Graph(), class_name=name)


def copy_nodes(
    nodes: Iterable[fx.Node],
    source: fx.GraphModule,
    target: fx.GraphModule,
    env: dict[fx.Node, fx.Node],
) -> None:
    """Append copies of `nodes` (in topological order) to `target`.

    `env` maps old nodes to new ones, and is extended; nodes that it already maps are left out.
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
    """Return the nodes and everything that they are computed from."""
    return reach(nodes, lambda node: node.all_input_nodes)


def descendants(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the nodes and everything that is computed from them."""
    return reach(nodes, lambda node: node.users)


def reach(
    nodes: Iterable[fx.Node], neighbours: Callable[[fx.Node], Iterable[fx.Node]]
) -> set[fx.Node]:
    """Return the nodes and everything to which `neighbours` leads from them."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(neighbours(node))
    return found


def extract(
    body: fx.GraphModule, takes: Sequence[fx.Node], values: Sequence[fx.Node], name: str
) -> fx.GraphModule:
    """Return the part of a body that computes `values` from some of its arguments."""
    part, env = new_body(name), dict[fx.Node, fx.Node]()
    needed = ancestors(values) - set(takes)
    copy_nodes([*takes, *(n for n in body.graph.nodes if n in needed)], body, part, env)
    part.graph.output(tuple(env[v] for v in values))
    set_outputs(part, [env[v] for v in values])
    part.recompile()
    return part


def copy_inlined(
    nodes: Iterable[fx.Node],
    source: fx.GraphModule,
    target: fx.GraphModule,
    env: dict[fx.Node, fx.Node],
) -> None:
    """Append copies of `nodes` with the components that they call written out; see `copy_nodes`."""
    results: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        if node.op == "call_module":
            body = attribute(source, str(node.target))
            given = [env[a] for a in node.args if isinstance(a, fx.Node)]
            inner = dict(zip(placeholders(body), given, strict=True))
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


def sort(gm: fx.GraphModule) -> None:
    """Put every node after what it reads; otherwise the order stays. A cycle is a `VerifyError`."""
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


def import_traced(traced: fx.GraphModule, source: fx.GraphModule, name: str) -> fx.GraphModule:
    """Return what `make_fx` traced of `source` as a body; the same tensors are its weights."""
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
        env[node] = copy.graph.node_copy(node, lambda n: env[n])
        env[node].name = node.name
    copy.recompile()
    return copy


def nodes_in(arguments: Any) -> list[fx.Node]:
    """Return the nodes in nested arguments."""
    found: list[fx.Node] = []
    fx.map_arg(arguments, found.append)
    return found


def target_name(node: fx.Node) -> str:
    """Return a stable, readable name of what a node calls."""
    if isinstance(node.target, str):
        return node.target
    if isinstance(node.target, torch._ops.OpOverload):
        name = str(node.target)
        return name.removesuffix(".default")
    return f"operator.{node.target.__name__}"


def type_text(value: Any) -> str:
    """Return a value's type, such as `float32[2,3]`."""
    if isinstance(value, Tensor):
        shape = ",".join(str(s) for s in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}[{shape}]"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(type_text(item) for item in value) + ")"
    return type(value).__name__


def text(gm: fx.GraphModule, constants: Callable[[Tensor], str] | None = None) -> str:
    """Return the graph as text with stable numbering, one node a line.

    `constants` adds a description to each `get_attr`, as `fingerprint` does.
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
        left = f"{names[node]}: {type_text(node.meta.get('val'))}"
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


def fingerprint(gm: fx.GraphModule, constants: Callable[[Tensor], str] = identity_text) -> str:
    """Return a hash of the graph and of its constants as `constants` describes them."""
    return hashlib.sha256(text(gm, constants).encode()).hexdigest()


def flops(gm: fx.GraphModule, own: Mapping[str, int] | None = None) -> int:
    """Return the floating point operations of one run: 2 a multiply-add.

    Matrix products, convolutions and attention count, as in torch's own counter. `own` gives the
    cost of the submodules that `gm` calls, by name.
    """
    total = 0
    for node in gm.graph.nodes:
        if node.op == "call_module" and own is not None:
            total += own[str(node.target)]
        elif node.op == "call_function" and node.target is not operator.getitem:
            total += node_flops(node)
    return total


def node_flops(node: fx.Node) -> int:
    """Return the floating point operations of one `call_function` node."""
    if not _may_cost(node.target):
        return 0
    key = node.target, str(fx.map_arg((node.args, node.kwargs), _sizes))
    if key not in _COUNTED:
        counter = flop_counter()
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with FAKE, torch.no_grad(), counter:
            node.target(*args, **kwargs)  # type: ignore[operator]
        _COUNTED[key] = int(counter.get_total_flops())
    return _COUNTED[key]


# FLOPs by operator and sizes: the counter takes a millisecond, and graphs are counted after every
# pass.
_COUNTED: dict[tuple[Any, str], int] = {}


def _sizes(node: fx.Node) -> Any:
    value = node.meta["val"]
    return [int(size) for size in value.shape] if isinstance(value, Tensor) else value


def flop_counter() -> FlopCounterMode:
    """Return what counts the floating point operations of what runs inside it."""
    # The counter knows what attention is on GPUs alone, and would take it for free here.
    own = {aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    return FlopCounterMode(display=False, custom_mapping=own)


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _may_cost(target: Any) -> bool:
    """Tell whether FLOPs can come of an operator: running the counter on every node is slow."""
    name = str(target)
    return any(
        word in name
        for word in ("mm", "linear", "conv", "attention", "matmul", "einsum", "bilinear")
    )


def value_bytes(value: Any) -> int:
    """Return what a node's value takes: a tensor, several, or what takes nothing."""
    if isinstance(value, (list, tuple)):
        return sum(map(value_bytes, value))
    return value.nbytes if isinstance(value, Tensor) else 0


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of distinct tensors."""
    unique = {id(t): t for t in tensors}  # holds them, so that no two share an id
    return sum(t.numel() * t.element_size() for t in unique.values())
