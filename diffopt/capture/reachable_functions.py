"""Which functions of Python a pipeline's call may reach, by the names in their code."""

import collections
import contextlib
import dataclasses
import functools
import inspect
import sys
import types
from typing import Any

import torch

from diffopt.capture.tracked_patterns import SKIPPED

# What functions are kept in. Their attributes hold what they hold.
_HOLDERS: tuple[type, ...] = (
    *(dict, list, tuple, set, frozenset, types.MappingProxyType, types.SimpleNamespace),
    *(collections.deque, collections.ChainMap, collections.UserDict, types.MethodType),
    *(functools.partial, functools.partialmethod, functools.cached_property),
    *(functools.singledispatchmethod, property, staticmethod, classmethod),
)
_PARTS: tuple[str, ...] = (
    "__wrapped__",
    "__func__",
    "__self__",
    "func",
    "args",
    "keywords",
    "fget",
    "fset",
    "fdel",
)
_PARTS += ("dispatcher", "registry", "__dict__", "__defaults__", "__kwdefaults__", "maps", "data")
_DEPTH = 4  # of modules in modules
LIBRARIES = frozenset(("torch", "diffusers", "transformers", "timm", "peft", "torchao"))
"""Their models take no texts."""


def reachable_functions(pipeline: Any) -> list[types.FunctionType]:
    """Return the functions of a pipeline, of what it holds, and of what these name.

    A method is one of them where a function that is names it, or where its class is defined in
    the pipeline's own module, as names may be computed there. The models of libraries have none.
    """
    search = _Search(pipeline)
    while search.stack:
        search.visit(search.stack.pop())
    return list(search.functions)


class _Search:
    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.functions: dict[types.FunctionType, None] = {}
        self.names = {"__call__"}
        # Of classes that were visited, by name.
        self.members: dict[str, list[Any]] = {}
        self.stack = [pipeline]
        self.seen: set[int] = set()
        # What was made to be visited, so that no other object has its identity.
        self.kept: list[Any] = []

    def visit(self, value: Any) -> None:
        if id(value) in self.seen:
            return
        self.seen.add(id(value))
        self.kept.append(value)
        kind = type(value)
        if issubclass(kind, types.FunctionType):
            self._visit_parts(value)
            if not _is_skipped(value.__globals__.get("__name__")):
                self._visit_function(value)
        elif issubclass(kind, type):
            if not self._is_library_model(value) and not _is_skipped(value.__module__):
                self._visit_class(value)
        elif issubclass(kind, _HOLDERS) or kind.__module__ == "functools":
            self._visit_parts(value)
            self.stack += _items(value)
        elif value is self.pipeline or not (
            self._is_library_model(kind) or _is_skipped(kind.__module__)
        ):
            self.stack += [*_attributes(value), kind]

    def _visit_parts(self, value: Any) -> None:
        self.stack += [part for name in _PARTS if (part := _attribute(value, name)) is not None]

    def _is_library_model(self, kind: type) -> bool:
        is_library = str(kind.__module__).partition(".")[0] in LIBRARIES
        return is_library and issubclass(kind, torch.nn.Module) and kind is not type(self.pipeline)

    def _visit_function(self, function: types.FunctionType) -> None:
        self.functions[function] = None
        self.stack += values_named_by(function)
        new = names_in(function) - self.names
        self.names |= new
        self.stack += [member for name in new for member in self.members.get(name, ())]

    def _visit_class(self, kind: type) -> None:
        self.stack += [*kind.__mro__, type(kind)]
        is_own = kind.__module__ == type(self.pipeline).__module__
        for name, member in vars(kind).items():
            if dataclasses.is_dataclass(kind) and _is_generated(member):
                continue
            self.members.setdefault(name, []).append(member)
            if is_own or name.startswith("__") or name in self.names:
                self.stack.append(member)


def _attribute(value: Any, name: str) -> Any:
    """Return an attribute that is there without asking the object's own `__getattr__`."""
    try:
        return object.__getattribute__(value, name)
    except Exception:  # of descriptors, which may raise anything
        return None


def _attributes(value: Any) -> list[Any]:
    """Return the values of an object's attributes, in slots, too."""
    slots = [name for kind in type(value).__mro__ for name in _slots(kind)]
    held = [_attribute(value, name) for name in slots]
    return [*(_attribute(value, "__dict__") or {}).values(), *held]


def _slots(kind: type) -> list[str]:
    slots = vars(kind).get("__slots__", ())
    return [slots] if isinstance(slots, str) else [name for name in slots if isinstance(name, str)]


def _items(value: Any) -> list[Any]:
    """Return what a container holds."""
    if isinstance(value, (dict, types.MappingProxyType)):
        return [*value.keys(), *value.values()]
    return (
        list(value) if isinstance(value, (list, tuple, set, frozenset, collections.deque)) else []
    )


def _is_generated(member: Any) -> bool:
    """Tell whether a method of a dataclass is of its making."""
    if not isinstance(member, types.FunctionType):
        return False
    file: str = inspect.unwrap(member).__code__.co_filename
    return file == "<string>"


def _is_skipped(module: str | None) -> bool:
    return str(module).partition(".")[0] in SKIPPED


def codes_of(function: types.FunctionType) -> list[types.CodeType]:
    """Return the code of a function, and of those in it."""
    codes = [function.__code__]
    for code in codes:
        codes += inner_codes(code)
    return codes


def inner_codes(code: types.CodeType) -> list[types.CodeType]:
    """Return the code of functions, classes and comprehensions right in this one."""
    return [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]


def names_in(function: types.FunctionType) -> set[str]:
    """Return the names of globals and attributes in a function's code."""
    return {name for code in codes_of(function) for name in code.co_names}


def values_named_by(function: types.FunctionType) -> list[Any]:
    """Return what a function's closure holds, and what its code names of its globals."""
    names = names_in(function)
    values: list[Any] = []
    found = [function.__globals__[name] for name in names if name in function.__globals__]
    # Imported in the function
    found += [sys.modules[name] for name in names if name in sys.modules]
    for _ in range(_DEPTH):
        values += found
        modules = [value for value in found if issubclass(type(value), types.ModuleType)]
        found = [vars(module)[name] for module in modules for name in names if name in vars(module)]
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell
            values.append(cell.cell_contents)
    return [value for value in values if not isinstance(value, types.ModuleType)]
