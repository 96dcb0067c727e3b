"""Which functions of Python a pipeline's call may reach, by the names in their code."""

import contextlib
import dataclasses
import types
from functools import partial
from typing import Any

import torch

from diffopt.capture.tracked_patterns import SKIPPED

_HOLDERS = (list, tuple, dict, partial, property, staticmethod, classmethod, types.MethodType)


def reachable_functions(pipeline: Any) -> list[types.FunctionType]:
    """Return the functions of a pipeline, of what it holds, and of what these name; no models'.

    A method is one of them where a function that is names it, or where its class is defined in
    the pipeline's own module, as names may be computed there.
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

    def visit(self, value: Any) -> None:
        if id(value) in self.seen:
            return
        self.seen.add(id(value))
        if isinstance(value, _HOLDERS):
            self.stack += _held_by(value)
        elif isinstance(value, types.FunctionType):
            self.stack.append(getattr(value, "__wrapped__", None))
            if not _is_skipped(value.__globals__.get("__name__")):
                self._visit_function(value)
        elif isinstance(value, type):
            if not self._is_other_model(value) and not _is_skipped(value.__module__):
                self._visit_class(value)
        elif value is self.pipeline or not (
            self._is_other_model(type(value)) or _is_skipped(type(value).__module__)
        ):
            self.stack += [*getattr(value, "__dict__", {}).values(), type(value)]

    def _is_other_model(self, kind: type) -> bool:
        return issubclass(kind, torch.nn.Module) and kind is not type(self.pipeline)

    def _visit_function(self, function: types.FunctionType) -> None:
        self.functions[function] = None
        self.stack += values_named_by(function)
        new = names_in(function) - self.names
        self.names |= new
        self.stack += [member for name in new for member in self.members.get(name, ())]

    def _visit_class(self, kind: type) -> None:
        self.stack += kind.__mro__
        is_own = kind.__module__ == type(self.pipeline).__module__
        for name, member in vars(kind).items():
            if dataclasses.is_dataclass(kind) and _is_generated(member):
                continue
            self.members.setdefault(name, []).append(member)
            is_called = name.startswith("__") and kind not in type(self.pipeline).__mro__
            if is_own or is_called or name in self.names:
                self.stack.append(member)


def _held_by(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, property):
        return [value.fget]
    return [value.__func__, getattr(value, "__self__", None)]


def _is_generated(member: Any) -> bool:
    return isinstance(member, types.FunctionType) and member.__code__.co_filename == "<string>"


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
    values = [function.__globals__[name] for name in names if name in function.__globals__]
    for module in [value for value in values if isinstance(value, types.ModuleType)]:
        values += [vars(module)[name] for name in names if name in vars(module)]
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell
            values.append(cell.cell_contents)
    return values
