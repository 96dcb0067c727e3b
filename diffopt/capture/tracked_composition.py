"""Follows texts through f-strings, `%`, `format`, `join` and `in`, which Python runs in C.

While the pipeline runs, its own functions have code that is compiled from their source with calls
in place of these expressions: the parts of `f"a {text}"` are added, which tracked texts note.
Functions without source keep their code; there, a tokenizer takes what is composed as a template.
"""

import ast
import builtins
import contextlib
import inspect
import linecache
import string
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from diffopt.capture.tracked_patterns import SKIPPED
from diffopt.capture.tracked_text import TrackedText, any_tracked, plain_texts, read_all

# What stands in place of the expressions


def joined(*parts: str) -> str:
    """Return the parts of an f-string as one."""
    if not any_tracked(parts):
        return "".join(parts)
    total: Any = None
    for part in parts:
        if isinstance(part, TrackedText) or part:
            total = part if total is None else total + part
    return str(total)


def field(value: Any, conversion: int, spec: str) -> str:
    """Return a field of an f-string."""
    if isinstance(value, TrackedText) and conversion in (ord("r"), ord("a")):
        name = "repr" if conversion == ord("r") else "ascii"
        value = value.made(getattr(builtins, name)(plain_texts(value)), (name, ()))
    elif conversion != -1:
        convert: dict[int, Callable[[Any], Any]] = {ord("s"): str, ord("r"): repr, ord("a"): ascii}
        value = convert[conversion](value)
    if not isinstance(value, TrackedText):
        return format(value, spec)
    if not spec:
        return value
    return str(value.made(format(plain_texts(value), spec), ("format", (spec,))))


def percent(text: Any, values: Any) -> Any:
    """Return `text % values`."""
    row = values if isinstance(values, tuple) else (values,)
    given = [*values.values()] if isinstance(values, dict) else row
    if not isinstance(text, str) or not any_tracked(given):
        return text % values
    literals = text.split("%s")
    if len(literals) != len(row) + 1 or any("%" in literal for literal in literals):
        read_all(given)
        return text % values
    return joined(literals[0], *_between(map(str, row), literals[1:]))


def call(text: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    """Return `text.format(…)` or `text.join(…)`."""
    original = getattr(text, method)
    if not isinstance(text, str):
        return original(*args, **kwargs)
    if method == "join" and len(args) == 1 and not kwargs:
        rows = list(args[0])
        if not any_tracked((text, *rows)):
            return original(rows)
        return joined(*_between([text] * len(rows), rows)[1:])
    values = (*args, *kwargs.values())
    if not any_tracked(values):
        return original(*args, **kwargs)
    known = {**{str(index): value for index, value in enumerate(args)}, **kwargs}
    parts = _parts(text, known)
    if parts is None:
        read_all(values)
        return original(*args, **kwargs)
    return joined(*parts)


def _parts(text: str, known: Mapping[str, Any]) -> list[str] | None:
    """Return a format's literals and values; None where it has other things than values."""
    parts, count = [], 0
    for literal, name, spec, conversion in string.Formatter().parse(text):
        parts.append(literal)
        if name is None:
            continue
        key = name or str(count)
        if spec or conversion or key not in known:
            return None
        parts.append(str(known[key]))
        count += 1
    return parts


def _between(ones: Any, others: Any) -> list[Any]:
    return [part for pair in zip(ones, others, strict=True) for part in pair]


def contains(part: Any, whole: Any) -> bool:
    """Return `part in whole`."""
    if isinstance(part, TrackedText) and type(whole) is str:
        return bool(part.made(plain_texts(part) in whole, ("is_in", (whole,))))
    return part in whole


_FUNCTIONS = {f"__diffopt_{f.__name__}__": f for f in (joined, field, percent, call, contains)}

# The code with calls of these


class _Calls(ast.NodeTransformer):
    def _call(self, function: Callable[..., Any], node: ast.expr, *args: ast.expr) -> ast.Call:
        name = ast.Name(f"__diffopt_{function.__name__}__", ast.Load())
        return ast.copy_location(ast.Call(name, list(args), []), node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.expr:
        """Join the parts of an f-string."""
        self.generic_visit(node)
        parts = []
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                spec = part.format_spec or ast.Constant("")
                part = self._call(field, part, part.value, ast.Constant(part.conversion), spec)
            parts.append(part)
        return self._call(joined, node, *parts)

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        """Replace `%`."""
        self.generic_visit(node)
        if not isinstance(node.op, ast.Mod):
            return node
        return self._call(percent, node, node.left, node.right)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        """Replace `format` and `join`."""
        self.generic_visit(node)
        function = node.func
        if not isinstance(function, ast.Attribute) or function.attr not in ("format", "join"):
            return node
        new = self._call(call, node, function.value, ast.Constant(function.attr), *node.args)
        new.keywords = node.keywords
        return new

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        """Replace `in` and `not in`."""
        self.generic_visit(node)
        if len(node.ops) != 1 or not isinstance(node.ops[0], (ast.In, ast.NotIn)):
            return node
        new: ast.expr = self._call(contains, node, node.left, node.comparators[0])
        is_in = isinstance(node.ops[0], ast.In)
        return new if is_in else ast.copy_location(ast.UnaryOp(ast.Not(), new), node)


@cache
def _codes(file: str) -> dict[types.CodeType, types.CodeType]:
    """Return the code of a file's functions with calls, by the code that they have without."""
    source = "".join(linecache.getlines(file))
    try:
        tree = ast.parse(source)
        plain = compile(tree, file, "exec", dont_inherit=True)
        changed = ast.fix_missing_locations(_Calls().visit(tree))
        stack = [(plain, compile(changed, file, "exec", dont_inherit=True))]
    except (SyntaxError, ValueError, RecursionError):
        return {}
    found = {}
    while stack:
        one, other = stack.pop()
        found[one] = other
        inner = [
            [c for c in code.co_consts if isinstance(c, types.CodeType)] for code in (one, other)
        ]
        if [code.co_qualname for code in inner[0]] == [code.co_qualname for code in inner[1]]:
            stack += zip(*inner, strict=True)
    return found


def _functions(pipeline: Any) -> list[types.FunctionType]:
    """Return the functions of the pipeline's own modules, and those that it holds."""
    found: dict[types.FunctionType, None] = {}
    stack = [pipeline, *getattr(pipeline, "__dict__", {}).values()]
    modules = {kind.__module__ for kind in type(pipeline).__mro__}
    searched: set[str] = set()
    while stack or modules - searched:
        for name in modules - searched:
            searched.add(name)
            stack += _defined_in(name)
        value = stack.pop() if stack else None
        value = getattr(value, "func", value)  # of a partial
        value = getattr(value, "fget", None) or getattr(value, "__func__", value)
        if not isinstance(value, types.FunctionType):
            continue
        value = inspect.unwrap(value)
        if value in found or _is_skipped(value.__module__):
            continue
        found[value] = None
        modules.add(value.__module__)
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty cell
                stack.append(cell.cell_contents)
    return list(found)


def _defined_in(name: str) -> list[Any]:
    """Return the functions of a module, and what its classes hold."""
    if _is_skipped(name) or name not in sys.modules:
        return []
    own = [v for v in vars(sys.modules[name]).values() if getattr(v, "__module__", None) == name]
    return own + [v for kind in own if isinstance(kind, type) for v in vars(kind).values()]


def _is_skipped(module: str | None) -> bool:
    return str(module).partition(".")[0] in SKIPPED


@contextlib.contextmanager
def watching(pipeline: Any) -> Iterator[None]:
    """Give the pipeline's functions code that follows texts, in the context."""
    changed: list[tuple[types.FunctionType, types.CodeType]] = []
    try:
        vars(builtins).update(_FUNCTIONS)
        for function in _functions(pipeline):
            old = function.__code__
            # Where the source is that of this code, and not what a file has become since.
            new = _codes(old.co_filename).get(old)
            if new is None or new.co_freevars != old.co_freevars:
                continue
            function.__code__ = new
            changed.append((function, old))
        yield
    finally:
        for function, old in changed:
            function.__code__ = old
        for name in _FUNCTIONS:
            vars(builtins).pop(name, None)
