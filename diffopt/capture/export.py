"""Exports a method of a component for one call signature, with `torch.export`."""

import dataclasses
import functools
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.fx.config
from torch import Tensor, fx
from torch._export.utils import _is_preservable_cia_op
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils._python_dispatch import TorchDispatchMode

from diffopt.capture import value_tree
from diffopt.capture.dispatch_modes import functional_variant, is_random
from diffopt.capture.module_state import (
    Attribute,
    State,
    changed_hooks,
    restore_state,
    save_state,
    snapshot,
)
from diffopt.errors import CaptureError
from diffopt.ir import graph as g
from diffopt.ir.nodes import args, argument
from diffopt.ir.op_sets import STRIDED
from diffopt.ir.printing import target_name

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Change:
    """An attribute that a call of a component sets."""

    owner: str
    """The path of what has the attribute; the next call may find another object there."""
    store: dict[str, Any]
    """Its `__dict__` at this call."""
    name: str
    spec: value_tree.Spec
    tensors: int


@dataclasses.dataclass
class Outcome:
    """The structure, without tensors, of what a call returns, sets and changes."""

    result: value_tree.Spec
    results: int
    changes: list[Change]
    arguments: value_tree.Spec | None
    """The containers among the arguments after the call; None if it does not change them."""
    hooks: list[tuple[dict[int, Any], dict[int, Any]]]
    """Dictionaries of hooks that the call changes, and their contents after it."""
    is_heard: bool
    """Whether a hook keeps something of the call outside of the modules."""


@dataclasses.dataclass
class ExportedCall:
    """A component's graph for one call signature."""

    name: str
    module: fx.GraphModule
    outcome: Outcome
    mutated: list[int]
    """Positions of arguments that the call writes in place; their values are the last outputs."""


@dataclasses.dataclass
class _Memory:
    """What a call is put back to, and what its last run did.

    The exporter copies what the attributes of modules hold, containers and all, and puts the copies
    back; an object of another kind it leaves alone. The saved state names the dictionary of every
    module once for each attribute, so that copying it took a third of an export.
    """

    before: State
    outcome: Outcome | None = None


class CallModule(torch.nn.Module):
    """One call of a component's method as a module of flat tensors, for export.

    Args:
        component: The module.
        method: The method.
        arguments: The structure of the call's (args, kwargs).
        count: The number of tensors in the arguments.
        state: Attributes that hold tensors of earlier calls, which become arguments.
    """

    def __init__(
        self,
        component: torch.nn.Module,
        method: Callable[..., Any],
        arguments: value_tree.Spec,
        count: int,
        state: Sequence[Attribute],
    ) -> None:
        super().__init__()
        self.component = component
        self.run = method
        self.arguments, self.count = arguments, count
        self.state = [(store, name, *value_tree.flatten(store[name])) for store, name in state]
        self.memory = _Memory(save_state(component))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the method; return its tensors, then those of attributes and containers it set."""
        restore_state(self.memory.before)  # the exporter runs this more than once
        args, kwargs = self.arguments.build(tensors)
        start = self.count
        for store, name, leaves, spec in self.state:
            store[name] = spec.build(tensors[start : start + len(leaves)])
            start += len(leaves)
        before = {
            (id(store), name): snapshot(store[name])
            for store, name in value_tree.attributes(self.component)
        }
        out = self.run(*args, **kwargs)
        results, result = value_tree.flatten(out)
        state = self.memory.before
        outcome = Outcome(result, len(results), [], None, changed_hooks(state), state.is_heard())
        paths = {id(store): path for path, store in value_tree.owners(self.component)}
        for store, name in value_tree.attributes(self.component):
            value = store[name]
            if before.get((id(store), name)) == snapshot(value):
                continue
            changed, spec = value_tree.flatten(value)
            change = Change(paths[id(store)], store, name, spec, len(changed))
            outcome.changes.append(change)
            results.extend(changed)
        after, spec = value_tree.flatten((args, kwargs))
        same = all(a is b for a, b in zip(after, tensors, strict=False))
        if not same or spec.key != self.arguments.key:
            outcome.arguments = spec
            results.extend(after)
        self.memory.outcome = outcome
        return tuple(results)


def export(
    name: str, call: CallModule, inputs: Iterable[Tensor], weight_of: Callable[[Tensor], Tensor]
) -> ExportedCall:
    """Export one call of a component, and restore the component's state.

    Args:
        name: Of the component.
        call: The call.
        inputs: Tensors of the types of its arguments.
        weight_of: Returns what stands in the graph for a weight of the module.
    """
    inputs = [t.detach() for t in (*inputs, *(t for row in call.state for t in row[2]))]
    try:
        with (
            warnings.catch_warnings(),
            torch.no_grad(),
            # Nothing reads where each node came from, and looking that up takes long.
            mock.patch.object(fx.config, "do_not_emit_stack_traces", True, create=True),
        ):
            warnings.simplefilter("ignore")
            exported = torch.export.export(call, tuple(inputs), strict=False)
            _refuse_random(exported.graph_module)
            _replace_writes(exported.graph_module)
            if _writes(exported.graph_module):
                exported = exported.run_decompositions({})
    finally:
        restore_state(call.memory.before)
    outcome = call.memory.outcome
    assert outcome is not None
    if outcome.is_heard:
        raise CaptureError("a hook keeps something of the call outside of the module")
    body, mutated = import_exported(exported, name, weight_of, prefix="component.")
    return ExportedCall(name, body, outcome, mutated)


def _operators(gm: fx.GraphModule) -> Iterator[fx.Node]:
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                if isinstance(node.target, torch._ops.OpOverload):
                    yield node


def _refuse_random(gm: fx.GraphModule) -> None:
    """Raise a `CaptureError` for random numbers: recorded one by one, draws become inputs."""
    for node in _operators(gm):
        drops = node.target is aten.dropout.default and bool(node.args[1]) and bool(node.args[2])
        if drops or is_random(node.target):
            raise CaptureError(f"{target_name(node)} draws random numbers inside")


def _replace_writes(gm: fx.GraphModule) -> None:
    """Let operators that write return a new tensor, where nothing else shares the memory.

    `ExportedProgram.run_decompositions` does so for all, which traces the whole graph once more.
    """
    for node in list(_operators(gm)):
        # No value changes: a dropout that drops some was refused, and others give their argument.
        if node.target in (aten.detach_.default, aten.dropout.default):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            node.graph.erase_node(node)
        elif (functional := _functional_form(node)) is not None:
            written: Any = node.args[0]
            node.target = functional
            for user in [user for user in written.users if node < user]:
                user.replace_input_with(written, node)


def _functional_form(node: fx.Node) -> torch._ops.OpOverload | None:
    """Return the operator that computes what this one writes; None where others may see it."""
    schema, written = node.target._schema, node.args[0]  # type: ignore[union-attr]
    if not schema.is_mutable or not isinstance(written, fx.Node) or not _is_new(written):
        return None
    mutable = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
    functional = functional_variant(node.target)
    if mutable != [True, *[False] * (len(mutable) - 1)] or functional is None:
        return None
    if not all(_is_new(user) for user in written.users if user < node):
        return None  # a view, in which the write is seen
    value = written.meta["val"]
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with value.fake_mode, torch.no_grad():
        result = functional(*args, **kwargs)
    return functional if g.memory_layout(result) == g.memory_layout(value) else None


def _is_new(node: fx.Node) -> bool:
    """Tell whether a node's result is in memory of its own."""
    if not isinstance(node.target, torch._ops.OpOverload) or _is_composite(node.target):
        return False
    return not any(result.alias_info for result in node.target._schema.returns)


def _writes(gm: fx.GraphModule) -> bool:
    """Tell whether a graph writes in place, and must be functionalized."""
    return any(node.target._schema.is_mutable for node in _operators(gm))  # type: ignore[union-attr]


def import_exported(
    exported: torch.export.ExportedProgram,
    name: str,
    weight_of: Callable[[Tensor], Tensor] = lambda weight: weight,
    prefix: str = "",
) -> tuple[fx.GraphModule, list[int]]:
    """Return an exported program as a body with weights as `get_attr` nodes.

    Returns:
        The body, and the positions of the inputs that it mutates, whose new values are its last
        outputs.
    """
    signature = exported.graph_signature
    source = exported.graph_module
    body = g.new_body(name)
    env: dict[fx.Node, Any] = {}
    formals = source.graph.find_nodes(op="placeholder")
    specs = list(zip(formals, signature.input_specs, strict=True))
    users = [node for node, spec in specs if spec.kind == InputKind.USER_INPUT]
    for index, node in enumerate(users):
        env[node] = body.graph.placeholder(f"arg{index}")
        env[node].meta["val"] = g.fake(node.meta["val"])
    for node, spec in specs:
        if spec.kind != InputKind.USER_INPUT:
            target = str(spec.target)
            table: Any = exported.constants if target in exported.constants else exported.state_dict
            value = table[target]
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                value = weight_of(value)
            env[node] = g.get_attr(body, target.removeprefix(prefix), value)
    _import_nodes(source, body, env, prefix)
    results: Any = source.graph.output_node().args[0]
    names = [node.name for node in users]
    outs, positions, mutated = [], [], []
    for result, out in zip(results, signature.output_specs, strict=True):
        if out.kind == OutputKind.USER_OUTPUT:
            outs.append(env[result])
        elif out.kind == OutputKind.USER_INPUT_MUTATION:
            positions.append(names.index(str(out.target)))
            mutated.append(env[result])
        else:
            raise CaptureError(
                f"{name}: writes its buffer {str(out.target).removeprefix(prefix)!r} during the "
                "call; keep it as a plain attribute, or disable the caching"
            )
    body.graph.output((*outs, *mutated))
    g.set_outputs(body, [*outs, *mutated])
    g.prune_unused(body)
    body.recompile()
    return body, positions


def _import_nodes(
    source: fx.GraphModule, body: fx.GraphModule, env: dict[fx.Node, Any], prefix: str
) -> None:
    for node in source.graph.nodes:
        if node in env or node.op in ("placeholder", "output"):
            continue
        if node.op == "get_attr":
            value = getattr(source, str(node.target))
            is_region = isinstance(value, fx.GraphModule)
            env[node] = value if is_region else g.get_attr(body, str(node.target), value)
        elif _is_region(node.target):
            env[node] = _inline(node, body, env, prefix)
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            raise CaptureError(
                f"{node.target} takes functions, which no graph holds; use an operator of tensors"
                " (scaled_dot_product_attention)"
            )
        elif "_assert" in str(node.target) or "sym_constrain_range" in str(node.target):
            continue
        elif node.target is operator.getitem and isinstance(env[node.args[0]], (tuple, list)):
            env[node] = env[node.args[0]][node.args[1]]
        else:
            first = len(body.graph.nodes)
            env[node] = _import_operator(node, body, env)
            path = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
            if not path or not path[-1]:
                continue
            module = path[-1].removeprefix(prefix.rstrip(".")).lstrip(".")
            added = len(body.graph.nodes) - first
            for new, _ in zip(reversed(body.graph.nodes), range(added), strict=False):
                new.meta["module"] = module


def _import_operator(node: fx.Node, body: fx.GraphModule, env: dict[fx.Node, Any]) -> Any:
    if not _is_composite(node.target):
        if node.target in STRIDED:
            env = env | _own_memory(body, node.args[0], env)
        copy = body.graph.node_copy(node, lambda n: env[n])
        copy.meta = {"val": g.fake(node.meta["val"])}
        _number_padding(copy)
        return copy
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
    tracer = _CompositeTracer(body)
    values = fx.map_arg((args, kwargs), tracer.fresh_value)
    with g.FAKE_MODE, torch.no_grad(), tracer:
        return tracer.map(node.target(*values[0], **values[1]))  # type: ignore[operator]


def _own_memory(body: fx.GraphModule, node: Any, env: dict[fx.Node, Any]) -> dict[fx.Node, fx.Node]:
    """Return a copy in place of a tensor that is all of its memory, in order; else nothing.

    A caller may give one that is a part of another's.
    """
    value = env[node].meta["val"]
    size = value.numel() * value.element_size()
    if not value.is_contiguous() or size != value.untyped_storage().nbytes():
        return {}
    form = torch.contiguous_format
    return {node: g.call(body.graph, aten.clone.default, env[node], memory_format=form)}


def _number_padding(node: fx.Node) -> None:
    """Replace a convolution's padding "same" or "valid" by numbers: passes know only these."""
    if node.target not in _PADDED:
        return
    x, weight = args(node)[:2]
    kernel = weight.meta["val"].shape[2:]
    dilation = argument(node, 5, "dilation", 1)
    steps = [dilation] if isinstance(dilation, int) else list(dilation)
    steps = steps * len(kernel) if len(steps) == 1 else steps
    same = argument(node, 4, "padding", "valid") == "same"
    both = [step * (size - 1) if same else 0 for step, size in zip(steps, kernel, strict=True)]
    if any(total % 2 for total in both):
        return  # asymmetric
    bias, stride = argument(node, 2, "bias"), argument(node, 3, "stride", 1)
    groups = argument(node, 6, "groups", 1)
    node.args = x, weight, bias, stride, [total // 2 for total in both], steps, groups
    node.target, node.kwargs = _PADDED[node.target], {}


_PADDED = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}


@functools.cache
def _is_composite(target: Any) -> bool:
    """Tell whether an operator may return its argument or a view, depending on strides.

    Such operators (reshape, to, contiguous, chunk, dropout …) are decomposed by the rule of
    `ExportedProgram.run_decompositions({})`, which would trace the whole graph once more.
    """
    if not isinstance(target, torch._ops.OpOverload):
        return False
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return (
        target.namespace == "aten"
        and torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), key)  # type: ignore[no-untyped-call]
        and not _is_preservable_cia_op(target)
    )


class _CompositeTracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Add the operators of which a composite operator consists to a graph."""

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.body = body
        self.nodes: dict[int, fx.Node] = {}
        self.keep: list[Tensor] = []

    def fresh_value(self, node: fx.Node) -> Any:
        """Return a new fake value for a node: values are mapped to nodes by identity."""
        value = node.meta["val"]
        fresh = g.fake(value)
        self.bind(fresh, node)
        return fresh

    def bind(self, value: Tensor, node: fx.Node) -> None:
        self.nodes[id(value)] = node
        self.keep.append(value)

    def map(self, value: Any) -> Any:
        """Return a nested value with each tensor replaced by its node."""
        if isinstance(value, Tensor):
            return self.nodes[id(value)]
        if isinstance(value, (list, tuple)):
            return type(value)(self.map(item) for item in value)
        return value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Add one operator's node."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        nodes = self.map((args, tuple(kwargs.values())))
        node = self.body.graph.call_function(
            func, nodes[0], dict(zip(kwargs, nodes[1], strict=True))
        )
        node.meta["val"] = g.fake(out)
        if isinstance(out, Tensor):
            self.bind(out, node)
        elif isinstance(out, (list, tuple)):
            for index, item in enumerate(out):
                part = self.body.graph.call_function(operator.getitem, (node, index))
                part.meta["val"] = g.fake(item)
                self.bind(item, part)
        return out


def _is_region(target: Any) -> bool:
    """Tell whether a node runs a subgraph with gradients or autocast switched; it is inlined."""
    name = getattr(target, "__name__", "")
    return name in ("wrap_with_set_grad_enabled", "wrap_with_autocast")


def _inline(node: fx.Node, body: fx.GraphModule, env: dict[fx.Node, Any], prefix: str) -> Any:
    args: Any = node.args
    if node.target.__name__ == "wrap_with_autocast" and args[2]:  # type: ignore[union-attr]
        raise CaptureError("autocast inside a component: cast the model itself instead")
    first = next(
        i
        for i, a in enumerate(args)
        if isinstance(a, fx.Node) and isinstance(env[a], fx.GraphModule)
    )
    inner = env[args[first]]
    values = [env[a] for a in args[first + 1 :]]
    formals = inner.graph.find_nodes(op="placeholder")
    inner_env: dict[fx.Node, Any] = dict(zip(formals, values, strict=True))
    _import_nodes(inner, body, inner_env, prefix)
    return fx.map_arg(inner.graph.output_node().args[0], lambda n: inner_env[n])
