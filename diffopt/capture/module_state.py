"""Saves and restores a component's state: the attributes and hooks of its modules."""

import collections
import dataclasses
import functools
import hashlib
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from diffopt.capture import value_tree
from diffopt.storage.weight_digests import digests

Attribute = tuple[dict[str, Any], str]
"""An attribute of a module or helper object: its `__dict__`, and its name."""


@dataclasses.dataclass(frozen=True)
class State:
    """Every attribute of a module tree with its value, and the contents of all containers."""

    attributes: list[tuple[dict[str, Any], str, Any]]
    hooks: list[tuple[dict[int, Any], dict[int, Any]]]
    """Dictionaries of hooks, and their contents: some libraries install hooks in the first call."""
    containers: list[tuple[Any, Any]]
    """Lists, dictionaries, sets and queues in the attributes at any depth, and copies of them."""
    heard: list[tuple[Any, Any]]
    """Containers and variables that hooks close over, and what they held."""

    def is_heard(self) -> bool:
        """Tell whether a hook has kept something since."""
        return any(not _is_same(before, _contents(now)) for now, before in self.heard)


def save_state(module: torch.nn.Module) -> State:
    """Return the state of a module tree."""
    state = State([], [], [], [])
    seen: set[int] = set()
    for store, name in value_tree.attributes(module):
        state.attributes.append((store, name, store[name]))
        for container in _containers(store[name], seen):
            state.containers.append((container, container.copy()))
    for child in module.modules():
        for name in value_tree.HOOKS:
            hooks = vars(child)[name]
            state.hooks.append((hooks, hooks.copy()))
            state.attributes.append((vars(child), name, hooks))
    known = {id(store) for _, store in value_tree.owners(module)} | seen
    for child in module.modules():
        for function in value_tree.hook_functions(child):
            state.heard.extend((held, _contents(held)) for held in _held(function, known))
    return state


def _held(value: Any, seen: set[int]) -> Iterator[Any]:
    """Yield the containers and variables in which a function may keep something."""
    if id(value) in seen or isinstance(value, (torch.nn.Module, type)):
        return
    if isinstance(value, types.FunctionType):
        seen.add(id(value))
        if not hasattr(value, value_tree.RECORDED):
            for cell in value.__closure__ or ():
                yield from _held(cell, seen)
    elif isinstance(value, types.CellType):
        seen.add(id(value))
        yield value
        for item in _contents(value):
            yield from _held(item, seen)
    elif isinstance(value, types.MethodType):
        yield from _held(value.__func__, seen)
        yield from _held(value.__self__, seen)
    elif isinstance(value, functools.partial):
        for part in (value.func, *value.args, *value.keywords.values()):
            yield from _held(part, seen)
    elif type(value) in _FILL:
        seen.add(id(value))
        yield value
        for item in list(value.values()) if isinstance(value, dict) else list(value):
            yield from _held(item, seen)
    elif value_tree.is_plain_object(value):
        yield from _held(vars(value), seen)


def _contents(held: Any) -> Any:
    return value_tree.cell_contents(held) if isinstance(held, types.CellType) else held.copy()


def _containers(value: Any, seen: set[int]) -> Iterator[Any]:
    """Yield the containers that a value is, or holds at any depth."""
    if isinstance(value, torch.nn.Module) or id(value) in seen:
        return
    if type(value) in _FILL:
        seen.add(id(value))
        yield value
    elif not isinstance(value, tuple):
        return
    for item in value.values() if isinstance(value, dict) else value:
        yield from _containers(item, seen)


_FILL: dict[type, str] = {
    list: "extend",
    collections.deque: "extend",
    dict: "update",
    collections.OrderedDict: "update",
    collections.defaultdict: "update",
    set: "update",
}
"""By type of container: the method that fills it, after `clear`."""


def changed_hooks(state: State) -> list[tuple[dict[int, Any], dict[int, Any]]]:
    """Return the dictionaries of hooks that changed since `save_state`, with their contents."""
    return [(now, now.copy()) for now, before in state.hooks if not _is_same(before, now)]


def restore_state(state: State) -> None:
    """Restore what `save_state` returned, in the same container objects."""
    stores: dict[int, tuple[dict[str, Any], set[str]]] = {}
    for store, name, value in state.attributes:
        stores.setdefault(id(store), (store, set()))[1].add(name)
        store[name] = value
    for held, contents in [*state.containers, *state.hooks, *state.heard]:
        if _is_same(contents, _contents(held)):
            continue
        if not isinstance(held, types.CellType):
            held.clear()
            getattr(held, _FILL[type(contents)])(contents)
        elif contents:
            held.cell_contents = contents[0]
        else:
            del held.cell_contents
    for store, names in stores.values():
        for name in [n for n in store if n not in names and n not in value_tree.MODULE_INTERNALS]:
            del store[name]


def _is_same(a: Any, b: Any) -> bool:
    """Tell whether two containers hold identical objects; tensors have no truth value."""
    if len(a) != len(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(a[k] is b[k] for k in a)
    if isinstance(a, set):
        return bool(a == b)
    return all(x is y for x, y in zip(a, b, strict=True))


def snapshot(value: Any) -> Any:
    """Return a description of a value that a change changes: constants by value, others by id."""
    if isinstance(value, value_tree.CONSTANTS):
        return (type(value), value)
    if isinstance(value, (list, tuple)):
        return (type(value), tuple(snapshot(item) for item in value))
    if isinstance(value, dict):
        return (type(value), tuple((k, snapshot(v)) for k, v in value.items()))
    return id(value)


_OF_A_FILE = ("_name_or_path", "name_or_path", "_internal_dict", "transformers_version")


def settings_digest(module: torch.nn.Module) -> str:
    """Return a digest of what a module tree's attributes set: scales of adapters, tiles, words.

    Numbers, words and containers of them count; where the model was loaded from does not.
    """
    rows = sorted(
        f"{name}={value!r}"
        for store, name in value_tree.attributes(module)
        if name not in _OF_A_FILE and (value := _setting(store[name])) is not _NONE
    )
    kinds = [f"{name}:{type(child).__qualname__}" for name, child in module.named_modules()]
    return hashlib.sha256("\n".join(rows + kinds).encode()).hexdigest()


_NONE = object()


def _setting(value: Any) -> Any:
    """Return a value that consists of numbers and words, or `_NONE`."""
    if isinstance(value, (str, int, float, bool, type(None), torch.dtype)):
        return str(value) if isinstance(value, torch.dtype) else value
    if isinstance(value, (list, tuple)):
        parts = [_setting(item) for item in value]
        return _NONE if any(part is _NONE for part in parts) else parts
    if isinstance(value, dict):
        known = {str(k): _setting(v) for k, v in value.items()}
        return _NONE if any(part is _NONE for part in known.values()) else known
    return _NONE


def pipeline_digests(components: Mapping[str, Any]) -> dict[str, str]:
    """Return a digest of the weights of each component that is a module, and of its settings."""
    modules = {n: c for n, c in components.items() if isinstance(c, torch.nn.Module)}
    settings = {f"{name} (settings)": settings_digest(m) for name, m in modules.items()}
    return digests(modules) | settings
