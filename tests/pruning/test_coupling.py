"""Which indices go together, on graphs of a few layers, and why others stay."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from diffopt.pruning.coupling import Coupling, Group, couple
from diffopt.pruning.index_labels import Labels, compressed, reshaped, varying, varying_by_class
from tests.passes.build import Builder, body, parameter, program, randn

aten = torch.ops.aten

Make = Callable[..., Any]
TOKENS = randn(2, 3, 8)
IMAGE = randn(2, 4, 4, 4)


def coupling_of(make: Make, *samples: torch.Tensor) -> Coupling:
    net = body(make, *samples, name="net")
    return couple(program(lambda b, *xs: b.call("net", *xs), *samples, net=net))


def groups(make: Make, *samples: torch.Tensor) -> list[tuple[str, int, int]]:
    """Return kind, number of units and their width of each group."""
    return [(g.kind, len(g.units), g.width(g.units[0])) for g in coupling_of(make, *samples).groups]


def rows(coupling: Coupling, group: Group, unit: int = 0) -> list[tuple[list[int], int, list[int]]]:
    """Return the members of a unit: shape, axis, indices."""
    members = group.units[unit].members.items()
    tensors = coupling.flow.tensors
    return [(list(tensors[key].shape), axis, at.tolist()) for (key, axis), at in members]


def linear(b: Builder, x: fx.Node, *shape: int, seed: int) -> fx.Node:
    return b(aten.linear.default, x, parameter(*shape, seed=seed))


def conv(b: Builder, x: fx.Node, *shape: int, seed: int, groups: int = 1) -> fx.Node:
    args = [x, parameter(*shape, 3, 3, seed=seed), None, [1, 1], [1, 1], [1, 1], groups]
    return b(aten.conv2d.default, *args)


def parts(b: Builder, target: Any, *args: Any, count: int) -> list[fx.Node]:
    whole = b(target, *args)
    return [b(operator.getitem, whole, i) for i in range(count)]


# What is coupled


def test_the_example_of_index_labels() -> None:
    def make(b, x):
        h = linear(b, x, 4, 6, seed=0)
        y = b(aten.add.Tensor, h, linear(b, b(aten.relu.default, h), 4, 4, seed=1))
        return linear(b, y, 3, 4, seed=2)

    coupling = coupling_of(make, randn(2, 6))
    classes = coupling.classes.tolist()
    assert classes[:10] == [*range(10)]
    assert classes[10:18] == [0, 1, 2, 3] * 2
    assert classes[18:] == [18, 19, 20, 0, 1, 2, 3]
    constrained = torch.cat([labels for labels, _ in coupling.flow.labels.constraints]).tolist()
    assert sorted(constrained) == [4, 5, 6, 7, 8, 9, 18, 19, 20]
    (group,) = coupling.groups
    assert [unit.label for unit in group.units] == [0, 1, 2, 3]
    assert rows(coupling, group, 1) == [
        *(([4, 6], 0, [1]), ([4, 4], 0, [1]), ([4, 4], 1, [1]), ([3, 4], 1, [1]))
    ]


@pytest.mark.parametrize(
    ("use", "units"),
    [
        (lambda b, x: b(aten.glu.default, x, 1), 6),
        (lambda b, x: b(aten.amax.default, x, [1]), 6),
        (lambda b, x: b(aten.std.correction, x, [1], correction=0, keepdim=True), 6),
    ],
)
def test_what_mixes_tokens_does_not_constrain_channels(use, units) -> None:
    """These have no rule of labels: the table of axes says it."""

    def make(b, x):
        return linear(b, use(b, linear(b, x, 6, 8, seed=0)), 5, 6, seed=1)

    (group,) = coupling_of(make, randn(2, 4, 8)).groups
    assert len(group.units) == units


def test_a_residual_ties_what_makes_it_and_what_reads_it() -> None:
    def make(b, x):
        x = linear(b, x, 6, 8, seed=0)
        y = linear(b, b(aten.relu.default, linear(b, x, 16, 6, seed=1)), 6, 16, seed=2)
        return linear(b, b(aten.add.Tensor, x, y), 5, 6, seed=3)

    coupling = coupling_of(make, TOKENS)
    stream, inner = coupling.groups
    assert (stream.kind, len(stream.units)) == ("channels", 6)
    assert (inner.kind, len(inner.units)) == ("mlp", 16)
    assert rows(coupling, stream, 1) == [
        *([[6, 8], 0, [1]], [[16, 6], 1, [1]], [[6, 16], 0, [1]], [[5, 6], 1, [1]])
    ] or rows(coupling, stream, 1) == [
        *(([6, 8], 0, [1]), ([16, 6], 1, [1]), ([6, 16], 0, [1]), ([5, 6], 1, [1]))
    ]
    assert coupling.fixed == (("net.linear_default_3", "a result of its component"),)


def test_a_concatenation_ties_each_part_with_its_own_columns() -> None:
    def make(b, x):
        one, two = conv(b, x, 4, 4, seed=0), conv(b, x, 6, 4, seed=1)
        return conv(b, b(aten.cat.default, [one, two], 1), 4, 10, seed=2)

    coupling = coupling_of(make, IMAGE)
    assert [len(group.units) for group in coupling.groups] == [4, 6]
    assert rows(coupling, coupling.groups[1], 2)[-1] == ([4, 10, 3, 3], 1, [6])


@pytest.mark.parametrize(("norms", "width"), [(8, 2), (4, 4), (2, 8)])
def test_a_group_norm_over_a_concatenation(norms, width) -> None:
    """A unit is what no border of a group cuts, of none of the norms that see it."""

    def make(b, x):
        normed = [b(aten.group_norm.default, conv(b, x, 16, 4, seed=i), 8) for i in range(2)]
        y = b(aten.group_norm.default, b(aten.cat.default, normed, 1), norms * 2)
        return conv(b, y, 4, 32, seed=9)

    assert groups(make, IMAGE) == [("channels", 16 // width, width)] * 2


def test_heads_go_as_a_whole() -> None:
    def make(b, x):
        qkv = linear(b, x, 3 * 8, 8, seed=0)
        form = [b(aten.view.default, p, [2, 3, 2, 4]) for p in parts(b, SPLIT, qkv, 8, -1, count=3)]
        q, k, v = (b(aten.transpose.int, p, 1, 2) for p in form)
        y = b(aten.scaled_dot_product_attention.default, q, k, v)
        y = b(aten.reshape.default, b(aten.transpose.int, y, 1, 2), [2, 3, 8])
        return linear(b, y, 5, 8, seed=1)

    coupling = coupling_of(make, TOKENS)
    (group,) = coupling.groups
    assert (group.kind, len(group.units)) == ("heads", 2)
    second = [4, 5, 6, 7]
    whole = [i + n for n in (0, 8, 16) for i in second]
    assert rows(coupling, group, 1) == [([24, 8], 0, whole), ([5, 8], 1, second)]


SPLIT = aten.split.Tensor


def test_heads_of_products() -> None:
    def make(b, x):
        form = [b(aten.view.default, linear(b, x, 8, 8, seed=i), [2, 3, 2, 4]) for i in range(3)]
        q, k, v = (b(aten.permute.default, p, [0, 2, 1, 3]) for p in form)
        scores = b(aten.matmul.default, q, b(aten.transpose.int, k, 2, 3))
        y = b(aten.matmul.default, b(aten.softmax.int, scores, -1), v)
        y = b(aten.reshape.default, b(aten.permute.default, y, [0, 2, 1, 3]), [2, 3, 8])
        return linear(b, y, 5, 8, seed=3)

    assert groups(make, TOKENS) == [("heads", 2, 4)]


def test_fewer_keys_than_queries() -> None:
    def make(b, x):
        q = b(aten.view.default, linear(b, x, 16, 8, seed=0), [2, 3, 4, 4])
        kv = [b(aten.view.default, linear(b, x, 8, 8, seed=i), [2, 3, 2, 4]) for i in (1, 2)]
        q, k, v = (b(aten.transpose.int, p, 1, 2) for p in (q, *kv))
        y = b(aten.scaled_dot_product_attention.default, q, k, v, enable_gqa=True)
        y = b(aten.reshape.default, b(aten.transpose.int, y, 1, 2), [2, 3, 16])
        return linear(b, y, 5, 16, seed=3)

    assert groups(make, TOKENS) == [("heads", 2, 8)]  # two heads of queries each


def test_one_head_has_channels() -> None:
    def make(b, x):
        q, k, v = (linear(b, x, 8, 8, seed=i) for i in range(3))
        scores = b(aten.bmm.default, q, b(aten.transpose.int, k, 1, 2))
        y = b(aten.bmm.default, b(aten.softmax.int, scores, -1), v)
        return linear(b, y, 5, 8, seed=3)

    assert groups(make, TOKENS) == [("channels", 8, 1), ("mlp", 8, 1)]


def test_a_gate_ties_its_halves() -> None:
    def make(b, x):
        a, c = parts(b, aten.chunk.default, linear(b, x, 12, 8, seed=0), 2, -1, count=2)
        return linear(b, b(aten.mul.Tensor, a, b(aten.gelu.default, c)), 5, 6, seed=1)

    coupling = coupling_of(make, TOKENS)
    (group,) = coupling.groups
    assert group.kind == "mlp"
    assert rows(coupling, group, 2) == [([12, 8], 0, [2, 8]), ([5, 6], 1, [2])]


def test_modulation_follows_the_stream() -> None:
    """Where an axis is split into rows of channels, what reads them decides that channels go."""

    def make(b, x, t):
        x = linear(b, x, 6, 8, seed=0)
        table = b(aten.view.default, linear(b, t, 12, 8, seed=1), [2, 2, 6])
        table = b(aten.add.Tensor, table, parameter(2, 6, seed=2))
        shift, scale = parts(b, aten.chunk.default, table, 2, 1, count=2)
        y = b(aten.add.Tensor, b(aten.mul.Tensor, b(aten.layer_norm.default, x, [6]), scale), shift)
        return linear(b, y, 5, 6, seed=3)

    coupling = coupling_of(make, TOKENS, randn(2, 8))
    (group,) = coupling.groups
    assert rows(coupling, group, 1) == [
        *(([6, 8], 0, [1]), ([12, 8], 0, [1, 7]), ([2, 6], 1, [1]), ([5, 6], 1, [1]))
    ]


def test_convolutions_in_groups() -> None:
    def make(groups: int) -> Make:
        def add(b, x):
            y = conv(b, x, 8, 4, seed=0)
            y = conv(b, y, 8, 8 // groups, seed=1, groups=groups)
            return conv(b, y, 4, 8, seed=2)

        return add

    assert groups(make(8), IMAGE) == [("channels", 8, 1)]
    assert groups(make(2), IMAGE) == [("channels", 2, 4)]


def test_pixel_shuffle_ties_the_channels_that_become_one() -> None:
    def make(b, x):
        y = b(aten.pixel_shuffle.default, conv(b, x, 8, 4, seed=0), 2)
        return conv(b, y, 4, 2, seed=1)

    assert groups(make, IMAGE) == [("channels", 2, 4)]


def test_bodies_that_share_a_weight() -> None:
    def make(b, x):
        return linear(b, b(aten.relu.default, b(aten.linear.default, x, SHARED)), 5, 6, seed=1)

    def other(b, x):
        return b(aten.linear.default, x, SHARED)

    nets = {"net": body(make, TOKENS, name="net"), "other": body(other, TOKENS, name="other")}
    built = program(lambda b, x: [*b.call("net", x), *b.call("other", x)], TOKENS, **nets)
    coupling = couple(built)
    assert coupling.groups == ()
    assert dict(coupling.fixed)["net.linear_default"] == "a result of its component"


SHARED = parameter(6, 8, seed=7)

# What stays


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (lambda b, x: b(operator.getitem, b(aten.sort.default, x), 0), "aten.sort has no rule"),
        (lambda b, x: b(aten.softmax.int, x, -1), "aten.softmax.int mixes the axis"),
        (
            lambda b, x: b(aten.slice.Tensor, x, 2, 0, 6, 2),
            "aten.slice.Tensor takes every other",
        ),
        (lambda b, x: b(aten.select.int, x, 2, 1), "one index of it is read by itself"),
    ],
)
def test_reasons(use, reason) -> None:
    def make(b, x):
        used = use(b, linear(b, x, 6, 8, seed=0))
        return linear(b, used, 5, used.meta["val"].shape[-1], seed=1)

    coupling = coupling_of(make, TOKENS)
    fixed = dict(coupling.fixed)
    if reason.startswith("one index"):
        assert len(coupling.groups[0].units) == 5
    else:
        assert fixed["net.linear_default"] == reason


def test_what_is_all_of_a_value_stays() -> None:
    """One group of the norm is all that the second convolution reads."""

    def make(b, x):
        y = b(aten.group_norm.default, conv(b, x, 8, 4, seed=0), 4)
        part = conv(b, b(aten.slice.Tensor, y, 1, 2, 4), 4, 2, seed=1)
        return b(aten.add.Tensor, conv(b, y, 4, 8, seed=2), part)

    coupling = coupling_of(make, IMAGE)
    (group,) = coupling.groups
    members = [unit.members[group.output_axes[0]].tolist() for unit in group.units]
    assert members == [[0, 1], [4, 5], [6, 7]]


# Labels


def test_labels_that_are_united_are_one_class() -> None:
    labels = Labels()
    one, two, three = (labels.fresh(4) for _ in range(3))
    labels.union(one, two)
    labels.union(two, three)
    assert labels.classes().tolist() == [0, 1, 2, 3] * 3


def test_a_chain_of_unions() -> None:
    labels = Labels()
    chain = labels.fresh(1000)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    labels.union(chain[order[:-1]], chain[order[1:]])
    assert labels.classes().unique().tolist() == [0]


@pytest.mark.parametrize(
    ("shape", "new"),
    [([2, 6, 5], [2, 2, 3, 5]), ([2, 2, 3, 5], [2, 6, 5]), ([2, 6, 5], [1, 2, 30]), ([6], [1, 6])],
)
@pytest.mark.parametrize("axis", [0, 1])
def test_reshape_is_that_of_torch(shape, new, axis) -> None:
    factor = Labels().axes_of(shape).get(axis)
    if factor is not None:
        assert torch.equal(reshaped(factor, new), factor.contiguous().reshape(new))


def test_axes_along_which_nothing_changes_cost_nothing() -> None:
    (factor,) = (f for a, f in Labels().axes_of([64, 8, 64]).items() if a == 1)
    assert varying(factor) == (1,)
    assert varying(reshaped(factor, [64, 2, 4, 64])) == (1, 2)
    assert reshaped(factor, [64, 8, 4096 // 64]).untyped_storage().nbytes() == 64
    repeated = compressed(factor.repeat(1, 2, 1))
    assert varying(repeated) == (1,)
    assert varying_by_class(repeated, torch.zeros(200, dtype=torch.long)) == ()
