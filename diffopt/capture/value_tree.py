"""Nested Python values as tensors plus a structure that can be compared and rebuilt.

torch's pytree knows registered containers only. Pipelines pass components objects of other classes
(a distribution, a key/value cache), so here any object whose attributes hold tensors, lists or
dictionaries is a container.
"""

import copy
import dataclasses
import enum
from collections.abc import Callable, Hashable, Iterator, Sequence, Set
from typing import Any

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
    if _is_plain_object(old) and not callable(old):
        update(vars(old), vars(new))
        return old
    return new


MODULE_INTERNALS = frozenset({*vars(torch.nn.Module()), "forward"} - {"training"})
_SIMPLE = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device})


def attributes(module: torch.nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the attributes of a module tree that are state, as (`__dict__` of the owner, name).

    Parameters, buffers and submodules are not. Plain objects in attributes, such as attention
    processors, are walked too, since pipelines store counters and caches in them.
    """
    seen: set[int] = set()
    stack: list[Any] = list(module.modules())
    while stack:
        owner = stack.pop()
        if id(owner) in seen:
            continue
        seen.add(id(owner))
        store = vars(owner)
        for name in sorted(store):  # independent of the order in which they were set
            if name in MODULE_INTERNALS:
                continue
            value = store[name]  # before the consumer may change it
            yield store, name
            if type(value) not in _SIMPLE:
                stack.extend(_helpers(value))


def _helpers(value: Any) -> Iterator[Any]:
    """Yield the plain objects in an attribute: itself, or in a list or dictionary."""
    if isinstance(value, dict):
        for item in value.values():
            if type(item) not in _SIMPLE:
                yield from _helpers(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            if type(item) not in _SIMPLE:
                yield from _helpers(item)
    elif _is_plain_object(value):
        yield value


def _is_plain_object(value: Any) -> bool:
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, (Tensor, torch.nn.Module, type, torch.Generator))
        and not callable(getattr(value, "__get__", None))  # functions and descriptors
        and type(value).__module__ not in ("builtins", "types", "threading", "weakref")
    )


def describe(value: Any, depth: int = 4) -> Hashable:
    """Return a hashable description of a state value that does not depend on object identity.

    Tensors count by identity and version, since their contents are weights or constants.
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
    if depth == 0 or isinstance(value, torch.nn.Module):
        return kind.__qualname__
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=repr)
    if isinstance(value, (list, tuple)):
        return tuple([describe(item, depth - 1) for item in value])
    if isinstance(value, dict):
        return tuple([(str(k), describe(v, depth - 1)) for k, v in value.items()])
    name = getattr(value, "__qualname__", None)
    return str(name) if name else kind.__qualname__  # plain objects' attributes are walked too


def fingerprint(module: torch.nn.Module, skip: Set[tuple[int, str]] = frozenset()) -> int:
    """Return a hash of the state that a module's code may read, weights by identity and version.

    Two calls of a module with equal fingerprints and signatures run the same graph.

    Args:
        module: The module.
        skip: Attributes to ignore, by the id of their owner's `__dict__` and their name.
    """
    parts: list[Hashable] = []
    for child in module.modules():
        store = vars(child)
        hooks = len(store["_forward_hooks"]) + len(store["_forward_pre_hooks"])
        parts.append((type(child), tuple(store["_modules"]), hooks))
        parts.extend([(id(p), p._version) for p in store["_parameters"].values() if p is not None])
        parts.extend([(n, b is None) for n, b in store["_buffers"].items()])
    for store, name in attributes(module):
        if not skip or (id(store), name) not in skip:
            parts.append((name, describe(store[name])))
    return hash(tuple(parts))
