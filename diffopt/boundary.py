"""Components: exported once per call signature, recorded as calls.

For the time of a capture the public methods of every component are replaced. A call with tensors
exports the component in the state it has at that call (processors, adapters and hooks are part of
the signature), adds a call node and returns placeholder values of the right shape.
"""

import contextlib
import dataclasses
import functools
import inspect
import operator
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind, OutputKind

from diffopt import graph as g
from diffopt import tree
from diffopt.errors import CaptureError
from diffopt.modes import plain
from diffopt.recorder import Recorder

_PUBLIC = frozenset(dir(torch.nn.Module))


class Lifted(Exception):
    """Ask for another run: a Python number that differs between calls has become an input."""


@dataclasses.dataclass(frozen=True)
class Change:
    """An attribute that a call of a component sets."""

    store: dict[str, Any]
    name: str
    spec: tree.Spec
    tensors: int


@dataclasses.dataclass
class Body:
    """A component exported for one signature."""

    name: str
    module: fx.GraphModule
    result: tree.Spec
    results: int
    changes: list[Change]
    written: list[int]
    """Which arguments the call writes in place, by position; their values are the last outputs."""


@dataclasses.dataclass
class Signature:
    """One call of a component: its tensors, its structure."""

    component: str
    method: str
    tensors: list[Tensor]
    spec: tree.Spec
    state: list[tuple[dict[str, Any], str]]
    """Attributes that hold values of earlier calls."""
    numbers: list[Any]

    def key(self, fingerprint: int) -> Hashable:
        """Return what two calls have in common when they run the same graph."""
        types = tuple((t.dtype, t.shape, t.stride()) for t in self.tensors)
        places = tuple((id(store), name) for store, name in self.state)
        return (self.component, self.method, self.spec.key, types, places, fingerprint)


class Boundary:
    """The components of a pipeline, and what has been exported of them.

    Args:
        components: Modules by name.
    """

    def __init__(self, components: Mapping[str, torch.nn.Module]) -> None:
        self.modules = dict(components)
        self.bodies: dict[Hashable, Body] = {}
        self.exports = 0
        self.lifted: set[tuple[str, str, int]] = set()
        self.inlined: set[Hashable] = set()
        self.recorder: Recorder | None = None
        self.random = torch.Generator().manual_seed(0)
        self._seen: dict[Hashable, list[list[Any]]] = {}
        self._inside = False

    def weights(self) -> dict[int, tuple[str, Tensor]]:
        """Return parameters and buffers by identity, with a name: weights used outside of calls."""
        table: dict[int, tuple[str, Tensor]] = {}
        for name, module in self.modules.items():
            for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
                table.setdefault(id(tensor), (f"{name}.{key}", tensor))
        return table

    @contextlib.contextmanager
    def recording(self, recorder: Recorder, seed: int) -> Iterator[None]:
        """Record calls of the components with `recorder` for the time of the context."""
        self.recorder, self._seen = recorder, {}
        self.random.manual_seed(seed)
        undo: list[tuple[torch.nn.Module, str, Any]] = []
        saved = {name: _state(module) for name, module in self.modules.items()}
        try:
            for name, module in self.modules.items():
                for method in _methods(module):
                    undo.append((module, method, vars(module).get(method)))
                    vars(module)[method] = self._wrapper(name, module, method)
            yield
        finally:
            for module, method, own in reversed(undo):
                vars(module).pop(method, None)
                if own is not None:
                    vars(module)[method] = own
            for rows in saved.values():
                _restore(rows)
            self.recorder = None

    def _wrapper(self, name: str, module: torch.nn.Module, method: str) -> Callable[..., Any]:
        original = getattr(module, method)

        @functools.wraps(original)  # pipelines look at signatures
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return original(*args, **kwargs)
            leaves, _ = tree.flatten((args, kwargs))
            if not leaves:
                return original(*args, **kwargs)
            return self._call(name, module, method, original, args, kwargs)

        return call

    def _call(
        self, name: str, module: torch.nn.Module, method: str, original: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        assert self.recorder is not None
        if method == "forward":
            # Positional and named arguments of one call are one signature.
            kwargs = _bind(original, args, kwargs)
            args = args if kwargs is None else ()
        numbers: list[Any] = []
        tensors, spec = tree.flatten(self._lift(name, method, (args, kwargs or {}), numbers))
        state = self._tracked_state(module)
        signature = Signature(name, method, tensors, spec, state, numbers)
        self._watch_numbers(signature, original)
        key = signature.key(tree.fingerprint(module))
        if key in self.inlined:
            return original(*args, **(kwargs or {}))
        if key not in self.bodies:
            try:
                with plain(), torch.random.fork_rng(devices=[]):
                    self.bodies[key] = self._export(signature, module, original)
            except (CaptureError, Lifted):
                raise
            except Exception as error:
                # What can't be exported whole is recorded operator by operator instead; a read of a
                # traced value is then found on its own line.
                self.inlined.add(key)
                self.failure = error
                return original(*args, **(kwargs or {}))
        return self._record(self.bodies[key], signature)

    # Numbers that differ between calls

    def _lift(self, name: str, method: str, value: Any, numbers: list[Any]) -> Any:
        """Replace the Python numbers that became inputs by tensors; collect the others."""
        if isinstance(value, bool) or not isinstance(value, (int, float, list, tuple, dict)):
            return value
        if isinstance(value, (int, float)):
            numbers.append(value)
            if (name, method, len(numbers) - 1) not in self.lifted:
                return value
            dtype = torch.int64 if isinstance(value, int) else torch.float64
            return torch.tensor(value, dtype=dtype)
        if isinstance(value, dict):
            if type(value) is not dict:
                return value
            return {k: self._lift(name, method, v, numbers) for k, v in value.items()}
        items = [self._lift(name, method, v, numbers) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)

    def _watch_numbers(self, signature: Signature, original: Callable[..., Any]) -> None:
        """Ask for a run with a number as an input once it is seen to differ between calls."""
        types = tuple(t.shape for t in signature.tensors)
        group = (signature.component, signature.method, types, len(signature.numbers))
        for earlier in self._seen.setdefault(group, []):
            for index, (a, b) in enumerate(zip(earlier, signature.numbers, strict=True)):
                place = (signature.component, signature.method, index)
                if a != b and place not in self.lifted:
                    self.lifted.add(place)
                    raise Lifted
        self._seen[group].append(signature.numbers)

    # State

    def _tracked_state(self, module: torch.nn.Module) -> list[tuple[dict[str, Any], str]]:
        assert self.recorder is not None
        found = []
        for store, name in tree.attributes(module):
            value = store[name]
            if isinstance(value, (Tensor, list, tuple, dict)):
                leaves, _ = tree.flatten(value)
                if any(self.recorder.node_of(t) is not None for t in leaves):
                    found.append((store, name))
        return found

    # Export

    def _export(self, signature: Signature, module: torch.nn.Module, original: Callable[..., Any]) -> Body:
        self.exports += 1
        state_specs = [tree.flatten(store[name]) for store, name in signature.state]
        wrapper = _Call(self, module, original, signature, [spec for _, spec in state_specs])
        inputs = [*signature.tensors, *(t for leaves, _ in state_specs for t in leaves)]
        inputs = [t.detach() for t in inputs]
        before = _state(module)
        try:
            self._inside = True
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                exported = torch.export.export(wrapper, tuple(inputs), strict=False)
                exported = exported.run_decompositions({})
        finally:
            self._inside = False
            _restore(before)
            known = {(id(store), name) for store, name, *_ in before}
            for store, name in list(tree.attributes(module)):
                if (id(store), name) not in known:
                    del store[name]
        body, written = import_exported(exported, signature.component, prefix="component.")
        name = signature.component if signature.method == "forward" else f"{signature.component}_{signature.method}"
        return Body(name, body, wrapper.result, wrapper.results, wrapper.changes, written)

    # Recording

    def _record(self, body: Body, signature: Signature) -> Any:
        recorder = self.recorder
        assert recorder is not None
        name = self._attach(body)
        state = [t for store, key in signature.state for t in tree.flatten(store[key])[0]]
        given = [*signature.tensors, *state]
        node = recorder.root.graph.call_module(name, tuple(recorder.value(t) for t in given))
        types = [n.meta["val"] for n in g.outputs(body.module)]
        node.meta["val"] = tuple(types)
        values = []
        for index, type_ in enumerate(types):
            part = recorder.emit(operator.getitem, node, index)
            values.append((part, self._placeholder(type_)))
        for index, position in enumerate(body.written):
            part, value = values[len(values) - len(body.written) + index]
            recorder.write(given[position], part)
        for part, value in values[: len(values) - len(body.written)]:
            recorder.bind(value, part)
        tensors = [value for _, value in values]
        start = body.results
        for change in body.changes:
            change.store[change.name] = change.spec.build(tensors[start : start + change.tensors])
            start += change.tensors
        return body.result.build(tensors[: body.results])

    def _attach(self, body: Body) -> str:
        assert self.recorder is not None
        root = self.recorder.root
        for name, module in root._modules.items():
            if module is body.module:
                return name
        name, count = body.name, 1
        while hasattr(root, name):
            count += 1
            name = f"{body.name}_{count}"
        root.add_module(name, body.module)
        return name

    def _placeholder(self, value: Tensor) -> Tensor:
        with plain():
            result = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
            if value.is_floating_point():
                return result.normal_(generator=self.random).mul_(0.5)
            return result.zero_()


class _Call(torch.nn.Module):
    """A component's method as a module of flat tensors, for export."""

    def __init__(
        self,
        boundary: Boundary,
        module: torch.nn.Module,
        original: Callable[..., Any],
        signature: Signature,
        state: Sequence[tree.Spec],
    ) -> None:
        super().__init__()
        self.component = module
        self.__dict__["run"] = (original, signature, state)
        self.changes: list[Change] = []

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the method; returns its tensors, then those of the attributes that it set."""
        original, signature, specs = self.__dict__["run"]
        args, kwargs = signature.spec.build(tensors)
        start = len(signature.tensors)
        for (store, name), spec in zip(signature.state, specs, strict=True):
            count = len(tree.flatten(store[name])[0])
            store[name] = spec.build(tensors[start : start + count])
            start += count
        before = {(id(store), name): _snapshot(store[name]) for store, name in tree.attributes(self.component)}
        out = original(*args, **kwargs)
        leaves, self.result = tree.flatten(out)
        self.results = len(leaves)
        self.changes = []
        for store, name in tree.attributes(self.component):
            value = store[name]
            if before.get((id(store), name)) != _snapshot(value):
                tensors_, spec = tree.flatten(value)
                self.changes.append(Change(store, name, spec, len(tensors_)))
                leaves.extend(tensors_)
        return tuple(leaves)


def import_exported(
    exported: torch.export.ExportedProgram, name: str, prefix: str = ""
) -> tuple[fx.GraphModule, list[int]]:
    """Return an exported program as a component body, weights as `get_attr` nodes.

    Returns:
        The body, and the positions of the inputs that it writes, whose new values are its last outputs.
    """
    signature = exported.graph_signature
    source = exported.graph_module
    body = g.new_body(name)
    env: dict[fx.Node, fx.Node] = {}
    specs = dict(zip((n.name for n in source.graph.find_nodes(op="placeholder")), signature.input_specs, strict=True))
    users: list[str] = []
    for node in source.graph.find_nodes(op="placeholder"):
        spec = specs[node.name]
        if spec.kind == InputKind.USER_INPUT:
            users.append(node.name)
            env[node] = body.graph.placeholder(f"arg{len(users) - 1}" if name != "program" else node.name)
            env[node].meta["val"] = g.fake(node.meta["val"])
    for node in source.graph.find_nodes(op="placeholder"):
        spec = specs[node.name]
        if spec.kind != InputKind.USER_INPUT:
            table = exported.constants if spec.target in exported.constants else exported.state_dict
            env[node] = g.get_attr(body, str(spec.target).removeprefix(prefix), table[spec.target])  # type: ignore[arg-type,index]
    _import_nodes(source, body, env, prefix)
    results = list(source.graph.output_node().args[0])  # type: ignore[arg-type]
    outs, written, mutated = [], [], []
    for result, out in zip(results, signature.output_specs, strict=True):
        if out.kind == OutputKind.USER_OUTPUT:
            outs.append(env[result])  # type: ignore[index]
        elif out.kind == OutputKind.USER_INPUT_MUTATION:
            written.append(users.index(str(out.target)))
            mutated.append(env[result])  # type: ignore[index]
        else:
            raise CaptureError(
                f"{name}: writes its buffer {str(out.target).removeprefix(prefix)!r} during the call; "
                "keep it as a plain attribute, or disable the caching"
            )
    body.graph.output((*outs, *mutated))
    g.set_outputs(body, [*outs, *mutated])
    g.prune_unused(body)
    body.recompile()
    return body, written


def _import_nodes(source: fx.GraphModule, body: fx.GraphModule, env: dict[fx.Node, Any], prefix: str) -> None:
    for node in source.graph.nodes:
        if node in env or node.op in ("placeholder", "output"):
            continue
        if node.op == "get_attr":
            value = getattr(source, str(node.target))
            env[node] = value if isinstance(value, fx.GraphModule) else g.get_attr(body, str(node.target), value)
        elif _is_region(node.target):
            env[node] = _inline(node, body, env, prefix)
        elif "_assert" in str(node.target) or str(node.target) in ("aten.sym_constrain_range_for_size.default",):
            continue
        elif node.target is operator.getitem and isinstance(env[node.args[0]], (tuple, list)):
            env[node] = env[node.args[0]][node.args[1]]
        else:
            copy = body.graph.node_copy(node, lambda n: env[n])
            copy.meta = {"val": g.fake(node.meta["val"])}
            path = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
            if path and path[-1]:
                copy.meta["module"] = path[-1].removeprefix(prefix.rstrip(".")).lstrip(".")
            env[node] = copy


def _is_region(target: Any) -> bool:
    """Tell whether a node runs a subgraph with gradients or autocast switched: inlined as it is."""
    return getattr(target, "__name__", "") in ("wrap_with_set_grad_enabled", "wrap_with_autocast")


def _inline(node: fx.Node, body: fx.GraphModule, env: dict[fx.Node, Any], prefix: str) -> Any:
    first = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and isinstance(env[a], fx.GraphModule))
    if node.target.__name__ == "wrap_with_autocast" and node.args[2]:  # type: ignore[union-attr]
        raise CaptureError("autocast inside a component: cast the model itself instead")
    inner = env[node.args[first]]  # type: ignore[index]
    values = [env[a] for a in node.args[first + 1 :]]  # type: ignore[index]
    inner_env: dict[fx.Node, Any] = dict(zip(inner.graph.find_nodes(op="placeholder"), values, strict=True))
    _import_nodes(inner, body, inner_env, prefix)
    return fx.map_arg(inner.graph.output_node().args[0], lambda n: inner_env[n])


def _methods(module: torch.nn.Module) -> list[str]:
    """Return the names of a module's own public methods, which a pipeline may call."""
    names = ["forward"]
    for name in dir(type(module)):
        if name.startswith("_") or name in _PUBLIC:
            continue
        function = inspect.getattr_static(type(module), name)
        if inspect.isfunction(function):
            names.append(name)
    return names


def _bind(original: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any] | None:
    """Return all arguments by name; None where the signature does not allow it."""
    try:
        bound = inspect.signature(original).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return None
    kinds = {p.kind for p in bound.signature.parameters.values()}
    if inspect.Parameter.VAR_POSITIONAL in kinds or inspect.Parameter.POSITIONAL_ONLY in kinds:
        return None
    named = dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind == inspect.Parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
    return named


def _state(module: torch.nn.Module) -> list[tuple[dict[str, Any], str, Any, Any]]:
    """Return every attribute of a module tree with its value and its contents, to put back later."""
    rows = []
    for store, name in tree.attributes(module):
        value = store[name]
        rows.append((store, name, value, value.copy() if type(value) in (list, dict) else None))
    for child in module.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks"):  # some libraries install hooks in the first call
            rows.append((vars(child), name, vars(child)[name], vars(child)[name].copy()))
    return rows


def _restore(rows: Sequence[tuple[dict[str, Any], str, Any, Any]]) -> None:
    """Put back what `_state` returned, in the same list and dictionary objects."""
    for store, name, value, contents in rows:
        store[name] = value
        if contents is not None and contents != value:
            value.clear()
            value.extend(contents) if isinstance(value, list) else value.update(contents)


def _snapshot(value: Any) -> Any:
    """Describe an attribute so that a change shows: constants by value, everything else by identity."""
    if isinstance(value, tree.CONSTANTS):
        return (type(value), value)
    if isinstance(value, (list, tuple)):
        return (type(value), tuple(_snapshot(item) for item in value))
    if isinstance(value, dict):
        return (type(value), tuple((k, _snapshot(v)) for k, v in value.items()))
    return id(value)
