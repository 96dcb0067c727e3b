"""Saves and restores a component's state: the attributes and hooks of its modules."""

from typing import Any

import torch

from diffopt.capture import value_tree

HOOKS = ("_forward_hooks", "_forward_pre_hooks")

Attribute = tuple[dict[str, Any], str]
"""An attribute of a module or helper object: its `__dict__`, and its name."""

State = list[tuple[dict[str, Any], str, Any, Any]]


def save_state(module: torch.nn.Module) -> State:
    """Return every attribute of a module tree with its value and contents."""
    rows: State = []
    for store, name in value_tree.attributes(module):
        value = store[name]
        rows.append((store, name, value, value.copy() if type(value) in (list, dict) else None))
    for child in module.modules():
        # Some libraries install hooks in the first call.
        for name in HOOKS:
            store = vars(child)
            rows.append((store, name, store[name], store[name].copy()))
    return rows


def changed_hooks(rows: State) -> list[tuple[dict[int, Any], dict[int, Any]]]:
    """Return the dictionaries of hooks that changed since `save_state`, with their contents."""
    return [
        (value, value.copy())
        for _, name, value, contents in rows
        if name in HOOKS and not _is_same(contents, value)
    ]


def restore_state(rows: State) -> None:
    """Restore what `save_state` returned, in the same list and dictionary objects."""
    stores: dict[int, tuple[dict[str, Any], set[str]]] = {}
    for store, name, value, contents in rows:
        stores.setdefault(id(store), (store, set()))[1].add(name)
        store[name] = value
        if contents is None or _is_same(contents, value):
            continue
        value.clear()
        if isinstance(value, list):
            value.extend(contents)
        else:
            value.update(contents)
    for store, names in stores.values():
        for name in [n for n in store if n not in names and n not in value_tree.MODULE_INTERNALS]:
            del store[name]


def _is_same(a: Any, b: Any) -> bool:
    """Tell whether two containers hold identical objects; tensors have no truth value."""
    if len(a) != len(b):
        return False
    if isinstance(a, list):
        return all(x is y for x, y in zip(a, b, strict=True))
    return list(a) == list(b) and all(a[k] is b[k] for k in a)


def snapshot(value: Any) -> Any:
    """Return a description of a value that a change changes: constants by value, others by id."""
    if isinstance(value, value_tree.CONSTANTS):
        return (type(value), value)
    if isinstance(value, (list, tuple)):
        return (type(value), tuple(snapshot(item) for item in value))
    if isinstance(value, dict):
        return (type(value), tuple((k, snapshot(v)) for k, v in value.items()))
    return id(value)
