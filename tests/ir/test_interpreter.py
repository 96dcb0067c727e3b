"""The interpreter: whole graphs, parts of them, hooks, and what is freed when."""

import weakref
from typing import Any

import pytest
import torch
from torch import fx

from diffopt.ir import graph as g
from diffopt.ir.interpreter import Interpreter
from tests.passes.build import body, parameter

aten = torch.ops.aten
X, Y = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])


def three() -> tuple[fx.GraphModule, list[fx.Node]]:
    """Return a body that returns 2 x + y and exp(y), and its three operators."""

    def make(b: Any, x: fx.Node, y: fx.Node) -> list[fx.Node]:
        return [b(aten.add.Tensor, b(aten.mul.Tensor, x, 2.0), y), b(aten.exp.default, y)]

    gm = body(make, X, Y)
    return gm, [n for n in gm.graph.nodes if n.op == "call_function"]


def test_results_are_those_of_the_compiled_graph() -> None:
    gm, _ = three()
    run = Interpreter(gm)
    for arguments in ((X, Y), (Y, X)):
        assert all(map(torch.equal, run.run(*arguments), gm(*arguments)))
    assert run.env == {}
    with pytest.raises(ValueError, match="shorter"):
        run.run(X)


def test_only_what_is_needed_is_computed() -> None:
    gm, (mul, add, exp) = three()
    computed: list[fx.Node] = []

    def hook(run: Interpreter, node: fx.Node) -> Any:
        computed.append(node)
        return run.run_node(node)

    values = Interpreter(gm, [exp]).values([X, Y], hook=hook)
    assert list(values) == computed == [exp]
    computed.clear()
    values = Interpreter(gm, [add], [mul]).values(
        known={mul: X, g.placeholders(gm)[1]: Y}, hook=hook
    )
    assert computed == [add]
    assert torch.equal(values[add], X + Y)
    computed.clear()
    assert Interpreter(gm, (), also=[exp]).values([X, Y], hook=hook) == {}
    assert computed == [exp]


def test_a_known_value_takes_the_place_of_an_argument() -> None:
    gm, (mul, *_) = three()
    x = g.placeholders(gm)[0]
    values = Interpreter(gm, [mul], [x]).values([X, Y], {x: Y})
    assert torch.equal(values[mul], 2 * Y)


def test_a_hook_computes_in_place_of_an_operator() -> None:
    gm, (mul, *_) = three()

    def hook(run: Interpreter, node: fx.Node) -> Any:
        if node is not mul:
            return run.run_node(node)
        (x, factor), _ = run.arguments(node)
        return x * factor * 10

    assert torch.equal(Interpreter(gm).run(X, Y, hook=hook)[0], 20 * X + Y)


def test_values_are_freed_after_their_last_use() -> None:
    gm, (_, add, exp) = three()
    alive: list[weakref.ref[torch.Tensor]] = []
    counts: list[int] = []

    def hook(run: Interpreter, node: fx.Node) -> Any:
        value = run.run_node(node)
        counts.append(sum(tensor() is not None for tensor in alive))
        alive.append(weakref.ref(value))
        return value

    Interpreter(gm, [exp], also=[add]).values([X, Y], hook=hook)
    assert counts == [0, 1, 0]  # 2 x when 2 x + y is computed, nothing behind it


def test_components_are_interpreted_as_they_are_now() -> None:
    inner = body(lambda b, x: b(aten.mul.Tensor, x, b.weight(parameter(2))), X, name="inner")
    root = body(lambda b, x: b.call("inner", x), X, name="root", inner=inner)
    first, compiled = Interpreter(root).run(X)[0], root(X)[0]
    (mul,) = inner.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    mul.target = aten.add.Tensor  # not compiled again
    assert torch.equal(first, compiled)
    assert torch.equal(root(X)[0], compiled)
    weight = g.named_tensors(inner)
    assert torch.equal(Interpreter(root).run(X)[0], X + next(weight)[1])
