"""What the table says of operators' axes, written as indices: kept, ~moved, ?mixed, summed."""

import operator
from typing import Any

import pytest

from diffopt.analysis.axis_rules import Axes, relate
from diffopt.ir import graph as g
from tests.passes.build import aten, body, randn

MARKS = {"kept": "", "moved": "~", "mixed": "?", "summed": ""}
X = randn(4, 6, 8)
IMAGE = randn(2, 4, 8, 8)


def text(axes: Axes) -> str:
    """Return the indices of each axis; "." is one without, and a name stands for several."""
    return " ".join(
        "".join(MARKS[index.kind] + index.name for index in axis) or "." for axis in axes
    )


def described(make: Any, *samples: Any) -> str | None:
    (node,) = g.outputs(body(make, *samples))
    relation = relate(node)
    if relation is None:
        return None
    return f"{', '.join(text(axes) for _, axes in relation.operands)} -> {text(relation.result)}"


RELATIONS: dict[str, tuple[str | None, Any, tuple[Any, ...]]] = {
    "pointwise": ("a b c, b c -> a b c", lambda b, x, y: b(aten.add.Tensor, x, y), (X, X[0])),
    "linear": (
        "A B i, o i, o -> A B o",
        lambda b, x: b(aten.linear.default, x, randn(5, 8), randn(5)),
        (X,),
    ),
    "addmm": (
        "m k, k n, n -> m n",
        lambda b, x, y, z: b(aten.addmm.default, x, y, z),
        (randn(3), randn(4, 8), randn(8, 3)),
    ),
    "vectors": (None, lambda b, x, y: b(aten.matmul.default, x, y), (X, randn(8))),
    "attention": (
        "A B l d, A B m d, A B m v, l m -> A B l v",
        lambda b, q, m: b(aten.scaled_dot_product_attention.default, q, q, q, m),
        (IMAGE, randn(8, 8)),
    ),
    "causal": (
        "A B ?l d, A B m d, A B m v -> A B ?l v",
        lambda b, q: b(aten.scaled_dot_product_attention.default, q, q, q, None, 0.0, True),
        (IMAGE,),
    ),
    "fewer heads of keys": (
        "A ?B l d, A ?B m d, A ?B m v -> A ?B l v",
        lambda b, q, k: b(aten.scaled_dot_product_attention.default, q, k, k, enable_gqa=True),
        (IMAGE, IMAGE[:, :2]),
    ),
    "convolution": (
        "b i ?x ?y, o i p q -> b o ?x ?y",
        lambda b, x: b(aten.conv2d.default, x, randn(3, 4, 3, 3)),
        (IMAGE,),
    ),
    "convolution in groups": (
        "b ?i ?x ?y, ?o ?i p q -> b ?o ?x ?y",
        lambda b, x: b(aten.conv2d.default, x, randn(4, 2, 3, 3), groups=2),
        (IMAGE,),
    ),
    "transposed convolution": (
        "b i ?x, i o p -> b o ?x",
        lambda b, x: b(aten.conv_transpose1d.default, x, randn(6, 3, 2)),
        (X,),
    ),
    "embedding": (
        "~v d, A B -> A B d",
        lambda b, x: b(aten.embedding.default, randn(5, 3), x),
        (randn(2, 4).long(),),
    ),
    "einsum": (
        "a b c, a b k -> c a k",
        lambda b, x: b(aten.einsum.default, "abc,abk->cak", [x, x]),
        (X,),
    ),
    "trace": (None, lambda b, x: b(aten.einsum.default, "aa->a", [x]), (randn(3, 3),)),
    "softmax": ("a b ?c -> a b ?c", lambda b, x: b(aten.softmax.int, x, -1), (X,)),
    "layer norm": ("a ?b ?c -> a ?b ?c", lambda b, x: b(aten.layer_norm.default, x, [6, 8]), (X,)),
    "pool": ("a b ?c ?d -> a b ?c ?d", lambda b, x: b(aten.avg_pool2d.default, x, 2), (IMAGE,)),
    "pad": ("a ?b c -> a ?b c", lambda b, x: b(aten.pad.default, x, [0, 0, 1, 1]), (X,)),
    "sum": ("a b c -> a c", lambda b, x: b(aten.sum.dim_IntList, x, [1]), (X,)),
    "mean": ("a b c -> . b .", lambda b, x: b(aten.mean.dim, x, [0, -1], True), (X,)),
    "slice": ("a ~b c -> a ~b c", lambda b, x: b(aten.slice.Tensor, x, 1, 1, 5), (X,)),
    "whole slice": ("a b c -> a b c", lambda b, x: b(aten.slice.Tensor, x, 1, 0, 2**62), (X,)),
    "select": ("a ~b c -> a c", lambda b, x: b(aten.select.int, x, 1, 2), (X,)),
    "item": (
        "a b c -> a b c",
        lambda b, x: b(operator.getitem, b(aten.split.Tensor, x, 3, 1), 1),
        (X,),
    ),
    "stack": ("a c, a c -> a ~b c", lambda b, x, y: b(aten.stack.default, [x, y], 1), (X[0],) * 2),
    "permute": ("a b c -> c a b", lambda b, x: b(aten.permute.default, x, [2, 0, -2]), (X,)),
    "repeat": ("b ~c d -> ~a b ~c d", lambda b, x: b(aten.repeat.default, x, [2, 1, 3, 1]), (X,)),
    "expand": ("b -> a b", lambda b, x: b(aten.expand.default, x, [3, 5]), (randn(1),)),
    "unknown": (None, lambda b, x: b(aten.flip.default, x, [0]), (X,)),
}


@pytest.mark.parametrize("name", RELATIONS)
def test_relations(name: str) -> None:
    expected, make, samples = RELATIONS[name]
    assert described(make, *samples) == expected


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ([4, 6, 8], [24, 2, 4], "1 4 2448 -> 14 24 48"),
        ([24, 1, 8], [4, 6, 8, 1], "14 . 24 -> 1 4 24 ."),
        ([6, 4, 5], [4, 6, 5], "?1 ?1 24 -> ?1 ?1 24"),
    ],
)
def test_reshapes(old: list[int], new: list[int], expected: str) -> None:
    """An index is named by the product of the sizes before it."""
    assert described(lambda b, x: b(aten.view.default, x, new), randn(*old)) == expected
