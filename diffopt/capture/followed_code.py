"""The pipeline's own functions, compiled so that what Python does in C with a text is seen.

While the pipeline runs, its own functions have code that is compiled from their source, with calls
in place of f-strings, `%` and `in`, and with each function that is called handed to `callee` first.
Only where the source compiles to exactly the code that a function has.
"""

import ast
import builtins
import contextlib
import copy
import dis
import linecache
import types
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from diffopt.capture.reachable_functions import (
    codes_of,
    inner_codes,
    names_in,
    reachable_functions,
    values_named_by,
)
from diffopt.capture.tracked_calls import argument, callee
from diffopt.capture.tracked_composition import (
    contains,
    field,
    has_items,
    joined,
    percent,
    percent_in_place,
    seen,
)
from diffopt.capture.tracked_text import plain_texts, read_all


def evaluated(code: Any) -> Any:
    """Return what `eval` or `exec` is given, with calls in place of what Python does in C."""
    read_all([code])
    if not isinstance(code, str):
        return code
    source = plain_texts(code)
    for mode, text in (("eval", source.lstrip(" \t")), ("exec", source)):
        with contextlib.suppress(SyntaxError, ValueError):
            tree = ast.fix_missing_locations(_Calls().visit(ast.parse(text, mode=mode)))
            return compile(tree, "<string>", mode, dont_inherit=True)
    return source


_FUNCTIONS = {
    f"__diffopt_{function.__name__}__": function
    for function in (
        *(joined, field, percent, percent_in_place, contains, has_items, seen),
        *(callee, argument, evaluated),
    )
}
# Of what the pipeline keeps of a capture (functions that it made in a call), the code stays.
_AFTERWARDS: dict[str, Callable[..., Any]] = {
    "__diffopt_callee__": lambda function, is_discarded=False: function,
    "__diffopt_argument__": lambda value: value,
    "__diffopt_evaluated__": lambda code: code,
}


class _Calls(ast.NodeTransformer):
    """Puts calls of `_FUNCTIONS` in the place of expressions."""

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

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.stmt:
        """Replace `%=`; of attributes and items, which are looked up once, read the operand."""
        self.generic_visit(node)
        if not isinstance(node.op, ast.Mod):
            return node
        if not isinstance(node.target, ast.Name):
            node.value = self._call(seen, node.value, node.value)
            return node
        before = ast.copy_location(ast.Name(node.target.id, ast.Load()), node)
        value = self._call(percent_in_place, node.value, before, node.value)
        return ast.copy_location(ast.Assign([node.target], value), node)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        """Hand the function that is called to `callee`, and those among its arguments."""
        self.generic_visit(node)
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name in ("eval", "exec") and len(node.args) == 1:  # with the builtins that are here
            node.args = [self._call(evaluated, code, code) for code in node.args]
        elif name != "super":  # which compilers know by its name
            node.func = self._call(callee, node.func, node.func)
        kinds = (ast.Name, ast.Attribute, ast.Call)
        node.args = [self._call(argument, a, a) if isinstance(a, kinds) else a for a in node.args]
        for keyword in node.keywords:
            if keyword.arg is not None and isinstance(keyword.value, kinds):
                keyword.value = self._call(argument, keyword.value, keyword.value)
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.stmt:
        """Say of a call that its result is discarded."""
        self.generic_visit(node)
        call = node.value
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Call) and _is_callee(call.func):
            call.func.args.append(ast.copy_location(ast.Constant(True), call))
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        """Replace `in` and `not in`; in chains, read what is compared."""
        self.generic_visit(node)
        if not any(isinstance(op, (ast.In, ast.NotIn)) for op in node.ops):
            return node
        if len(node.ops) > 1:
            node.left = self._call(seen, node.left, node.left)
            node.comparators = [self._call(seen, value, value) for value in node.comparators]
            return node
        new: ast.expr = self._call(contains, node, node.left, node.comparators[0])
        is_in = isinstance(node.ops[0], ast.In)
        return new if is_in else ast.copy_location(ast.UnaryOp(ast.Not(), new), node)

    # What is only tested

    def visit_If(self, node: ast.If) -> Any:
        """Test whether a text is empty, and not how long it is."""
        return self._with_test(node)

    def visit_While(self, node: ast.While) -> Any:
        """As `if`."""
        return self._with_test(node)

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        """As `if`."""
        return self._with_test(node)

    def _with_test(self, node: Any) -> Any:
        self.generic_visit(node)
        node.test = self._tested(node.test)
        return node

    def _tested(self, node: ast.expr) -> ast.expr:
        if isinstance(node, ast.BoolOp):
            node.values = [self._tested(value) for value in node.values]
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            node.operand = self._tested(node.operand)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Call):
            function, is_one = node.func, len(node.args) == 1 and not node.keywords
            name = function.args[0] if _is_callee(function) else None
            if isinstance(name, ast.Name) and name.id == "len" and is_one:
                return self._call(has_items, node, name, node.args[0])
        return node


def _is_callee(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Name) and node.func.id == f"__diffopt_{callee.__name__}__"


@cache
def _statements(file: str) -> list[ast.stmt]:
    """Return the statements of a file."""
    try:
        return ast.parse("".join(linecache.getlines(file))).body
    except (SyntaxError, ValueError, RecursionError):
        return []


@cache
def _codes(file: str, index: int) -> dict[types.CodeType, types.CodeType]:
    """Return the code of a statement's functions with calls, by the code that they have without."""
    statements = _statements(file)
    # With the others than definitions: which names are imported changes how they are compiled.
    kept = [s for i, s in enumerate(statements) if i == index or not isinstance(s, _DEFINITIONS)]
    tree = ast.Module(kept, [])
    plain = compile(tree, file, "exec", dont_inherit=True)
    changed = ast.fix_missing_locations(_Calls().visit(copy.deepcopy(tree)))
    stack = [(plain, compile(changed, file, "exec", dont_inherit=True))]
    found = {}
    while stack:
        one, other = stack.pop()
        found[one] = other
        inner = [inner_codes(one), inner_codes(other)]
        if [code.co_qualname for code in inner[0]] == [code.co_qualname for code in inner[1]]:
            stack += zip(*inner, strict=True)
    return found


def _with_calls(code: types.CodeType) -> types.CodeType | None:
    """Return a function's code with calls; None where a file's source is not that of this code."""
    for index, statement in enumerate(_statements(code.co_filename)):
        parts = [statement, *getattr(statement, "decorator_list", ())]
        first, last = min(part.lineno for part in parts), statement.end_lineno or 0
        if first <= code.co_firstlineno <= last:
            new = _codes(code.co_filename, index).get(code)
            if new is not None and new.co_freevars == code.co_freevars:
                return new
    return None


_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@contextlib.contextmanager
def watching(pipeline: Any) -> Iterator[None]:
    """Give the pipeline's functions code that follows texts, in the context."""
    changed: list[tuple[types.FunctionType, types.CodeType]] = []
    try:
        vars(builtins).update(_FUNCTIONS)
        for function in reachable_functions(pipeline):
            old = function.__code__
            new = _with_calls(old)
            if new is not None:
                function.__code__ = new
                changed.append((function, old))
        yield
    finally:
        for function, old in changed:
            function.__code__ = old
        vars(builtins).update(_AFTERWARDS)


def without_source(pipeline: Any) -> list[str]:
    """Return the names of functions that may read texts unseen, as their source is not at hand."""
    functions = reachable_functions(pipeline)
    return [f.__qualname__ for f in functions if not _with_calls(f.__code__) and _may_read(f)]


def _may_read(function: types.FunctionType) -> bool:
    """Tell whether a function, or one in it, does what only its source lets us see."""
    instructions = [one for code in codes_of(function) for one in dis.get_instructions(code)]
    return (
        any(one.opname in _COMPOSING or one.argrepr == "%" for one in instructions)
        or bool(names_in(function) & {"format", "join", "replace"})
        or any(callable(v) and callee(v) is not v for v in _called(function))
    )


def _called(function: types.FunctionType) -> list[Any]:
    builtin = [getattr(builtins, name, None) for name in names_in(function)]
    return [*values_named_by(function), *builtin]


_COMPOSING = ("FORMAT_VALUE", "FORMAT_SIMPLE", "FORMAT_WITH_SPEC", "BUILD_STRING", "CONTAINS_OP")
