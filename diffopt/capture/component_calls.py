"""Exports components once per call signature, and records their calls.

During a capture the public methods of every component are replaced. A call with tensors exports the
component in its state at that call (processors, adapters and hooks are part of the signature), adds
a call node and returns placeholder values of the right shapes.
"""

import contextlib
import copy
import dataclasses
import functools
import inspect
import logging
import operator
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from diffopt.capture import value_tree
from diffopt.capture.dispatch_modes import location, without_modes
from diffopt.capture.export import CallModule, ExportedCall, export
from diffopt.capture.module_state import Attribute, restore_state, save_state
from diffopt.capture.recorder import Recorder
from diffopt.capture.storage_views import storage_of
from diffopt.capture.torch_functions import DynamicNumber
from diffopt.capture.weight_values import WeightValues, named_weights
from diffopt.errors import first_line
from diffopt.ir import graph as g
from diffopt.ir.printing import graph_fingerprint
from diffopt.ir.strides import empty_like

log = logging.getLogger("diffopt")

_PUBLIC = frozenset(dir(torch.nn.Module))


class Lifted(Exception):
    """A Python number that differs between calls became an input: the capture must run again."""


@dataclasses.dataclass
class Signature:
    """One call of a component: its tensors, and the structure of its arguments."""

    component: str
    method: str
    tensors: list[Tensor]
    spec: value_tree.Spec
    state: list[Attribute]
    """Attributes that hold tensors of earlier calls."""
    numbers: list[Any]

    def key(self, fingerprint: int) -> Hashable:
        """Return a key that is equal for calls that run the same graph."""
        types = tuple((t.dtype, t.shape, t.stride()) for t in self.tensors)
        state = tuple((id(store), name, _types(store[name])) for store, name in self.state)
        return (
            *(self.component, self.method, self.spec.key, types, state, fingerprint),
            *ambient_modes(),
        )


def ambient_modes() -> tuple[Hashable, ...]:
    """Return torch's settings in whose scope a call runs."""
    grad = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return (*grad, torch.get_default_dtype(), str(torch.get_default_device()))


def _wants_gradients(arguments: Any) -> bool:
    """Tell whether a call's result is to be differentiated by its arguments."""
    return torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in value_tree.flatten(arguments)[0]
    )


def _types(value: Any) -> Hashable:
    leaves, spec = value_tree.flatten(value)
    return spec.key, tuple((t.dtype, t.shape, t.stride()) for t in leaves)


class ComponentCalls:
    """The components of a pipeline, and the calls exported of them.

    Args:
        components: Modules by name.
    """

    def __init__(self, components: Mapping[str, torch.nn.Module]) -> None:
        self.modules = dict(components)
        self.weights = WeightValues(self.modules)
        self.bodies: dict[Hashable, ExportedCall] = {}
        self.exports = 0
        self.lifted: set[tuple[str, str, int]] = set()
        self.bound: set[tuple[str, str, int]] = set()
        """Numbers that are no input, though they differ: each value has its own body."""
        self.inlined: dict[Hashable, str] = {}
        """The reasons of calls that could not be exported and are recorded operator by operator."""
        self.recorder: Recorder | None = None
        self.random = torch.Generator().manual_seed(0)
        self._seen: dict[Hashable, list[list[Any]]] = {}
        self._exporting = False

    @contextlib.contextmanager
    def recording(self, recorder: Recorder, seed: int) -> Iterator[None]:
        """Record calls of the components with `recorder` in the context."""
        self.recorder, self._seen = recorder, {}
        self.random.manual_seed(seed)
        undo: list[tuple[dict[str, Any], str, Any]] = []
        with self.restored():
            try:
                for name, module in self.modules.items():
                    store = vars(module)
                    for method in _methods(type(module)):  # type: ignore[arg-type]
                        undo.append((store, method, store.get(method)))
                        store[method] = self._wrapper(name, module, method)
                yield
            finally:
                for store, method, original in reversed(undo):
                    store.pop(method, None)
                    if original is not None:
                        store[method] = original
                self.recorder = None
                if self.weights.restore():
                    self.bodies.clear()

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Put the components' state back after the context: attributes, hooks and buffers."""
        saved = [save_state(module) for module in self.modules.values()]
        buffers = {id(b): b for module in self.modules.values() for b in module.buffers()}
        contents = [(b, b.clone()) for b in buffers.values()]
        try:
            yield
        finally:
            for rows in saved:
                restore_state(rows)
            for buffer, content in contents:
                if not torch.equal(buffer, content):
                    buffer.copy_(content)

    def _wrapper(self, name: str, module: torch.nn.Module, method: str) -> Callable[..., Any]:
        original = getattr(module, method)
        signature: list[inspect.Signature | None] = []

        @functools.wraps(original)  # pipelines look at signatures
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._exporting or not _has_tensor((args, kwargs)):  # runs on the host
                return original(*args, **kwargs)
            if method == "forward":
                # A call has one signature, whether arguments are positional or named.
                if not signature:
                    signature.append(_signature(original))
                args, kwargs = _named(signature[0], args, kwargs)
            return self._call(name, module, method, original, args, kwargs)

        setattr(call, value_tree.RECORDED, True)
        return call

    def _call(
        self,
        name: str,
        module: torch.nn.Module,
        method: str,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if (
            self._has_written_weights(module)
            or _wants_gradients((args, kwargs))
            or any(map(torch.is_autocast_enabled, ("cpu", "cuda")))  # left out by the exporter
        ):
            return original(*args, **kwargs)  # operator by operator
        numbers: list[Any] = []
        tensors, spec = value_tree.flatten(self._lift(name, method, (args, kwargs), numbers))
        state = self._tracked_state(module)
        signature = Signature(name, method, tensors, spec, state, numbers)
        self._watch_numbers(signature)
        skip = frozenset((id(store), attribute) for store, attribute in state)
        key = signature.key(value_tree.fingerprint(module, self.weights.key, skip))
        if key not in self.bodies and key not in self.inlined:
            self._export(key, signature, module, original)
            if key in self.bodies and self.lifted:
                self._check_numbers(self.bodies[key], signature, module, original, (args, kwargs))
        if key in self.inlined:
            return original(*args, **kwargs)
        return self._record(self.bodies[key], signature, (args, kwargs))

    def _export(
        self,
        key: Hashable,
        signature: Signature,
        module: torch.nn.Module,
        original: Callable[..., Any],
    ) -> None:
        """Export a call, or store the reason for which it is recorded operator by operator."""
        name, method = signature.component, signature.method
        label = g.identifier(name if method == "forward" else f"{name}_{method}")
        self.exports += 1
        call = CallModule(module, original, signature.spec, len(signature.tensors), signature.state)
        try:
            self._exporting = True
            with without_modes(), torch.random.fork_rng(devices=[]):
                body = export(label, call, signature.tensors, self.weights.value)
        except Exception as error:  # the exporter raises many types
            reason = first_line(error)
            log.info("%s.%s is recorded operator by operator: %s", name, method, error)
            self.inlined[key] = f"{name}.{method} could not be exported as a whole: {reason}"
        else:
            # A state that changes nothing, such as a counter, exports as the same graph.
            same = (other.module for other in self.bodies.values() if other.name == body.name)
            text = graph_fingerprint(body.module)
            body.module = next((m for m in same if graph_fingerprint(m) == text), body.module)
            self.bodies[key] = body
        finally:
            self._exporting = False

    # Numbers that differ between calls

    def _lift(self, name: str, method: str, value: Any, numbers: list[Any]) -> Any:
        """Replace the Python numbers that became inputs with tensors; collect all numbers."""
        if isinstance(value, DynamicNumber):
            return value.tensor
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

    def _watch_numbers(self, signature: Signature) -> None:
        """Make a number an input when it differs between calls, and raise `Lifted`."""
        types = tuple(t.shape for t in signature.tensors)
        group = (signature.component, signature.method, types, len(signature.numbers))
        for earlier in self._seen.setdefault(group, []):
            for index, (a, b) in enumerate(zip(earlier, signature.numbers, strict=True)):
                place = (signature.component, signature.method, index)
                if a != b and place not in self.lifted | self.bound:
                    self.lifted.add(place)
                    raise Lifted
        self._seen[group].append(signature.numbers)

    def _check_numbers(
        self,
        body: ExportedCall,
        signature: Signature,
        module: torch.nn.Module,
        original: Callable[..., Any],
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
    ) -> None:
        """Bind the numbers of a method that takes a tensor for another thing than a number.

        It is called for real with the numbers, and the body with tensors in their place; both on
        random values, as on the call's own a network may give the same for any number.
        """
        places = {(signature.component, signature.method, i) for i in range(len(signature.numbers))}
        if not places & self.lifted or signature.state:
            return
        tensors, spec = value_tree.flatten(arguments)
        others = {id(t): self._placeholder(t) if t.is_floating_point() else t for t in tensors}
        with without_modes(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            args, kwargs = copy.deepcopy(spec.build([others[id(t)] for t in tensors]))
            saved = save_state(module)
            try:
                expected = value_tree.flatten(original(*args, **kwargs))[0]
            finally:
                restore_state(saved)
            got = body.module(*(others.get(id(t), t).clone() for t in signature.tensors))
        if not all(map(value_tree.same_bits, expected, got)):
            self.bound |= places & self.lifted
            self.lifted -= places
            raise Lifted

    # Recording

    def _has_written_weights(self, module: torch.nn.Module) -> bool:
        """Tell whether weights or buffers depend on inputs."""
        assert self.recorder is not None
        written = self.recorder.storages
        return bool(written) and any(
            storage_of(tensor) in written for _, tensor in named_weights({"": module})
        )

    def _tracked_state(self, module: torch.nn.Module) -> list[Attribute]:
        """Return the attributes that hold tensors which depend on inputs."""
        assert self.recorder is not None
        tracked = []
        for store, name in value_tree.attributes(module):
            value = store[name]
            if not isinstance(value, (Tensor, list, tuple, dict)) or not _may_hold_tensor(value):
                continue
            leaves, _ = value_tree.flatten(value)
            if any(self.recorder.node_of(t) is not None for t in leaves):
                tracked.append((store, name))
        return tracked

    def _record(self, body: ExportedCall, signature: Signature, arguments: Any) -> Any:
        """Add a call node; return placeholder values in the structure of the result."""
        recorder = self.recorder
        assert recorder is not None
        name = self._attach(body)
        state = [t for store, key in signature.state for t in value_tree.flatten(store[key])[0]]
        actual = [*signature.tensors, *state]
        node = recorder.root.graph.call_module(name, tuple(recorder.value(t) for t in actual))
        node.meta["val"] = tuple(n.meta["val"] for n in g.outputs(body.module))
        node.meta["where"] = str(location())
        values: list[Tensor] = []
        count = len(node.meta["val"]) - len(body.mutated)
        for index, type_ in enumerate(node.meta["val"]):
            part = recorder.emit(operator.getitem, node, index)
            if index >= count:
                recorder.write(actual[body.mutated[index - count]], part)
                continue
            values.append(self._placeholder(type_))
            recorder.bind(values[-1], part)
        outcome = body.outcome
        start = outcome.results
        module = self.modules[signature.component]
        owners = dict(value_tree.owners(module)) if outcome.changes else {}
        for change in outcome.changes:
            store = owners.get(change.owner, change.store)
            store[change.name] = change.spec.build(values[start : start + change.tensors])
            start += change.tensors
        for hooks, contents in outcome.hooks:
            hooks.clear()
            hooks.update(contents)
        if outcome.arguments:
            value_tree.update(arguments, outcome.arguments.build(values[start:]))
        return outcome.result.build(values[: outcome.results])

    def _attach(self, body: ExportedCall) -> str:
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
        with without_modes():
            result = empty_like(value)
            if value.is_floating_point():
                return result.normal_(generator=self.random).mul_(0.5)
            return result.zero_()


@functools.cache
def _methods(kind: type) -> tuple[str, ...]:
    """Return the public methods that a module class adds, which a pipeline may call."""
    names = ["forward"]
    for name in dir(kind):
        if name.startswith("_") or name in _PUBLIC:
            continue
        if inspect.isfunction(inspect.getattr_static(kind, name)):
            names.append(name)
    return tuple(names)


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    """Return a function's signature if every parameter has a name, else None."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None
    unnamed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY)
    return None if any(p.kind in unnamed for p in signature.parameters.values()) else signature


def _named(
    signature: inspect.Signature | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call's arguments by name if they fit the signature."""
    if signature is None:
        return args, kwargs
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:
        return args, kwargs
    named = dict(bound.arguments)
    for parameter in signature.parameters.values():
        if parameter.kind == inspect.Parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
    return (), named


def _has_tensor(value: Any) -> bool:
    return bool(value_tree.flatten(value)[0])


def _may_hold_tensor(value: Any) -> bool:
    """Tell whether nested containers may hold a tensor; cheaper than flattening them."""
    if isinstance(value, Tensor):
        return True
    if isinstance(value, dict):
        return any(map(_may_hold_tensor, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_may_hold_tensor, value))
    return hasattr(value, "__dict__") and not isinstance(value, (torch.nn.Module, type))
