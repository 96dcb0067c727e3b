"""What an operator computes from shards of its operands is the shard of what it computes of all."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from diffopt.analysis.sharding import Shard, shard_call
from diffopt.ir import graph as g
from diffopt.ir.printing import format_graph, format_type
from diffopt.transforms.batch_slice import error, shard_body
from tests.passes.build import Builder, aten, body, randn

SECOND = Shard(1, 2)
Make = Callable[..., Any]


def check(make: Make, *samples: Tensor, axis: int = 0, shard: Shard = SECOND) -> fx.GraphModule:
    """Return the body that computes a part alone, from a part of the first argument."""
    whole = body(make, *samples)
    sharded = shard_body(whole, {0: axis}, shard)
    assert error(whole, sharded, {0: axis}, shard) < 0.1
    assert not sharded.blocked
    (first, *_) = sharded.parameters
    assert first[0] == 0
    assert first[1] is not None
    for node in sharded.body.graph.nodes:
        if node.op == "call_function":
            assert format_type(g.infer_value(node)) == format_type(node.meta["val"])
    return sharded.body


X = randn(4, 6, 8)
IMAGE = randn(2, 4, 8, 8)
HEADS = randn(2, 3, 5, 4)
EVERY: dict[str, tuple[Make, tuple[Tensor, ...], int]] = {
    "pointwise": (lambda b, x, y: b(aten.add.Tensor, x, y), (X, randn(4, 1, 8)), 0),
    "broadcast": (lambda b, x, y: b(aten.mul.Tensor, x, y), (X, randn(6, 8)), 1),
    "whole": (lambda b, x, y: b(aten.mul.Tensor, x, y), (X, randn(8)), 0),
    "cast": (lambda b, x: b(aten._to_copy.default, x, dtype=torch.float64), (X,), 0),
    "merge": (lambda b, x: b(aten.view.default, x, [24, -1]), (X,), 0),
    "split off": (lambda b, x: b(aten.view.default, x, [2, 2, 6, 8]), (X,), 0),
    "merge inner": (lambda b, x: b(aten.view.default, x, [4, -1]), (X,), 1),
    "squeeze": (lambda b, x: b(aten.squeeze.default, x), (randn(2, 1, 3),), 0),
    "unsqueeze": (lambda b, x: b(aten.unsqueeze.default, x, 0), (X,), 1),
    "flatten": (lambda b, x: b(aten.flatten.using_ints, x, 0, 1), (X,), 0),
    "permute": (lambda b, x: b(aten.permute.default, x, [2, 0, 1]), (X,), 1),
    "transpose": (lambda b, x: b(aten.transpose.int, x, 0, 2), (X,), 2),
    "t": (lambda b, x: b(aten.t.default, x), (randn(4, 3),), 1),
    "expand": (lambda b, x: b(aten.expand.default, x, [2, -1, 6, -1]), (randn(4, 1, 8),), 1),
    "repeat": (lambda b, x: b(aten.repeat.default, x, [1, 2, 1]), (X,), 0),
    "slice": (lambda b, x: b(aten.slice.Tensor, x, 1, 1, 5), (X,), 0),
    "all of it": (lambda b, x: b(aten.slice.Tensor, x, 0, 0, 2**62), (X,), 0),
    "select": (lambda b, x: b(aten.select.int, x, 0, 1), (X,), 0),
    "split": (lambda b, x: b(operator.getitem, b(aten.split.Tensor, x, 3, 1), 1), (X,), 0),
    "chunk": (lambda b, x: b(operator.getitem, b(aten.chunk.default, x, 2, -1), 0), (X,), 0),
    "unbind": (lambda b, x: b(operator.getitem, b(aten.unbind.int, x, 1), 5), (X,), 1),
    "cat": (lambda b, x, y: b(aten.cat.default, [x, y], 1), (X, randn(4, 2, 8)), 0),
    "stack": (lambda b, x, y: b(aten.stack.default, [x, y], 1), (X, X), 2),
    "linear": (lambda b, x: b(aten.linear.default, x, randn(5, 8)), (X,), 1),
    "norm": (lambda b, x: b(aten.layer_norm.default, x, [8]), (X,), 1),
    "group norm": (lambda b, x: b(aten.group_norm.default, x, 2), (IMAGE,), 0),
    "conv": (lambda b, x: b(aten.conv2d.default, x, randn(3, 4, 3, 3)), (IMAGE,), 0),
    "shuffle": (lambda b, x: b(aten.pixel_shuffle.default, x, 2), (IMAGE,), 0),
    "upsample": (
        lambda b, x: b(aten.upsample_nearest2d.vec, x, None, [2.0, 2.0]),
        (IMAGE,),
        0,
    ),
    "matmul": (lambda b, x, y: b(aten.matmul.default, x, y), (X, randn(4, 8, 3)), 0),
    "rows": (lambda b, x, y: b(aten.matmul.default, x, y), (X, randn(4, 8, 3)), 1),
    "bmm": (lambda b, x, y: b(aten.bmm.default, x, y), (X, randn(4, 8, 3)), 0),
    "mm": (lambda b, x, y: b(aten.mm.default, x, y), (randn(4, 8), randn(8, 3)), 0),
    "addmm": (
        lambda b, x, y, z: b(aten.addmm.default, x, y, z),
        (randn(4, 3), randn(4, 8), randn(8, 3)),
        0,
    ),
    "einsum": (lambda b, x, y: b(aten.einsum.default, "bij,bkj->kib", [x, y]), (X, X), 2),
    "attention": (
        lambda b, q, k, m: b(aten.scaled_dot_product_attention.default, q, k, k, m),
        (HEADS, randn(2, 3, 7, 4), randn(2, 1, 1, 7)),
        0,
    ),
    "softmax": (lambda b, x: b(aten.softmax.int, x, -1), (X,), 0),
    "mean": (lambda b, x: b(aten.mean.dim, x, [1]), (X,), 1),
    "variance": (lambda b, x: b(aten.var.correction, x, [0, -1], keepdim=True), (X,), 1),
    "pad": (lambda b, x: b(aten.constant_pad_nd.default, x, [1, 1]), (X,), 1),
}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("shard", [Shard(0, 2), SECOND])
def test_every_rule(name: str, shard: Shard) -> None:
    make, samples, axis = EVERY[name]
    check(make, *samples, axis=axis, shard=shard)


ACROSS: dict[str, tuple[Make, Tensor, int]] = {
    "softmax": (lambda b, x: b(aten.softmax.int, x, 0), X, 0),
    "norm": (lambda b, x: b(aten.layer_norm.default, x, [6, 8]), X, 1),
    "merge": (lambda b, x: b(aten.view.default, x, [8, 24]), X, 1),
    "group norm": (lambda b, x: b(aten.group_norm.default, x, 2), IMAGE, 1),
    "conv": (lambda b, x: b(aten.conv2d.default, x, randn(4, 4, 3, 3)), IMAGE, 2),
    "flip": (lambda b, x: b(aten.flip.default, x, [0]), X, 0),
    "sum over": (lambda b, x: b(aten.cumsum.default, x, 0), X, 0),
    "self product": (lambda b, x: b(aten.matmul.default, x, x), randn(2, 4, 4), 1),
}


@pytest.mark.parametrize("name", ACROSS)
def test_what_mixes_the_rows_is_computed_whole(name: str) -> None:
    make, sample, axis = ACROSS[name]
    whole = body(make, sample)
    sharded = shard_body(whole, {0: axis}, SECOND)
    assert error(whole, sharded, {0: axis}, SECOND) < 0.1
    assert sharded.parameters == [(0, None)]
    assert len(sharded.blocked) == 1


def test_a_value_that_is_read_whole_as_well_is_cut() -> None:
    def make(b: Builder, x: fx.Node) -> Any:
        y = b(aten.relu.default, x)
        return b(aten.mul.Tensor, y, b(aten.mean.dim, y, [0], True))

    whole = body(make, X)
    sharded = shard_body(whole, {0: 0}, SECOND)
    assert format_graph(sharded.body).splitlines()[1:] == [
        "%1: float32[4,6,8] = aten.relu(%x)",
        "%2: float32[2,6,8] = aten.slice.Tensor(%1, 0, 2, 4)",
        "%3: float32[1,6,8] = aten.mean.dim(%1, [0], True)",
        "%4: float32[2,6,8] = aten.mul.Tensor(%2, %3)",
        "return %4",
    ]
    assert error(whole, sharded, {0: 0}, SECOND) < 0.1


def test_rows_of_a_table_are_cut_where_they_are_taken() -> None:
    def make(b: Builder, x: fx.Node, row: fx.Node) -> Any:
        rows = b(aten.view.default, b(aten.slice.Tensor, row, 0, 2, 10), [4, 2])
        return b(aten.add.Tensor, x, rows)

    sharded = shard_body(body(make, randn(4, 2), randn(12)), {0: 0}, SECOND)
    assert sharded.parameters == [(0, 0), (1, None)]
    assert "%2: float32[4] = aten.slice.Tensor(%x1, 0, 6, 10)" in format_graph(sharded.body)


def test_an_error_in_a_half_is_seen() -> None:
    whole = body(lambda b, x: b(aten.relu.default, x), X)
    first = shard_body(whole, {0: 0}, Shard(0, 2))
    assert error(whole, first, {0: 0}, Shard(0, 2)) == 0
    wrong = shard_body(body(lambda b, x: b(aten.neg.default, x), X), {0: 0}, Shard(0, 2))
    assert error(whole, wrong, {0: 0}, Shard(0, 2)) > 1


def test_results_that_are_not_wanted_go_with_what_only_they_need() -> None:
    def make(b: Builder, x: fx.Node, y: fx.Node) -> Any:
        return b(aten.relu.default, x), b(aten.neg.default, y), b(aten.exp.default, x)

    sharded = shard_body(body(make, X, X), {2: 1, 0: None}, SECOND)
    assert sharded.parameters == [(0, None)]
    assert [format_type(n.meta["val"]) for n in g.outputs(sharded.body)] == [
        "float32[4,3,8]",
        "float32[4,6,8]",
    ]


def test_an_odd_size_has_no_halves() -> None:
    graph = body(lambda b, x: b(aten.relu.default, x), randn(3, 4))
    (relu,) = g.outputs(graph)
    assert shard_call(relu, 0, SECOND) is None
    assert shard_call(relu, 1, SECOND) is not None
