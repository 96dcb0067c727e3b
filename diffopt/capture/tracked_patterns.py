"""What the standard library makes of the caller's texts: regular expressions, entities, JSON.

Its functions read a text in C, where no method of it is called. In a run of the pipeline they are
replaced by functions that say what they made, in their modules and in those that have taken them
from there; and regular expressions that modules and classes hold, as those know no other way.
"""

import contextlib
import html
import json
import re
import sys
import types
import unicodedata
import urllib.parse
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import regex

from diffopt import optional
from diffopt.capture.tracked_composition import handed, reading
from diffopt.capture.tracked_text import (
    ReadingWholeOfErrors,
    TrackedText,
    any_tracked,
    as_arguments,
    calling_package,
    plain_texts,
    read_all,
)

# By method of a pattern: its parameters. In functions of `re`, "pattern" comes first.
_METHODS = {
    **dict.fromkeys(("search", "match", "fullmatch", "findall", "finditer"), ("string",)),
    "split": ("string", "maxsplit"),
    **dict.fromkeys(("sub", "subn"), ("repl", "string", "count")),
}
# Their modules hold nothing that pipelines call with a text.
SKIPPED = frozenset(
    (
        *sys.stdlib_module_names,
        *("diffopt", "torch", "numpy", "PIL", "scipy", "sympy", "networkx", "onnx", "rich"),
        *("transformers", "tokenizers", "ftfy", "huggingface_hub", "pytest", "_pytest", "mypy"),
        *("accelerate", "tqdm", "packaging", "yaml", "requests", "regex"),
    )
) - {"__main__"}


class TrackedPattern:
    """A regular expression of `re` or `regex`, which says what it finds in a tracked text."""

    def __init__(self, pattern: Any) -> None:
        self._pattern = pattern

    __class__ = property(lambda self: type(self._pattern))

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._pattern, name)
        return self._method(name, value) if name in _METHODS else value

    def __eq__(self, other: object) -> bool:
        return bool(self._pattern == getattr(other, "_pattern", other))

    def __hash__(self) -> int:
        return hash(self._pattern)

    def __reduce__(self) -> Any:
        return _library(self._pattern).compile, (self._pattern.pattern, self._pattern.flags)

    def _method(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def method(*args: Any, **kwargs: Any) -> Any:
            if not any_tracked((*args, *kwargs.values())):
                return reading(original)(*args, **kwargs)
            result = original(*map(handed, plain_texts(args)), **plain_texts(kwargs))
            named = dict(zip(_METHODS[name], args, strict=False)) | kwargs
            text = named.pop("string", None)
            step = self._step(name, named) if len(args) <= len(_METHODS[name]) else None
            if step is None or not isinstance(text, TrackedText):
                read_all((*args, *kwargs.values()))
                return result
            if name == "finditer":
                return iter(text.made(list(result), step))
            return text.made(result, step)

        return method

    def _step(self, name: str, named: Mapping[str, Any]) -> tuple[str, tuple[Any, ...]] | None:
        """Return the step of a call with these arguments beside the text; None where it is none."""
        own: dict[str, tuple[Any, ...]] = {
            "split": (named.get("maxsplit", 0),),
            "sub": (named.get("repl"), named.get("count", 0)),
        }
        args = as_arguments((*own.get(name, ()), self.pattern, self.flags))
        is_known = name != "subn" and named.keys() <= set(_METHODS[name])
        library = _library(self._pattern).__name__
        return (f"{library}.{name}", args) if is_known and args is not None else None


def _library(pattern: Any) -> Any:
    """Return the library of a regular expression."""
    return re if type(pattern) is re.Pattern else regex


def _of_re(library: Any, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        if not any_tracked((*args, *kwargs.values())):
            return reading(original)(*args, **kwargs)
        parameters = ("pattern", *_METHODS[name], "flags")
        named = dict(zip(parameters, args, strict=False)) | kwargs
        pattern, flags = named.pop("pattern"), named.pop("flags", 0)
        read_all([pattern])
        compiled = library.compile(plain_texts(pattern), flags)
        return getattr(TrackedPattern(compiled), name)(**named)

    return function


def _compile(original: Callable[..., Any]) -> Callable[..., Any]:
    def compile(pattern: Any, flags: Any = 0) -> Any:
        read_all([pattern])
        frame = sys._getframe(1)
        result = original(plain_texts(pattern), flags)
        is_module = frame.f_code.co_name == "<module>"  # imported now, and used later
        return result if is_module or calling_package(frame) in SKIPPED else TrackedPattern(result)

    return compile


def _of_text(name: str, original: Callable[..., Any], place: int = 0) -> Callable[..., Any]:
    """Return a function that takes a text at a place of its arguments, and returns one."""

    def function(*args: Any, **kwargs: Any) -> Any:
        text = args[place] if len(args) > place else None
        rest = as_arguments((*args[:place], *args[place + 1 :]))
        if not isinstance(text, TrackedText) or kwargs or rest is None:
            return reading(original)(*args, **kwargs)
        return text.made(original(*plain_texts(args)), (name, rest))

    return function


def _loads(original: Callable[..., Any]) -> Callable[..., Any]:
    def loads(*args: Any, **kwargs: Any) -> Any:
        text = args[0] if args else None
        if not isinstance(text, TrackedText) or kwargs:
            return reading(original)(*args, **kwargs)
        with ReadingWholeOfErrors(text):
            return text.made(original(plain_texts(text)), ("json.loads", ()))

    def checked(*args: Any, **kwargs: Any) -> None:
        text = args[0] if args else None
        if not isinstance(text, TrackedText) or kwargs:
            loads(*args, **kwargs)
            return
        with ReadingWholeOfErrors(text):
            original(plain_texts(text))
        text.read(("is_json", ()), result=True)

    loads.checked = checked  # type: ignore[attr-defined]
    return loads


@cache
def _functions() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what stands for each function of the standard library."""
    rows = {json.loads: _loads(json.loads)}
    for library in (re, regex):
        functions = {name: getattr(library, name) for name in _METHODS}
        rows |= {original: _of_re(library, name, original) for name, original in functions.items()}
        rows[library.compile] = _compile(library.compile)
    texts: dict[str, Callable[..., Any]] = {
        "re.escape": re.escape,
        "json.dumps": json.dumps,
        "html.unescape": html.unescape,
        "html.escape": html.escape,
        "urllib.parse.unquote": urllib.parse.unquote,
        "urllib.parse.unquote_plus": urllib.parse.unquote_plus,
    }
    ftfy = optional.module_or_reason("ftfy")
    if isinstance(ftfy, types.ModuleType):
        texts["ftfy.fix_text"] = ftfy.fix_text
    rows |= {original: _of_text(name, original) for name, original in texts.items()}
    normalize = unicodedata.normalize
    return rows | {normalize: _of_text("unicodedata.normalize", normalize, 1)}


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """Let functions and regular expressions say what they make of texts in the context."""
    changed: list[tuple[Any, str, Any]] = []
    try:
        for owner, name in _holders():
            value = vars(owner).get(name)
            new = _replacement(value)
            if new is not None:
                setattr(owner, name, new)
                changed.append((owner, name, value))
        yield
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)


def _replacement(value: Any) -> Any:
    """Return what stands for a function or a pattern; None for anything else."""
    if type(value) in (re.Pattern, regex.Pattern):
        return TrackedPattern(value)
    is_function = type(value) in (types.FunctionType, types.BuiltinFunctionType)
    return _functions().get(value) if is_function else None


def _holders() -> Iterator[tuple[Any, str]]:
    """Yield the modules and classes that hold a function or a pattern, and its name there."""
    yield from ((sys.modules[f.__module__], f.__name__) for f in _functions())
    yield from ((regex, name) for name in (*_METHODS, "compile"))
    for name, module in list(sys.modules.items()):
        # By its type: objects of other kinds say that they are of a module's class.
        if name.partition(".")[0] in SKIPPED or not issubclass(type(module), types.ModuleType):
            continue
        count, held = _seen.get(module, (-1, []))
        if count != len(vars(module)):
            held = _held_by(module)
            _seen[module] = (len(vars(module)), held)
        yield from held


# By module: how many names it had when it was searched, and what was found.
_seen: "weakref.WeakKeyDictionary[types.ModuleType, tuple[int, list[tuple[Any, str]]]]" = (
    weakref.WeakKeyDictionary()
)


def _held_by(module: types.ModuleType) -> list[tuple[Any, str]]:
    values = list(vars(module).values())
    own = [v for v in values if isinstance(v, type) and v.__module__ == module.__name__]
    return [
        (owner, name)
        for owner in (module, *own)
        for name, value in list(vars(owner).items())
        if _replacement(value) is not None
    ]
