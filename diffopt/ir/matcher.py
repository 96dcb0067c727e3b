"""Patterns of operators, written as the Python that they match.

A pattern is a function of variables, which torch.fx traces once:

    @Pattern
    def low_rank(x: Var, weight: Var, down: Var, up: Var, scale: Var) -> Var:
        return once(linear(x, constant(weight))) + linear(linear(x, down), up) * scale

`low_rank.match(node)` compares it with what a node is computed from. In this graph

    %linear: float32[4,8] = aten.linear(%x, %w)
    %linear_1: float32[4,2] = aten.linear(%x, %a)
    %linear_2: float32[4,8] = aten.linear(%linear_1, %b)
    %mul: float32[4,8] = aten.mul.Tensor(%linear_2, 0.5)
    %add: float32[4,8] = aten.add.Tensor(%mul, %linear)

%add is a `Match` with `match["up"]` %b, `match["scale"]` 0.5 and four inner nodes. With a division
in the place of the product it is a `Mismatch`: "div is aten.div.Tensor, expected aten.mul.Tensor".

- A variable stands for a node or a literal, and for the same one wherever it is written.
- A literal equals the argument. An argument that is left out has its default value, however the
  call is written; with `...` behind those by position, all that are left out may be anything.
- `+`, `-`, `*` and `/` are `aten.add.Tensor` and so on; sums and products match in both orders.
  `&`, `<<` and `>>` have a number.
- `any_of(a, b)(x)` is a call of either operator, `maybe(a)(x)` is one or x itself.
- `constant(x)` is stored; `condition` tests a value, `through` looks at what is behind it.
- `once(x)` is read by nothing but the match; `named("y")(x)` makes a variable of an inner value.
- A function that a pattern calls is a part of it; `Pattern(f, g)` matches what either does.

torch has two matchers. `SubgraphMatcher` of torch.fx has no alternatives, optional steps, operands
in both orders or reasons; Inductor's is written in classes, one for each node, and takes seconds to
import. The design is that of onnxscript's rewriter.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import fx

from diffopt.ir.nodes import args

aten = torch.ops.aten

Var = Any
"""What a pattern's function has as parameters and result: torch.fx calls it with proxies."""

PYTHON_OPERATORS: dict[Any, Any] = {
    operator.add: aten.add.Tensor,
    operator.sub: aten.sub.Tensor,
    operator.mul: aten.mul.Tensor,
    operator.truediv: aten.div.Tensor,
    operator.and_: aten.bitwise_and.Scalar,
    operator.lshift: aten.bitwise_left_shift.Tensor_Scalar,
    operator.rshift: aten.bitwise_right_shift.Tensor_Scalar,
}
_COMMUTATIVE = {aten.add.Tensor, aten.mul.Tensor}
_KINDS = {"placeholder": "an argument", "get_attr": "a constant", "call_module": "a component"}


@dataclass(frozen=True)
class Match:
    """A place in a graph that is as a pattern says.

    Attributes:
        function: The function of the pattern that matches.
        node: What it returns.
        inner: The nodes of its other operators, in the order of a walk up from `node`.
        values: What each variable stands for.
    """

    function: Callable[..., Var]
    node: fx.Node
    inner: tuple[fx.Node, ...]
    values: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]


@dataclass(slots=True)
class Mismatch:
    """Where a graph is not as a pattern says, and why. It counts as False.

    If a pattern can match in several ways, it is about the one that goes furthest.
    """

    where: fx.Node
    text: str
    parts: tuple[Any, ...]

    def __bool__(self) -> Literal[False]:
        return False

    def __str__(self) -> str:
        kind = _KINDS.get(self.where.op) or _shown(self.where.target)
        text = self.text.format(*map(_shown, self.parts), kind=kind)
        return f"{self.where.name} {text}"


def _shown(part: Any) -> str:
    if isinstance(part, tuple):
        return " or ".join(map(_shown, part))
    return str(part).removesuffix(".default")


# Steps


@dataclass(frozen=True, eq=False)
class _Step:
    """What a pattern calls.

    Attributes:
        targets: Operators, of which a value is a call; none if it need not be one.
        optional: Whether it may be the first argument instead.
        behind: Returns what to compare with the first argument; `...` says that it is no match.
        reason: What a value is then, as "is not stored".
        name: Of the variable that the value is.
    """

    targets: tuple[Any, ...] = ()
    optional: bool = False
    behind: Callable[[Any], Any] = lambda value: value
    reason: str = ""
    name: str = ""

    __name__ = "step"

    def __call__(self, value: Var, *args: Any, **kwargs: Any) -> Var:
        return value.tracer.create_proxy("call_function", self, (value, *args), kwargs)


def any_of(*targets: Any) -> _Step:
    """Return a call of one of several operators."""
    return _Step(targets)


def maybe(*targets: Any) -> _Step:
    """Return a call of one of several operators, or its first argument."""
    return _Step(targets, optional=True)


def condition(holds: Callable[[Any], bool], reason: str) -> _Step:
    """Return a test of a value; `reason` is what it is if that fails, as "is not stored"."""
    return _Step(behind=lambda value: value if holds(value) else ..., reason=reason)


def through(behind: Callable[[fx.Node], fx.Node | None], reason: str) -> _Step:
    """Return a look at what is behind a node; `reason` is what the node is if that is None."""

    def look(value: Any) -> Any:
        node = behind(value) if isinstance(value, fx.Node) else None
        return ... if node is None else node

    return _Step(behind=look, reason=reason)


def named(name: str) -> _Step:
    """Return what makes a variable of an inner value."""
    return _Step(name=name)


def is_stored(value: Any) -> bool:
    """Tell whether a value is a node of a stored tensor."""
    return isinstance(value, fx.Node) and value.op == "get_attr"


constant = condition(is_stored, "is not stored")
constant_or_none = condition(lambda v: v is None or is_stored(v), "is not stored")
once = condition(lambda v: isinstance(v, fx.Node), "is a literal")


# Patterns


class Pattern:
    """What one of several functions of operators and variables returns, the first that matches."""

    def __init__(self, *functions: Callable[..., Var]) -> None:
        self._by_target: dict[Any, list[tuple[Callable[..., Var], fx.Node]]] = {}
        self._names: dict[fx.Node, str] = {}
        for function in functions:
            graph = fx.Tracer().trace(function)
            for node in graph.nodes:
                if node.op == "call_function" and not isinstance(node.target, _Step):
                    node.target = _Step((PYTHON_OPERATORS.get(node.target, node.target),))
                if name := getattr(node.target, "name", node.target):
                    self._names[node] = name
            (root,) = graph.output_node().all_input_nodes
            for target in _targets(root):
                self._by_target.setdefault(target, []).append((function, root))

    def match(self, node: fx.Node) -> Match | Mismatch:
        """Return the first match that ends in a node, or why there is none."""
        if node.target not in self._by_target:
            return Mismatch(node, "is {kind}, expected {}", (tuple(self._by_target),))
        furthest = _Search([])
        for function, root in self._by_target[node.target]:
            choices: list[bool] | None = []
            while choices is not None:
                search = _Search(choices)
                if search.is_match(root, node, node) and search.is_closed():
                    names = self._names
                    values = {names[p]: v for p, v in search.values.items() if p in names}
                    return Match(function, node, tuple(search.nodes[1:]), values)
                if len(search.values) > len(furthest.values):
                    furthest = search
                choices = search.next_choices()
        return furthest.mismatch

    def find(self, gm: fx.GraphModule) -> Iterator[Match]:
        """Yield the matches in a graph, in the order of the nodes that they end in."""
        for node in gm.graph.nodes:
            if node.target in self._by_target and (match := self.match(node)):
                yield match


def _targets(p: fx.Node) -> tuple[Any, ...]:
    """Return the operators that what a node of a pattern stands for can be a call of."""
    step: _Step = p.target  # type: ignore[assignment]
    is_call = step.targets and not step.optional
    return step.targets if is_call else step.targets + _targets(p.all_input_nodes[0])


class _Search:
    """One way to match a pattern.

    Attributes:
        choices: What to choose where a value may match in two ways, then False.
        values: What the nodes of the pattern stand for.
        nodes: Those of its operators.
        mismatch: Why it is no match.
    """

    __slots__ = ("_chosen", "choices", "mismatch", "nodes", "values")

    def __init__(self, choices: list[bool]) -> None:
        self.choices = choices
        self._chosen = 0
        self.values: dict[fx.Node, Any] = {}
        self.nodes: list[fx.Node] = []
        self.mismatch: Mismatch

    def is_match(self, p: Any, value: Any, reader: fx.Node) -> bool:
        """Tell whether a value, which is an argument of `reader`, is as the pattern `p` says."""
        if isinstance(p, (list, tuple)) and isinstance(value, (list, tuple)):
            if len(p) != len(value):
                return self._fail(reader, "reads {} values, expected {}", len(value), len(p))
            return all(self.is_match(*pair, reader) for pair in zip(p, value, strict=True))
        if not isinstance(p, fx.Node) or p in self.values:
            known = self.values[p] if isinstance(p, fx.Node) else p
            if known is value or (known == value and not isinstance(value, fx.Node)):
                return True
            return self._fail(reader, "reads {}, expected {}", value, known)
        self.values[p] = value
        if p.op == "placeholder":
            return True
        step: Any = p.target
        if isinstance(value, fx.Node) and value.target in step.targets:
            if not (step.optional and self._choose()):
                return self._is_call(p, value)
        elif step.targets and not step.optional:
            return self._refuse(step, value, reader)
        behind = step.behind(value)
        if behind is ...:
            return self._refuse(step, value, reader)
        return self.is_match(p.args[0], behind, reader)

    def _is_call(self, p: fx.Node, node: fx.Node) -> bool:
        self.nodes.append(node)
        expected, swapped = _expected(p, node.target)
        if swapped and self._choose():
            expected = swapped
        arguments, count = args(node), len(node.args)
        for inner, position, name, default in expected:
            value = arguments[position] if position < count else node.kwargs.get(name, default)
            if value is not inner and not self.is_match(inner, value, node):
                return False
        return True

    def is_closed(self) -> bool:
        """Tell whether nothing else reads what is marked with `once`."""
        for value in (v for p, v in self.values.items() if p.target is once):
            for user in (u for u in value.users if u not in self.nodes):
                return self._fail(value, "is also read by {}", user)
        return True

    def _choose(self) -> bool:
        self._chosen += 1
        if self._chosen > len(self.choices):
            self.choices.append(False)
        return self.choices[self._chosen - 1]

    def next_choices(self) -> list[bool] | None:
        """Return what to choose if these choices lead to no match; None: nothing is left."""
        while self.choices and self.choices[-1]:
            self.choices.pop()
        return [*self.choices[:-1], True] if self.choices else None

    def _refuse(self, step: _Step, value: Any, reader: fx.Node) -> bool:
        if isinstance(value, fx.Node):
            return self._fail(value, step.reason or "is {kind}, expected {}", step.targets)
        text = f"which {step.reason}" if step.reason else "expected {1}"
        return self._fail(reader, "reads {0}, " + text, value, step.targets)

    def _fail(self, where: fx.Node, text: str, *parts: Any) -> bool:
        self.mismatch = Mismatch(where, text, parts)
        return False


_Arguments = list[tuple[Any, int, str, Any]]
"""What each argument has to be, its position, name and default."""


@cache
def _expected(p: fx.Node, target: Any) -> tuple[_Arguments, _Arguments]:
    """Return a call's arguments as a pattern writes them, and with two swapped if that can be."""
    if isinstance(target, torch._ops.OpOverload):
        parameters = target._schema.arguments
        defaults = {a.name: a.default_value if a.has_default_value() else ... for a in parameters}
    else:  # operator.getitem
        defaults = dict.fromkeys(inspect.signature(target).parameters, ...)
    by_position = [value for value in args(p) if value is not ...]
    written = {**dict(zip(defaults, by_position, strict=False)), **p.kwargs}
    is_open = len(by_position) < len(p.args)
    expected = written if is_open else {**defaults, **written}
    is_too_long = len(by_position) > len(defaults)
    if ... in expected.values() or written.keys() - defaults.keys() or is_too_long:
        raise TypeError(f"{target} is called with {p.args} and {p.kwargs}")
    positions = list(defaults)
    rows = [(e, positions.index(name), name, defaults[name]) for name, e in expected.items()]
    if target not in _COMMUTATIVE or is_open or len(written) != 2:
        return rows, []
    (first, *one), (second, *other), *more = rows
    return rows, [(first, *other), (second, *one), *more]
