"""Patterns of operators: what matches, what does not, and why, word for word."""

import operator
from typing import Any

import pytest
import torch
from torch import fx

from diffopt.ir import graph as g
from diffopt.ir import qdq
from diffopt.ir.matcher import (
    Match,
    Mismatch,
    Pattern,
    Var,
    any_of,
    condition,
    constant,
    constant_or_none,
    maybe,
    named,
    once,
    through,
)

aten = torch.ops.aten
linear = aten.linear.default
cast = aten._to_copy.default
qd = qdq.qd


class Graph:
    """A graph of calls whose values nobody looks at; names are the operators'."""

    def __init__(self) -> None:
        self.gm = g.new_body("body")
        self.graph = self.gm.graph
        self.x, self.y = self.graph.placeholder("x"), self.graph.placeholder("y")
        self.w, self.v = (g.get_attr(self.gm, name, torch.zeros(())) for name in "wv")

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        name = target.__name__.split(".")[0]
        return self.graph.create_node("call_function", target, args, kwargs, name)


@pytest.fixture
def make() -> Graph:
    return Graph()


def why(pattern: Pattern, node: fx.Node) -> str:
    """Return why a node does not match."""
    mismatch = pattern.match(node)
    assert isinstance(mismatch, Mismatch)
    assert not mismatch
    return str(mismatch)


def values(pattern: Pattern, node: fx.Node) -> dict[str, Any]:
    """Return what the variables of a match are."""
    match = pattern.match(node)
    assert isinstance(match, Match), str(match)
    assert match.node is node
    return match.values


# The example in the module's docstring


@Pattern
def low_rank(x: Var, weight: Var, down: Var, up: Var, scale: Var) -> Var:
    return once(linear(x, constant(weight))) + linear(linear(x, down), up) * scale


def adapter(make: Graph, times: Any = aten.mul.Tensor) -> tuple[fx.Node, ...]:
    base, first = make(linear, make.x, make.w), make(linear, make.x, make.v)
    second = make(linear, first, make.y)
    product = make(times, second, 0.5)
    return base, first, second, product, make(aten.add.Tensor, product, base)


def test_the_example(make):
    base, first, second, product, total = adapter(make)
    match = low_rank.match(total)
    assert isinstance(match, Match)
    assert match.values == {"x": make.x, "weight": make.w, "down": make.v, "up": make.y} | {
        "scale": 0.5
    }
    assert match["up"] is make.y
    assert match.inner == (base, product, second, first)
    assert match.function.__name__ == "low_rank"


def test_the_example_that_is_none(make):
    *_, total = adapter(make, aten.div.Tensor)
    assert why(low_rank, total) == "div is aten.div.Tensor, expected aten.mul.Tensor"


# Operators and their arguments


@Pattern
def scaled_sum(x: Var, y: Var, alpha: Var) -> Var:
    return aten.add.Tensor(x, y, alpha=alpha)


@Pattern
def plain_sum(x: Var, y: Var) -> Var:
    return aten.add.Tensor(x, y)


@Pattern
def convolution(x: Var, weight: Var, stride: Var) -> Var:
    return aten.conv2d.default(x, weight, stride=stride)


def test_arguments_by_position_by_name_and_left_out(make):
    for kwargs, alpha in (({}, 1), ({"alpha": 1}, 1), ({"alpha": 3}, 3)):
        node = make(aten.add.Tensor, make.x, make.y, **kwargs)
        assert values(scaled_sum, node) == {"x": make.x, "y": make.y, "alpha": alpha}
    for node in (
        make(aten.conv2d.default, make.x, make.w, None, [2, 2], [0, 0]),
        make(aten.conv2d.default, make.x, weight=make.w, stride=[2, 2]),
    ):
        assert values(convolution, node) == {"x": make.x, "weight": make.w, "stride": [2, 2]}
    assert values(convolution, make(aten.conv2d.default, make.x, make.w))["stride"] == [1, 1]


def test_what_is_left_out_has_its_default(make):
    assert values(plain_sum, make(aten.add.Tensor, make.x, make.y, alpha=1))
    node = make(aten.add.Tensor, make.x, make.y, alpha=2)
    assert why(plain_sum, node) == "add_1 reads 2, expected 1"
    node = make(aten.conv2d.default, make.x, make.w, make.v)
    assert why(convolution, node) == "conv2d reads v, expected None"


def test_what_is_left_open_may_be_anything(make):
    open_sum = Pattern(lambda x, y: aten.add.Tensor(x, y, ...))
    assert values(open_sum, make(aten.add.Tensor, make.x, make.y, alpha=2))
    node = make(qd.quantize_per_tensor.tensor, make.x, make.w, make.v, -128, 127, torch.int8)
    quantized = Pattern(
        lambda x, scale, high: qd.quantize_per_tensor.tensor(x, scale, ..., quant_max=high)
    )
    assert values(quantized, node) == {"x": make.x, "scale": make.w, "high": 127}


def test_a_pattern_that_no_call_can_match(make):
    node = make(aten.add.Tensor, make.x, make.y)
    too_few = Pattern(lambda x: aten.add.Tensor(x))
    with pytest.raises(TypeError, match=r"aten.add.Tensor is called with \(x,\) and {}"):
        too_few.match(node)
    too_many = Pattern(lambda x, y: aten.relu.default(x, y))
    with pytest.raises(TypeError, match=r"aten.relu.default is called with"):
        too_many.match(make(aten.relu.default, make.x))
    unknown = Pattern(lambda x, y: aten.add.Tensor(x, y, beta=2))
    with pytest.raises(TypeError, match=r"with \(x, y\) and {'beta': 2}"):
        unknown.match(node)


def test_operators_of_python(make):
    arithmetic = Pattern(lambda a, b, c, d: (a - b) / (c + d * a))
    x, y, w, v = make.x, make.y, make.w, make.v
    bottom = make(aten.add.Tensor, w, make(aten.mul.Tensor, v, x))
    node = make(aten.div.Tensor, make(aten.sub.Tensor, x, y), bottom)
    assert values(arithmetic, node) == {"a": x, "b": y, "c": w, "d": v}


def test_other_nodes(make):
    assert why(plain_sum, make.x) == "x is an argument, expected aten.add.Tensor"
    assert why(plain_sum, make.w) == "w is a constant, expected aten.add.Tensor"
    item = make(operator.getitem, make.x, 0)
    assert why(plain_sum, item).startswith("getitem is <built-in function getitem>, expected")
    call = make.graph.create_node("call_module", "body", (make.x,))
    assert why(plain_sum, call) == "body is a component, expected aten.add.Tensor"
    nested = Pattern(lambda x, y, z: linear(aten.add.Tensor(x, y), z))
    assert why(nested, make(linear, make.x, make.w)) == (
        "x is an argument, expected aten.add.Tensor"
    )
    scalars = Pattern(lambda x, y, z: x * (y + z))
    node = make(aten.mul.Tensor, make.x, 2.0)
    assert why(scalars, node) == "mul reads 2.0, expected aten.add.Tensor"


# Variables and literals


def test_a_variable_is_the_same_everywhere(make):
    square = Pattern(lambda x: aten.matmul.default(x, x))
    assert values(square, make(aten.matmul.default, make.x, make.x)) == {"x": make.x}
    assert why(square, make(aten.matmul.default, make.x, make.y)) == "matmul_1 reads y, expected x"


def test_a_variable_that_is_a_literal_is_equal_everywhere(make):
    twice = Pattern(lambda x, n: aten.sub.Tensor(aten.sub.Tensor(x, n), n))
    for first, second, equal in ((2, 2, True), (2, 3, False), (2, make.y, False)):
        node = make(aten.sub.Tensor, make(aten.sub.Tensor, make.x, first), second)
        if equal:
            assert values(twice, node) == {"x": make.x, "n": 2}
        else:
            assert why(twice, node) == f"{node.name} reads {second}, expected 2"


def test_literals(make):
    to_half = Pattern(lambda x: cast(x, dtype=torch.float16))
    assert values(to_half, make(cast, make.x, dtype=torch.float16)) == {"x": make.x}
    node = make(cast, make.x, dtype=torch.float32)
    assert why(to_half, node) == "_to_copy_1 reads torch.float32, expected torch.float16"
    shape = Pattern(lambda x: aten.view.default(x, [2, -1]))
    assert values(shape, make(aten.view.default, make.x, [2, -1]))
    assert why(shape, make(aten.view.default, make.x, [2, 3])) == "view_1 reads 3, expected -1"
    node = make(aten.view.default, make.x, [2])
    assert why(shape, node) == "view_2 reads 1 values, expected 2"


def test_nodes_in_lists(make):
    pair = Pattern(lambda x, y, n: aten.cat.default([x, aten.relu.default(y)], n))
    relu = make(aten.relu.default, make.y)
    node = make(aten.cat.default, [make.x, relu], -1)
    assert values(pair, node) == {"x": make.x, "y": make.y, "n": -1}
    node = make(aten.cat.default, [relu, make.x])
    assert why(pair, node) == "x is an argument, expected aten.relu"


def test_items(make):
    first = Pattern(lambda x, n: aten.split.Tensor(x, n)[0])
    halves = make(aten.split.Tensor, make.x, 4)
    assert values(first, make(operator.getitem, halves, 0)) == {"x": make.x, "n": 4}
    node = make(operator.getitem, halves, 1)
    assert why(first, node) == "getitem_1 reads 1, expected 0"


def test_a_part_that_is_shared_is_one_node(make):
    def shared(x: Var, y: Var) -> Var:
        total = x + y
        return total / aten.exp.default(total)

    one = make(aten.add.Tensor, make.x, make.y)
    same = make(aten.add.Tensor, make.x, make.y)
    node = make(aten.div.Tensor, one, make(aten.exp.default, one))
    match = Pattern(shared).match(node)
    assert isinstance(match, Match)
    assert match.inner == (one, node.args[1])
    other = make(aten.div.Tensor, one, make(aten.exp.default, same))
    assert why(Pattern(shared), other) == "exp_1 reads add_1, expected add"


# Both orders


def test_both_orders_of_a_sum_and_a_product(make):
    pattern = Pattern(lambda x, y, z: x + linear(y, z) * 2)
    product = make(linear, make.x, make.w)
    for inner in ((product, 2), (2, product)):
        scaled = make(aten.mul.Tensor, *inner)
        for outer in ((make.y, scaled), (scaled, make.y)):
            node = make(aten.add.Tensor, *outer)
            assert values(pattern, node) == {"x": make.y, "y": make.x, "z": make.w}


def test_the_first_order_is_tried_first(make):
    assert values(plain_sum, make(aten.add.Tensor, make.x, make.y)) == {"x": make.x, "y": make.y}


def test_an_order_that_a_later_part_rules_out(make):
    """The product's order is settled by what is behind it."""
    pattern = Pattern(lambda x, y: (x * y) - x)
    product = make(aten.mul.Tensor, make.x, make.y)
    assert values(pattern, make(aten.sub.Tensor, product, make.x))["y"] is make.y
    assert values(pattern, make(aten.sub.Tensor, product, make.y))["y"] is make.x
    node = make(aten.sub.Tensor, product, make.w)
    assert why(pattern, node) == "sub_2 reads w, expected x"


def test_one_order_alone(make):
    difference = Pattern(lambda x, y: linear(x, y) - y)
    node = make(aten.sub.Tensor, make.w, make(linear, make.x, make.w))
    assert why(difference, node) == "w is a constant, expected aten.linear"
    scaled = make(aten.add.Tensor, make.w, make(linear, make.x, make.w), alpha=2)
    pattern = Pattern(lambda x, y, n: aten.add.Tensor(linear(x, y), y, alpha=n))
    # 2 * a + b is not a + 2 * b, so there is one order here too.
    assert why(pattern, scaled) == "w is a constant, expected aten.linear"


# Steps


def test_any_of(make):
    activation = Pattern(lambda x, y: any_of(aten.silu.default, aten.relu.default)(x + y))
    total = make(aten.add.Tensor, make.x, make.y)
    for target in (aten.silu.default, aten.relu.default):
        match = activation.match(make(target, total))
        assert isinstance(match, Match)
        assert match.node.target is target
    expected = "exp is aten.exp, expected aten.silu or aten.relu"
    assert why(activation, make(aten.exp.default, total)) == expected
    inner = Pattern(lambda x: any_of(aten.silu.default, aten.relu.default)(x) / 2)
    assert why(inner, make(aten.div.Tensor, make(aten.exp.default, make.x), 2)) == (
        "exp_1 is aten.exp, expected aten.silu or aten.relu"
    )


def test_any_of_operators_some_of_which_commute(make):
    pattern = Pattern(lambda x, w: any_of(aten.add.Tensor, aten.sub.Tensor)(x, constant(w)))
    for target in (aten.add.Tensor, aten.sub.Tensor):
        assert values(pattern, make(target, make.x, make.w)) == {"x": make.x, "w": make.w}
    assert values(pattern, make(aten.add.Tensor, make.w, make.x)) == {"x": make.x, "w": make.w}
    assert why(pattern, make(aten.sub.Tensor, make.w, make.x)) == "x is not stored"


def test_maybe(make):
    pattern = Pattern(lambda x, y: linear(maybe(cast)(x, dtype=torch.float32), y))
    narrow = make(cast, make.x, dtype=torch.float16)
    wide = make(cast, make.x, dtype=torch.float32)
    assert values(pattern, make(linear, make.x, make.w))["x"] is make.x
    assert values(pattern, make(linear, wide, make.w))["x"] is make.x
    assert values(pattern, make(linear, narrow, make.w))["x"] is narrow


def test_maybe_at_the_end(make):
    pattern = Pattern(lambda x, y: maybe(cast)(x + y, ...))
    total = make(aten.add.Tensor, make.x, make.y)
    assert values(pattern, total) == {"x": make.x, "y": make.y}
    node = make(cast, total, dtype=torch.float16)
    match = pattern.match(node)
    assert isinstance(match, Match)
    assert match.inner == (total,)
    assert why(pattern, make(cast, make.x)) == "x is an argument, expected aten.add.Tensor"
    assert why(pattern, make.x) == "x is an argument, expected aten._to_copy or aten.add.Tensor"


def test_conditions(make):
    even = condition(lambda v: isinstance(v, int) and v % 2 == 0, "is no even number")
    pattern = Pattern(lambda x, n: aten.sub.Tensor(constant(x), even(n)))
    assert values(pattern, make(aten.sub.Tensor, make.w, 4)) == {"x": make.w, "n": 4}
    assert why(pattern, make(aten.sub.Tensor, make.x, 4)) == "x is not stored"
    assert why(pattern, make(aten.sub.Tensor, 1, 4)) == "sub_2 reads 1, which is not stored"
    assert (
        why(pattern, make(aten.sub.Tensor, make.w, 3)) == "sub_3 reads 3, which is no even number"
    )
    assert why(pattern, make(aten.sub.Tensor, make.w, make.v)) == "v is no even number"


def test_constants_that_may_be_missing(make):
    must = Pattern(lambda x, w, b: linear(x, w, constant(b)))
    may = Pattern(lambda x, w, b: linear(x, w, constant_or_none(b)))
    assert values(may, make(linear, make.x, make.w))["b"] is None
    assert values(may, make(linear, make.x, make.w, make.v))["b"] is make.v
    assert why(may, make(linear, make.x, make.w, make.y)) == "y is not stored"
    assert why(must, make(linear, make.x, make.w)) == "linear_3 reads None, which is not stored"


def test_through(make):
    def before_casts(node: fx.Node) -> fx.Node | None:
        while node.target is cast:
            node = node.all_input_nodes[0]
        return None if node is make.y else node

    behind = through(before_casts, "comes from y")
    pattern = Pattern(lambda x, y: linear(named("read")(behind(x)), behind(x)) + y)
    twice = make(cast, make(cast, make.x, dtype=torch.float16), dtype=torch.float32)
    node = make(aten.add.Tensor, make(linear, twice, make.x), 1.0)
    assert values(pattern, node) == {"read": twice, "x": make.x, "y": 1.0}
    node = make(aten.add.Tensor, make(linear, make(cast, make.y), make.x), make.x)
    assert why(pattern, node) == "_to_copy_2 comes from y"
    node = make(aten.add.Tensor, make(linear, make.x, make.w), make.x)
    assert why(pattern, node) == "linear_2 reads w, expected x"
    node = make(aten.add.Tensor, make(linear, 3.0, make.w), make.x)
    assert why(pattern, node) == "linear_3 reads 3.0, which comes from y"


def test_once(make):
    pattern = Pattern(lambda x, w, y: once(linear(x, w)) + y)
    product = make(linear, make.x, make.w)
    node = make(aten.add.Tensor, product, make.y)
    assert values(pattern, node)
    make(aten.relu.default, product)
    assert why(pattern, node) == "linear is also read by relu"


def test_once_allows_several_readers_in_the_match(make):
    def gated(x: Var, w: Var) -> Var:
        product = once(linear(x, w))
        return product * aten.sigmoid.default(product)

    product = make(linear, make.x, make.w)
    node = make(aten.mul.Tensor, product, make(aten.sigmoid.default, product))
    assert values(Pattern(gated), node) == {"x": make.x, "w": make.w}
    make.graph.output((node, product))
    assert why(Pattern(gated), node) == "linear is also read by output"


def test_once_is_only_about_what_it_marks(make):
    pattern = Pattern(lambda x, w, y: linear(x, w) + once(y))
    product = make(linear, make.x, make.w)
    make(aten.relu.default, product)
    assert values(pattern, make(aten.add.Tensor, product, make.y))
    assert why(pattern, make(aten.add.Tensor, product, 2)) == "add_1 reads 2, which is a literal"


def test_named(make):
    pattern = Pattern(lambda x, w: named("total")(named("product")(linear(x, w)) + 1))
    product = make(linear, make.x, make.w)
    node = make(aten.add.Tensor, product, 1)
    expected = {"total": node, "product": product, "x": make.x, "w": make.w}
    assert values(pattern, node) == expected


# Several functions


def quotient(x: Var, y: Var) -> Var:
    return x / y


def difference_of_linears(x: Var, w: Var, y: Var) -> Var:
    return linear(x, w) - y


def difference(x: Var, y: Var) -> Var:
    return x - y


def test_the_first_of_several_functions(make):
    pattern = Pattern(quotient, difference_of_linears, difference)
    product = make(linear, make.x, make.w)
    for target, first, function in (
        (aten.div.Tensor, make.x, quotient),
        (aten.sub.Tensor, product, difference_of_linears),
        (aten.sub.Tensor, make.x, difference),
    ):
        match = pattern.match(make(target, first, make.y))
        assert isinstance(match, Match)
        assert match.function is function
    expected = "linear is aten.linear, expected aten.div.Tensor or aten.sub.Tensor"
    assert why(pattern, product) == expected


def test_the_reason_is_of_the_function_that_goes_furthest(make):
    deep = Pattern(lambda x: aten.exp.default(aten.relu.default(aten.silu.default(x))))
    both = Pattern(lambda x: aten.exp.default(aten.silu.default(x)), lambda x: deep_exp(x))
    node = make(aten.exp.default, make(aten.relu.default, make(aten.abs.default, make.x)))
    assert why(deep, node) == "abs_1 is aten.abs, expected aten.silu"
    assert why(both, node) == "abs_1 is aten.abs, expected aten.silu"


def deep_exp(x: Var) -> Var:
    return aten.exp.default(aten.relu.default(aten.silu.default(x)))


def test_a_function_in_another_one(make):
    pattern = Pattern(lambda x, y, w: quotient(difference_of_linears(x, w, y), y))
    inner = make(aten.sub.Tensor, make(linear, make.x, make.w), make.y)
    node = make(aten.div.Tensor, inner, make.y)
    assert values(pattern, node) == {"x": make.x, "w": make.w, "y": make.y}


def test_all_matches_of_a_graph(make):
    one = make(aten.add.Tensor, make.x, make.y)
    make(aten.mul.Tensor, one, 2)
    other = make(aten.add.Tensor, one, 1)
    make(aten.add.Tensor, one, 1, alpha=2)
    assert [match.node for match in plain_sum.find(make.gm)] == [one, other]
