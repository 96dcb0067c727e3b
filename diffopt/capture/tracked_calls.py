"""Functions of C and of the standard library, which no tracked text sees at work.

`followed_code` hands each function that the pipeline's own code calls to `callee`: what may look
into a text reads all of the tracked ones among its arguments. What only carries texts (containers,
iterators, `print`, `copy` …), or is Python of another package, is called as it is.
"""

import builtins
import collections
import collections.abc
import functools
import inspect
import itertools
import operator
import sys
import types
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from diffopt.capture.tracked_composition import field, of_plain, reading
from diffopt.capture.tracked_text import (
    TrackedText,
    plain_texts,
    read_all,
    text_of,
    tracked_in,
)

# By identity, as classes may be equal to others, and have no hash. They look at texts by methods
# that Python calls, or not at all; and the first ones at the frame that calls them.
_CARRYING = frozenset(
    id(function)
    for function in (
        *(super, locals, vars, globals, dir, eval, exec, object, property, staticmethod),
        *(classmethod, isinstance, issubclass, callable, id, hash, len, iter, next, enumerate),
        *(zip, reversed, any, all, sum, list, tuple, set, frozenset, dict, bool, slice, range),
        *(float, sorted, min, max, operator.is_, operator.is_not),
    )
)
# They call functions among their arguments.
_CALLING = frozenset(
    id(function)
    for function in (
        *(map, filter, functools.reduce, itertools.starmap, itertools.takewhile),
        *(itertools.dropwhile, itertools.filterfalse, itertools.groupby, itertools.accumulate),
    )
)
# Modules whose functions and classes carry texts, or take none.
_CARRYING_MODULES = frozenset(
    (
        *("abc", "argparse", "asyncio", "bisect", "collections", "concurrent", "contextlib"),
        *("contextvars", "copy", "dataclasses", "enum", "functools", "gc", "heapq", "inspect"),
        *("itertools", "logging", "queue", "sys", "threading", "traceback", "types"),
        *("typing", "unittest", "warnings", "weakref", "torch"),
    )
)
_READING_PACKAGES = (
    sys.stdlib_module_names
    | {"numpy", "PIL", "scipy", "sympy", "networkx", "onnx", "ftfy", "yaml", "requests"}
    | {"transformers", "tokenizers", "packaging", "huggingface_hub", "regex"}
) - _CARRYING_MODULES
_CONTAINERS = (
    *(dict, list, tuple, set, frozenset, collections.deque, types.MappingProxyType),
    *(types.GeneratorType, types.AsyncGeneratorType, types.CoroutineType),
)
_OF_C = (types.BuiltinFunctionType, types.MethodWrapperType)
_DESCRIPTORS = (
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.ClassMethodDescriptorType,
)
_FUNCTIONS = (types.FunctionType, types.MethodType, partial, *_OF_C, *_DESCRIPTORS)


def callee(function: Any, is_discarded: bool = False) -> Any:
    """Return a function that stands for one which the pipeline's own code calls.

    Args:
        function: The one that it calls.
        is_discarded: Whether nothing is made of its result, so that it only checks.
    """
    if is_discarded and isinstance(function, types.FunctionType):
        function = vars(function).get("checked", function)
    inner = function.__func__ if type(function) is types.MethodType else function
    kind = type(inner)
    if id(function) in _OTHERS:
        return _OTHERS[id(function)]
    if kind is types.FunctionType:
        module = inner.__globals__.get("__name__")
        if module == "logging" and function.__name__ in _LOGGING:
            return _saying(function)
        is_method = inner is not function
        if is_method and function.__name__ == "tokenize" and _package(module) == "transformers":
            return _tokenizing(function)
        # numpy's functions, which capture replaces
        is_array = module == "diffopt.capture.tracked_arrays"
        return reading(function) if is_array else _by_module(function, module)
    if kind in _OF_C and not isinstance(function.__self__, types.ModuleType):
        return _bound(function, function.__self__)
    if kind in _DESCRIPTORS and function.__objclass__ is str:
        return partial(_of_str, function.__name__)
    if kind in _DESCRIPTORS:
        is_carrying = function.__name__ in _SETTING or issubclass(
            function.__objclass__, _CONTAINERS
        )
        return function if is_carrying else reading(function)
    if kind is partial:
        return partial(callee(function.func), *function.args, **function.keywords)
    if kind in _OF_C or isinstance(function, type):
        return _known(function)
    method = inspect.getattr_static(kind, "__call__", None)
    is_python = isinstance(method, types.FunctionType)
    module = method.__globals__.get("__name__") if is_python else kind.__module__
    return _by_module(function, module)


def argument(value: Any) -> Any:
    """Return what stands for a function of C that is handed to be called later."""
    return callee(value) if type(value) in (*_OF_C, *_DESCRIPTORS, partial) else value


_SETTING = ("__setattr__", "__delattr__")


def _by_module(function: Any, module: str | None) -> Any:
    is_reading = _package(module) in _READING_PACKAGES and not _is_carrying(module)
    return reading(function) if is_reading else function


def _package(module: str | None) -> str:
    return str(module).partition(".")[0]


def _is_carrying(module: str | None) -> bool:
    return _package(module).lstrip("_") in _CARRYING_MODULES


def _known(function: Any) -> Any:
    """Return what stands for a function of a C module, or for a class."""
    if id(function) in _CARRYING:
        return function
    if id(function) in _CALLING:
        return _calling(function)
    if not isinstance(function, type):
        return function if _is_carrying(function.__module__) else reading(function)
    if issubclass(function, BaseException):
        return function
    is_text = issubclass(function, (str, collections.UserString))
    return reading(function) if is_text else _by_module(function, function.__module__)


def _bound(function: Any, owner: Any) -> Any:
    """Return what stands for a method of C."""
    if type(owner) is str:
        return partial(of_plain, owner, function.__name__)
    if function.__name__ in _SETTING or owner is sys.stdout or owner is sys.stderr:
        return function
    kind = owner if isinstance(owner, type) else type(owner)
    if kind is object or issubclass(kind, (BaseException, *_CONTAINERS)):
        return function
    # torch's functions are methods of a class that says nothing of its module.
    is_torch = getattr(torch, function.__name__, None) is function
    return function if is_torch or _is_carrying(kind.__module__) else reading(function)


def _of_str(name: str, /, *args: Any, **kwargs: Any) -> Any:
    """Call `str.name` as a method."""
    if args and type(args[0]) is str:
        return of_plain(args[0], name, *args[1:], **kwargs)
    if args and isinstance(args[0], TrackedText):
        return getattr(args[0], name)(*args[1:], **kwargs)
    return reading(getattr(str, name))(*args, **kwargs)


def _calling(function: Callable[..., Any]) -> Callable[..., Any]:
    def followed(value: Any) -> Any:
        return callee(value) if type(value) in _FUNCTIONS or isinstance(value, type) else value

    def call(*args: Any, **kwargs: Any) -> Any:
        named = {name: followed(value) for name, value in kwargs.items()}
        return function(*map(followed, args), **named)

    return call


# Functions that look into some arguments only, and those whose result is followed


def _kind(*args: Any, **kwargs: Any) -> Any:
    if len(args) != 1:
        return type(*args, **kwargs)
    kind = type(args[0])
    is_ours = kind.__module__.startswith("diffopt.capture.tracked_")
    return args[0].__class__ if is_ours else kind


def _int(*args: Any, **kwargs: Any) -> int:
    return int(*args) if len(args) == 1 and not kwargs else reading(int)(*args, **kwargs)


def _str(*args: Any, **kwargs: Any) -> str:
    return text_of(args[0]) if len(args) == 1 and not kwargs else str(*args, **kwargs)


def _print(*args: Any, **kwargs: Any) -> None:
    file = kwargs.get("file")
    if file is not None and file not in (sys.stdout, sys.stderr):
        read_all(args)
    builtins.print(*map(_shown, args), **kwargs)


def _shown(value: Any) -> Any:
    """Return what is printed or logged, of which nothing depends on it."""
    if type(value) in (list, tuple):
        return type(value)(map(_shown, value)) if tracked_in(value) else value
    return plain_texts(value) if isinstance(value, TrackedText) else value


def _saying(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that logs or warns: texts are kept by nobody as tracked ones."""

    def call(*args: Any, **kwargs: Any) -> None:
        args = tuple(map(_shown, args))
        if len(args) > _STACK_LEVEL and function is warnings.warn:
            args = (*args[:_STACK_LEVEL], args[_STACK_LEVEL] + 1, *args[_STACK_LEVEL + 1 :])
        else:
            kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1
        function(*args, **kwargs)

    return call


_LOGGING = ("debug", "info", "warning", "warn", "error", "exception", "critical", "log")
_STACK_LEVEL = 2  # the place of it among the arguments of `warnings.warn`


def _format(value: Any, spec: str = "") -> str:
    return field(value, -1, spec)


def _tokenizing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a tokenizer's method that gives tokens as texts, which are looked up by name."""

    def call(text: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(text, TrackedText):
            for token in function.__self__.added_tokens_encoder:  # type: ignore[attr-defined]
                text.made(str.__contains__(text, token), ("__contains__", (token,)))
        return function(plain_texts(text), *args, **kwargs)

    return call


def _by_name(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(owner: Any, name: Any, *args: Any) -> Any:
        read_all([name])
        return function(owner, plain_texts(name), *args)

    return call


_REPLACED: dict[Any, Callable[..., Any]] = {
    **{function: _by_name(function) for function in (getattr, hasattr, setattr, delattr)},
    **{type: _kind, str: _str, int: _int, print: _print, format: _format},
    inspect.cleandoc: reading(inspect.cleandoc),
    sys.intern: reading(sys.intern),
    warnings.warn: _saying(warnings.warn),
    repr: lambda value: field(value, ord("r"), ""),
    ascii: lambda value: field(value, ord("a"), ""),
}
_OTHERS = {id(function): other for function, other in _REPLACED.items()}
