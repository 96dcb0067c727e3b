"""Nested Python values as tensors plus a structure that can be compared and rebuilt.

torch's pytree knows registered containers only. Pipelines pass components objects of other classes
(a distribution, a key/value cache), so here any object whose attributes hold tensors, lists or
dictionaries is a container.
"""

import collections
import copy
import dataclasses
import enum
import functools
import types
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor

Build = Callable[[Sequence[Any]], Any]

CONSTANTS = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    enum.Enum,
)


@dataclasses.dataclass(frozen=True)
class Spec:
    """The structure of a value without its tensors."""

    key: Hashable
    """Equal for values of the same structure with the same constants."""
    build: Build
    """Build the value again with other tensors."""


def flatten(value: Any) -> tuple[list[Tensor], Spec]:
    """Return a value's tensors in order, and its structure."""
    leaves: list[Tensor] = []
    key, build = _flatten(value, leaves, set())
    return leaves, Spec(key, build)


def _flatten(value: Any, leaves: list[Tensor], above: set[int]) -> tuple[Hashable, Build]:
    if isinstance(value, Tensor):
        index = len(leaves)
        leaves.append(value)
        return "tensor", lambda tensors: tensors[index]
    if isinstance(value, CONSTANTS):
        return (type(value).__name__, value), lambda tensors: value
    if isinstance(value, torch.Generator):
        # Any generator is as good: a component that draws from one is not exported.
        return "generator", lambda tensors: value
    if id(value) in above or isinstance(value, (torch.nn.Module, type)):
        return _opaque(value)
    above = above | {id(value)}
    if isinstance(value, (list, tuple)):
        return _flatten_sequence(value, leaves, above)
    if isinstance(value, dict):
        return _flatten_dict(value, leaves, above)
    if callable(value) or not hasattr(value, "__dict__"):
        return _opaque(value)
    return _flatten_object(value, leaves, above)


def _opaque(value: Any) -> tuple[Hashable, Build]:
    return (type(value).__qualname__, id(value)), lambda tensors: value


def _flatten_sequence(value: Any, leaves: list[Tensor], above: set[int]) -> tuple[Hashable, Build]:
    kind = type(value)
    parts = [_flatten(item, leaves, above) for item in value]

    def build(tensors: Sequence[Any]) -> Any:
        items = [make(tensors) for _, make in parts]
        return kind(*items) if hasattr(kind, "_fields") else kind(items)

    return (kind.__qualname__, tuple(key for key, _ in parts)), build


def _flatten_dict(value: Any, leaves: list[Tensor], above: set[int]) -> tuple[Hashable, Build]:
    parts = {name: _flatten(item, leaves, above) for name, item in value.items()}

    def build(tensors: Sequence[Any]) -> Any:
        if type(value) is dict:
            return {name: make(tensors) for name, (_, make) in parts.items()}
        new = copy.copy(value)  # an output class: an ordered dict whose entries are attributes too
        for name, (_, make) in parts.items():
            new[name] = make(tensors)
        return new

    return (type(value).__qualname__, tuple((n, key) for n, (key, _) in parts.items())), build


def _flatten_object(value: Any, leaves: list[Tensor], above: set[int]) -> tuple[Hashable, Build]:
    count = len(leaves)
    parts = {name: _flatten(item, leaves, above) for name, item in vars(value).items()}
    if len(leaves) == count and not any(isinstance(v, (list, dict)) for v in vars(value).values()):
        return _opaque(value)

    def build(tensors: Sequence[Any]) -> Any:
        new = copy.copy(value)
        new.__dict__.update({name: make(tensors) for name, (_, make) in parts.items()})
        return new

    return (type(value).__qualname__, tuple((n, key) for n, (key, _) in parts.items())), build


def equal_values(a: Tensor, b: Tensor) -> Tensor:
    """Return where two tensors of one shape have the same value; NaN equals NaN."""
    return (a == b) | (a.isnan() & b.isnan())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors have the same type and values; NaN equals NaN."""
    return (a.dtype, a.shape) == (b.dtype, b.shape) and bool(equal_values(a, b).all())


def update(old: Any, new: Any) -> Any:
    """Set the contents of lists, dictionaries and objects in place; return the new value."""
    if type(old) is not type(new) or old is new:
        return new
    if isinstance(old, list):
        pairs = zip(old, new, strict=False)
        old[:] = [*(update(a, b) for a, b in pairs), *new[len(old) :]]
        return old
    if isinstance(old, tuple) and not hasattr(old, "_fields") and len(old) == len(new):
        return tuple(update(a, b) for a, b in zip(old, new, strict=True))
    if isinstance(old, dict):
        contents = {k: update(old[k], v) if k in old else v for k, v in new.items()}
        old.clear()
        old.update(contents)
        return old
    if is_plain_object(old) and not callable(old):
        update(vars(old), vars(new))
        return old
    return new


MODULE_INTERNALS = frozenset({*vars(torch.nn.Module()), "forward"} - {"training"})
_SIMPLE = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device})


def owners(module: torch.nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the `__dict__` of all that keeps state in a module tree, each with its path.

    These are the modules, and plain objects in their attributes, such as attention processors, in
    which pipelines store counters and caches.
    """
    seen: set[int] = set()
    stack: list[tuple[str, Any]] = list(module.named_modules())
    while stack:
        path, owner = stack.pop()
        if id(owner) in seen:
            continue
        seen.add(id(owner))
        store = vars(owner)
        yield path, store
        for name in sorted(store):  # independent of the order in which they were set
            if name not in MODULE_INTERNALS and type(store[name]) not in _SIMPLE:
                stack.extend(_helpers(store[name], f"{path}.{name}"))


def attributes(module: torch.nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the attributes of a module tree that are state, as (`__dict__` of the owner, name).

    Parameters, buffers and submodules are not.
    """
    for _, store in owners(module):
        for name in sorted(store):
            if name not in MODULE_INTERNALS:
                yield store, name


def _helpers(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the plain objects in an attribute: itself, or in a list or dictionary."""
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, (list, tuple, collections.deque)):
        parts = enumerate(value)
    elif is_plain_object(value):
        yield path, value
    for key, item in parts:
        if type(item) not in _SIMPLE:
            yield from _helpers(item, f"{path}.{key}")


def is_plain_object(value: Any) -> bool:
    """Tell whether a value is an object of a class of its own, whose attributes are its state."""
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, (Tensor, torch.nn.Module, type, torch.Generator))
        and not callable(getattr(value, "__get__", None))  # functions and descriptors
        and type(value).__module__ not in ("builtins", "types", "threading", "weakref")
    )


def describe(value: Any, seen: dict[int, int] | None = None) -> Hashable:
    """Return a hashable description of a state value that does not depend on object identity.

    Tensors count by identity and version, functions by their code and what they close over. Plain
    objects in attributes are walked by `attributes` and count by their class.

    Args:
        value: The value.
        seen: Objects described before, by identity: each is described once.
    """
    kind = type(value)
    if kind is float:
        return repr(value)
    if kind in _SIMPLE:
        return value  # type: ignore[no-any-return]
    if isinstance(value, Tensor):
        return ("tensor", id(value), value._version)
    if isinstance(value, enum.Enum):
        return value
    if isinstance(value, (torch.nn.Module, type)):
        return (value if isinstance(value, type) else kind).__qualname__
    seen = {} if seen is None else seen
    if id(value) in seen:
        return ("seen", seen[id(value)])
    seen[id(value)] = len(seen)
    return (kind.__qualname__, *(describe(part, seen) for part in _parts(value)))


def _parts(value: Any) -> Iterator[Any]:
    """Yield what makes up a value other than a number, a text or a tensor."""
    if isinstance(value, (list, tuple, collections.deque)):
        yield from value
    elif isinstance(value, (set, frozenset)):
        yield from sorted(value, key=repr)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield item
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        yield from (str(value.dtype), str(value.shape), hash(value.tobytes()))
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args)
        yield from value.keywords.values()
    elif isinstance(value, types.MethodType):
        yield from (value.__func__, id(value.__self__))
    elif isinstance(value, types.FunctionType):
        yield value.__qualname__
        if not hasattr(value, RECORDED):
            yield id(value.__code__)
            for cell in value.__closure__ or ():
                yield from cell_contents(cell)
            yield from value.__defaults__ or ()
            yield from (value.__kwdefaults__ or {}).values()
    else:
        yield str(getattr(value, "__qualname__", ""))
        slots = [slot for cls in type(value).__mro__ for slot in getattr(cls, "__slots__", ())]
        yield from (getattr(value, slot) for slot in slots if hasattr(value, slot))


def cell_contents(cell: types.CellType) -> list[Any]:
    """Return what a closure's variable holds, in a list; an empty one where it has no value yet."""
    try:
        return [cell.cell_contents]
    except ValueError:
        return []


HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def hook_functions(module: torch.nn.Module) -> list[Any]:
    """Return a module's own hooks, and the function that replaces its `forward`, if any."""
    store = vars(module)
    functions = [function for name in HOOKS for function in store[name].values()]
    return [*functions, store["forward"]] if "forward" in store else functions


RECORDED = "_diffopt_recorded"
"""Marks the functions that record a component's calls, and are no state of it."""


def fingerprint(
    module: torch.nn.Module,
    weight_key: Callable[[Tensor], Hashable],
    skip: Set[tuple[int, str]] = frozenset(),
) -> int:
    """Return a hash of the state that a module's code may read.

    Two calls of a module with equal fingerprints and signatures run the same graph.

    Args:
        module: The module.
        weight_key: Returns what is equal for weights and buffers of equal contents.
        skip: Attributes to ignore, by the id of their owner's `__dict__` and their name.
    """
    parts: list[Hashable] = []
    with torch._C.DisableTorchFunction():  # what is asked of tensors here is no part of the call
        for child in module.modules():
            store = vars(child)
            kind = id(type(child))
            parts.append((kind, tuple(store["_modules"]), *map(describe, hook_functions(child))))
            for weights in (store["_parameters"].items(), store["_buffers"].items()):
                parts.extend([(n, None if w is None else weight_key(w)) for n, w in weights])
        for store, name in attributes(module):
            if not skip or (id(store), name) not in skip:
                parts.append((name, describe(store[name])))
        return hash(tuple(parts))
