"""Operators that are inserted by writing them as Python."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from diffopt.ir import graph as g
from diffopt.ir.insert import cast, insert, replace_calls
from diffopt.ir.matcher import Match, Pattern, Var
from diffopt.ir.printing import format_graph

aten = torch.ops.aten
X, SCALE = torch.arange(8.0).reshape(2, 4), torch.tensor(0.5)


@dataclass(frozen=True, eq=False)
class Scaled:
    values: fx.Node
    scale: fx.Node


@pytest.fixture
def gm() -> fx.GraphModule:
    """Return a body of two arguments that returns their sum."""
    gm = g.new_body("body")
    x, scale = (gm.graph.placeholder(name) for name in ("x", "scale"))
    x.meta["val"], scale.meta["val"] = g.fake(X), g.fake(SCALE)
    end = g.call(gm.graph, aten.add.Tensor, x, scale)
    end.meta |= {"module": "net.0", "where": "net.py:1"}
    gm.graph.output((end,))
    g.set_outputs(gm, [end])
    return gm


def result(gm: fx.GraphModule) -> Tensor:
    gm.graph.lint()
    gm.recompile()
    (value,) = gm(X, SCALE)
    assert g.outputs(gm)[0].meta["val"].dtype == value.dtype
    return value


def rounded(x: Var, scale: Var) -> Var:
    return cast(aten.round.default(x / scale - 1), torch.int8)


def test_what_a_function_computes_is_inserted_where_the_graph_says(gm: fx.GraphModule) -> None:
    x, scale = g.placeholders(gm)
    (end,) = g.outputs(gm)
    with gm.graph.inserting_before(end):
        q = insert(gm.graph, rounded, x, scale, like=end)
    assert [str(n.target) for n in gm.graph.nodes if n.op == "call_function"] == [
        "aten.div.Tensor",
        "aten.sub.Tensor",
        "aten.round.default",
        "aten._to_copy.default",
        "aten.add.Tensor",
    ]
    assert (q.meta["module"], q.meta["where"]) == ("net.0", "net.py:1")
    g.set_outputs(gm, [q])
    assert torch.equal(result(gm), (X / SCALE - 1).round().to(torch.int8))


def test_a_pattern_reads_what_the_same_function_wrote(gm: fx.GraphModule) -> None:
    def scaled(x: Var, scale: Var) -> Var:
        return aten.relu.default(x * scale) + x

    x, scale = g.placeholders(gm)
    with gm.graph.inserting_before(g.output_node(gm)):
        node = insert(gm.graph, scaled, x, scale)
    match = Pattern(scaled).match(node)
    assert isinstance(match, Match)
    assert match.values == {"x": x, "scale": scale}


def test_nodes_in_dataclasses_and_lists_are_variables(gm: fx.GraphModule) -> None:
    def both(each: Scaled, others: list[Var], bias: Var | None) -> tuple[Var, Var | None]:
        terms = [value if bias is None else value * bias for value in others]
        return aten.cat.default([each.values * each.scale, *terms]), bias

    x, scale = g.placeholders(gm)
    with gm.graph.inserting_before(g.output_node(gm)):
        node, bias = insert(gm.graph, both, Scaled(x, scale), [x, x], None)
    assert bias is None
    g.set_outputs(gm, [node])
    assert torch.equal(result(gm), torch.cat([X * SCALE, X, X]))


def test_calls_are_replaced(gm: fx.GraphModule) -> None:
    def with_arguments(node: Var) -> Var:
        one, other = node.args
        return one - other * len(node.shape)

    replace_calls(gm, {aten.add.Tensor: with_arguments})
    assert "aten.add" not in format_graph(gm)
    assert torch.equal(result(gm), X - SCALE * 2)


@pytest.mark.parametrize("function", [lambda x: x.abs(), torch.abs, lambda x: abs(x)])
def test_what_is_no_operator_is_refused(gm: fx.GraphModule, function: Any) -> None:
    with pytest.raises(TypeError, match=r"abs of a tensor is no operator: write aten\.abs"):
        insert(gm.graph, function, g.placeholders(gm)[0])
