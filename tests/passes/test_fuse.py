"""What `fuse` merges and folds, and what it must leave alone."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

from diffopt.capture.trace import trace_function
from diffopt.core import Pipeline, Record
from diffopt.testing import check_pass
from tests.passes.build import Make, body, parameter, program, randn

aten = torch.ops.aten

X = randn(2, 3)
IMAGE = randn(1, 3, 4, 4)
# A matrix product of another size may sum in another order: a few units in the last place of values
# around 1.
LAST_PLACES = 5e-6


def fuse(
    make: Make, *samples: Tensor, only: str = "", atol: float = LAST_PLACES, **parts
) -> tuple[str, Record]:
    kinds = ("linears", "lora", "scales", "steps")
    off = ",".join(f"{kind}=false" for kind in kinds if kind != (only or "all") or kind == "steps")
    step = f"fuse({off})" if only else "fuse(steps=false)"
    return check_pass(step, program(make, *(samples or (X,)), **parts), atol=atol)


def linear(b, x, weight, bias=None):
    return b(aten.linear.default, x, weight, *([] if bias is None else [bias]))


def conv(b, x, weight, bias=None, *more):
    return b(aten.conv2d.default, x, weight, bias, *more)


Q, K, V = (parameter(4, 3, seed=i) for i in range(3))
BIAS = parameter(4, seed=9)


# Linears


def test_linears_of_one_input():
    def make(b, x):
        q, k, v = linear(b, x, Q, BIAS), linear(b, x, K), linear(b, x, V)
        return b(aten.mul.Tensor, b(aten.mul.Tensor, q, k), v)

    text, record = fuse(make)
    assert_expected_inline(
        text,
        """\
%x: float32[2,3]
%1: float32[12,3] = weight_merged_weight
%2: float32[12] = weight_merged_bias
%3: float32[2,12] = aten.linear(%x, %1, %2)
%4: (float32[2,4], float32[2,4], float32[2,4]) = aten.split_with_sizes(%3, [4, 4, 4], -1)
%5: float32[2,4] = operator.getitem(%4, 0)
%6: float32[2,4] = operator.getitem(%4, 1)
%7: float32[2,4] = operator.getitem(%4, 2)
%8: float32[2,4] = aten.mul.Tensor(%5, %6)
%9: float32[2,4] = aten.mul.Tensor(%8, %7)
return %9""",
    )
    assert record.notes == {"linears merged": 2}
    assert record.after.parameters == record.before.parameters + 8


def test_linears_of_equal_inputs():
    def make(b, x):
        one, other = (b(aten.silu.default, x) for _ in range(2))
        return b(aten.add.Tensor, linear(b, one, Q), linear(b, other, K))

    _, record = fuse(make)
    assert record.notes == {"linears merged": 1}


def test_components_that_share_weights_share_the_merged_one():
    def make(second):
        def inner(b, x):
            layers = [linear(b, x, Q), linear(b, x, K)]
            return b(second, *(layers if second is aten.mul.Tensor else layers[::-1]))

        return body(inner, X)

    def loop(b, x):
        return b(aten.add.Tensor, b.call("one", x)[0], b.call("two", x)[0])

    parts = {"one": make(aten.mul.Tensor), "two": make(aten.sub.Tensor)}
    text, record = fuse(loop, **parts)
    assert text.count("aten.linear") == 2
    assert record.notes == {"linears merged": 2}
    assert record.after.parameters == record.before.parameters == 24


def test_a_view_that_the_new_layout_does_not_allow():
    def make(b, x):
        q, k = linear(b, x, Q), linear(b, x, K)
        return b(aten.add.Tensor, b(aten.view.default, q, [8]), b(aten.view.default, k, [8]))

    text, _ = fuse(make)
    assert text.count("aten.reshape") == 2


def test_outputs_keep_their_layout():
    def make(b, x):
        q, k = linear(b, x, Q), linear(b, x, K)
        return [q, b(aten.transpose.int, k, 0, 1)]

    part = body(make, X)
    built = program(lambda b, x: b.call("part", x), X, part=part)
    for case in (program(make, X), built):
        before = case.run([X])
        after = Pipeline.parse("fuse(steps=false)").run(case).run([X])
        assert [t.stride() for t in after] == [t.stride() for t in before]
        assert after[0].untyped_storage().data_ptr() != after[1].untyped_storage().data_ptr()


def test_merging_in_several_weights():
    def make(b, x):
        layers = [linear(b, x, parameter(100_000, 3, seed=i)) for i in range(3)]
        return b(aten.cat.default, layers, 1)

    built = program(make, X)
    text, record = check_pass("fuse(steps=false,max-merged-mb=3)", built, atol=LAST_PLACES)
    assert record.notes == {"linears merged": 1}
    assert record.skipped == ["linear_default_2: the merged weight would be over max-merged-mb"]
    assert "split_with_sizes(%2, [100000, 100000], -1)" in text


def used_twice(b, x):
    y = b(aten.slice.Tensor, linear(b, b(aten.exp.default, x), Q), 1, 0, 3)
    return [linear(b, x, Q), linear(b, x, K), y]


def used_as_a_value(b, x):
    return [linear(b, x, Q), linear(b, x, K), b(aten.exp.default, Q)]


def two_biases(b, x):
    y = b(aten.exp.default, x)
    first = [linear(b, x, Q, BIAS), linear(b, x, K)]
    return [*first, linear(b, y, Q, parameter(4)), linear(b, y, K)]


@pytest.mark.parametrize(
    ("make", "reasons"),
    [
        (
            used_twice,
            [
                "linear_default: no other layer of its input is used in the same places",
                "linear_default_2: no other layer of its input is used in the same places",
            ],
        ),
        (
            used_as_a_value,
            [
                "linear_default: its weight is also used in another way",
                "linear_default_1: no other layer of its input is used in the same places",
            ],
        ),
        (
            two_biases,
            [
                "linear_default: its weight is used with different biases",
                "linear_default_1: no other layer of its input is used in the same places",
            ],
        ),
    ],
)
def test_weights_with_other_uses_are_not_merged(make, reasons):
    _, record = fuse(make)
    assert not record.changed
    assert record.skipped == reasons


def test_weights_that_only_one_of_two_components_uses():
    def make(*weights):
        def inner(b, x):
            return b(aten.cat.default, [linear(b, x, weight) for weight in weights])

        return body(inner, X)

    def loop(b, x):
        return b.call("one", x) + b.call("two", x)

    _, record = fuse(loop, one=make(Q, K, V), two=make(Q, K))
    assert record.notes == {"linears merged": 2}
    assert record.after.parameters == record.before.parameters
    assert record.skipped == [
        "one.linear_default_2: no other layer of its input is used in the same places"
    ]


@pytest.mark.parametrize(
    "make",
    [
        lambda b, x: linear(b, linear(b, x, parameter(3, 3)), Q),
        lambda b, x: [linear(b, x, Q), linear(b, b(aten.exp.default, x), K)],
        lambda b, x: [linear(b, x, b(aten.mul.Tensor, x, 2.0)), linear(b, x, Q)],
        lambda b, x: [linear(b, x, Q), linear(b, x, K, b(aten.exp.default, BIAS))],
    ],
)
def test_linears_that_do_not_belong_together(make):
    _, record = fuse(make)
    assert not record.changed


# LoRA

A, B = parameter(2, 3, seed=5), parameter(4, 2, seed=6)


def lora(b, x, base, down, up, scale=0.5):
    branch = linear(b, linear(b, x, down), up)
    return b(aten.add.Tensor, base, b(aten.mul.Tensor, branch, scale))


def test_lora():
    def make(b, x):
        again = b(aten.dropout.default, b(aten.to.dtype, x, torch.float32), 0.1, False)
        base = linear(b, x, Q, BIAS)
        return lora(b, again, base, A, B)

    text, record = fuse(make, only="lora")
    assert_expected_inline(
        text,
        """\
%x: float32[2,3]
%1: float32[4,3] = weight_folded_weight
%2: float32[4] = weight_folded_bias
%3: float32[2,4] = aten.linear(%x, %1, %2)
return %3""",
    )
    assert record.notes == {"LoRA merged": 1}
    assert record.after.parameters == 16


def test_several_adapters_with_biases():
    def make(b, x):
        once = lora(b, x, linear(b, x, Q), A, B, torch.tensor(2.0))
        down = linear(b, x, A, parameter(2, seed=7))
        branch = linear(b, down, parameter(4, 2, seed=8), BIAS)
        return b(aten.add.Tensor, b(aten.div.Tensor, branch, 3), once)

    text, record = fuse(make, only="lora")
    assert record.notes == {"LoRA merged": 2}
    assert text.count("aten.") == 1


@pytest.mark.parametrize("geometry", [(), ([2, 2], [1, 1]), ([1], [2], [2])])
def test_lora_of_a_convolution(geometry):
    weight, down = parameter(4, 3, 3, 3), parameter(2, 3, 3, 3, seed=1)

    def make(b, x):
        up = conv(b, conv(b, x, down, None, *geometry), parameter(4, 2, 1, 1, seed=2), None)
        base = conv(b, x, weight, BIAS, *geometry)
        return b(aten.add.Tensor, base, b(aten.mul.Tensor, up, 0.5))

    text, record = fuse(make, IMAGE, only="lora")
    assert record.notes == {"LoRA merged": 1}
    assert text.count("conv2d") == 1


def test_lora_in_half_precision():
    half = [t.detach().bfloat16() for t in (Q, A, B)]

    def make(b, x):
        return lora(b, x, linear(b, x, half[0]), half[1], half[2])

    # The weight is rounded to 8 bits once more, and three roundings of the result fall away.
    _, record = fuse(make, X.bfloat16(), only="lora", atol=0.06)
    assert record.notes == {"LoRA merged": 1}


@pytest.mark.parametrize(
    "make",
    [
        lambda b, x: lora(b, b(aten.exp.default, x), linear(b, x, Q), A, B),
        lambda b, x: lora(b, x, linear(b, x, Q), A, B, randn(4)),
        lambda b, x: (lambda base: [lora(b, x, base, A, B), base])(linear(b, x, Q)),
        lambda b, x: b(aten.add.Tensor, linear(b, x, Q), linear(b, x, K), alpha=2),
        lambda b, x: b(
            aten.add.Tensor,
            linear(b, x, Q),
            linear(b, b(aten.relu.default, linear(b, x, A)), B),
        ),
    ],
)
def test_what_is_no_lora(make):
    _, record = fuse(make, only="lora")
    assert not record.changed
    assert record.skipped == []


@pytest.mark.parametrize(
    ("base", "size", "down", "up"),
    [
        (([1], [1]), 3, ([1], [1]), (3, [1], [1])),  # a kernel of 3 after the low rank
        (([1], [1]), 1, ([1], [0]), (1, [1], [0])),  # another kernel
        (([1], [2], [2]), 3, ([1], [1], [1]), (1, [1], [0])),  # another dilation
        (([1], [1]), 3, ([1], [0]), (1, [1], [1])),  # another padding
    ],
)
def test_what_is_no_lora_of_a_convolution(base, size, down, up):
    def make(b, x):
        low = conv(b, x, parameter(2, 3, size, size, seed=1), None, *down)
        branch = conv(b, low, parameter(4, 2, up[0], up[0], seed=2), None, *up[1:])
        whole = conv(b, x, parameter(4, 3, 3, 3), BIAS, *base)
        return b(aten.add.Tensor, whole, branch)

    _, record = fuse(make, IMAGE, only="lora")
    assert not record.changed


def test_a_branch_with_other_uses_is_no_lora():
    def make(b, x):
        branch = linear(b, linear(b, x, A), B)
        return [b(aten.add.Tensor, linear(b, x, Q), branch), branch]

    _, record = fuse(make, only="lora")
    assert not record.changed


def test_lora_on_a_weight_that_is_used_without_it_too():
    def make(b, x):
        y = b(aten.exp.default, x)
        return [lora(b, x, linear(b, x, Q), A, B), linear(b, y, Q)]

    _, record = fuse(make, only="lora")
    assert not record.changed
    assert record.skipped == ["add_tensor: the layer's weight is also used in another way"]


# Scales


def test_scales_and_shifts():
    def make(b, x):
        scaled = b(aten.mul.Tensor, linear(b, x, Q), 0.5)
        shifted = b(aten.sub.Tensor, b(aten.div.Tensor, scaled, randn(4)), randn(1, 4, seed=1))
        return b(aten.add.Tensor, torch.tensor(3.0), shifted)

    text, record = fuse(make, only="scales")
    assert_expected_inline(
        text,
        """\
%x: float32[2,3]
%1: float32[4,3] = weight_folded_weight_1
%2: float32[4] = weight_folded_bias_1
%3: float32[2,4] = aten.linear(%x, %1, %2)
return %3""",
    )
    assert record.notes == {"scales folded": 4}


def test_a_scale_behind_any_rearrangement():
    def make(b, x):
        rows = b(aten.squeeze.dims, b(aten._unsafe_view.default, linear(b, x, Q), [2, 1, 4]), [1])
        return b(aten.mul.Tensor, b(aten.t.default, rows), 0.3)

    assert fuse(make, only="scales")[1].notes == {"scales folded": 1}


def test_a_scale_behind_a_change_of_shape():
    def make(b, x):
        heads = b(aten.transpose.int, b(aten.view.default, linear(b, x, Q), [2, 2, 2]), 0, 1)
        return b(aten.mul.Tensor, heads, 0.3)

    text, record = fuse(make, only="scales")
    assert record.notes == {"scales folded": 1}
    assert text.splitlines()[-2:] == [
        "%4: float32[2,2,2] = aten.transpose.int(%3, 0, 1)",
        "return %4",
    ]


def test_scales_of_a_convolution():
    weight = parameter(4, 3, 3, 3).to(memory_format=torch.channels_last)

    def make(b, x):
        scaled = b(aten.mul.Tensor, conv(b, x, weight, BIAS), randn(1, 4, 1, 1))
        return b(aten.add.Tensor, b(aten.div.Tensor, scaled, 2.0), randn(4, 1, 1, seed=1))

    _, record = fuse(make, IMAGE, only="scales")
    assert record.notes == {"scales folded": 3}


def test_scalars_in_a_row():
    def make(b, x):
        small = b(aten.mul.Tensor, b(aten.mul.Tensor, x, 0.1), 0.7)
        return b(aten.div.Tensor, b(aten.mul.Tensor, torch.tensor(5.0), small), 2)

    text, record = fuse(make)
    assert_expected_inline(
        text,
        """\
%x: float32[2,3]
%1: float32[] = scale_1
%2: float32[2,3] = aten.mul.Tensor(%x, %1)
return %2""",
    )
    assert record.notes == {"scales combined": 3}


@pytest.mark.parametrize(
    "make",
    [
        lambda b, x: (lambda y: [b(aten.mul.Tensor, y, 2.0), y])(linear(b, x, Q)),
        lambda b, x: b(aten.mul.Tensor, linear(b, x, Q), randn(2, 1)),
        lambda b, x: b(aten.mul.Tensor, linear(b, x, Q), randn(3, 1, 4)),
        lambda b, x: b(aten.mul.Tensor, linear(b, x, Q), randn(2, 4)),
        lambda b, x: b(aten.mul.Tensor, linear(b, x, Q), randn(4).double()),
        lambda b, x: b(aten.mul.Tensor, b(aten.relu.default, linear(b, x, Q)), 2.0),
        lambda b, x: b(aten.sub.Tensor, torch.tensor(1.0), linear(b, x, Q)),
        lambda b, x: b(aten.add.Tensor, linear(b, x, Q), 1.0, alpha=2),
        lambda b, x: b(aten.mul.Tensor, b(aten.view.default, linear(b, x, Q), [2, 2, 2]), randn(2)),
        lambda b, x: b(aten.mul.Tensor, b(aten.mul.Tensor, x, 1e-30), 1e-30),
        lambda b, x: b(aten.mul.Tensor, b(aten.mul.Tensor, x, 1e200), 1e200),
        lambda b, x: b(aten.div.Tensor, b(aten.mul.Tensor, x, 2.0), 0.0),
        lambda b, x: (lambda y: [y, b(aten.mul.Tensor, y, 2.0)])(b(aten.mul.Tensor, x, 3.0)),
    ],
)
def test_what_is_not_folded(make):
    _, record = fuse(make, only="scales")
    assert not record.changed
    assert record.skipped == []


def test_a_scale_along_another_dimension():
    def make(b, x):
        transposed = b(aten.transpose.int, linear(b, x, Q), 0, 1)
        return b(aten.mul.Tensor, transposed, randn(4))

    _, record = fuse(make, randn(4, 3), only="scales")
    assert not record.changed


def test_half_precision_is_not_scaled():
    def make(b, x):
        y = b(aten.mul.Tensor, linear(b, x, Q.detach().half()), 0.5)
        return b(aten.div.Tensor, b(aten.mul.Tensor, b(aten.exp.default, y), 0.1), 0.1)

    _, record = fuse(make, X.half(), only="scales")
    assert not record.changed


def test_a_scale_that_overflows():
    def make(b, x):
        return b(aten.mul.Tensor, linear(b, x, Q), 1e39)

    _, record = fuse(make, only="scales")
    assert not record.changed
    assert record.skipped == ["mul_tensor: the new weights would not be finite"]


def test_a_scale_of_a_weight_that_is_used_elsewhere():
    def make(b, x):
        y = b(aten.exp.default, x)
        return [b(aten.mul.Tensor, linear(b, x, Q), 2.0), linear(b, y, Q)]

    _, record = fuse(make, only="scales")
    assert not record.changed
    assert record.skipped == ["mul_tensor: the layer's weight is also used in another way"]


def test_a_scale_in_every_use_of_a_weight():
    def make(b, x):
        y = b(aten.exp.default, x)
        return [b(aten.mul.Tensor, linear(b, z, Q), 2.0) for z in (x, y)]

    _, record = fuse(make, only="scales", atol=3e-5)  # exp(x) makes outputs of up to 100
    assert record.notes == {"scales folded": 2}
    assert record.after.parameters == record.before.parameters


# Scales, shifts and norms in front of layers

NORM, SHIFT = parameter(3, seed=20), parameter(3, seed=21)


def norm(b, x, weight=NORM, bias=SHIFT):
    return b(aten.layer_norm.default, x, [3], weight, bias, 1e-5)


def group_norm(b, x, weight=NORM, bias=SHIFT):
    return b(aten.group_norm.default, x, 1, weight, bias, 1e-5)


def test_a_norm_in_front_of_linears():
    def make(b, x):
        y = norm(b, x)
        return [linear(b, y, Q, BIAS), linear(b, y, K), linear(b, y, V)]

    text, record = fuse(make)
    assert record.notes == {"norms folded": 1, "linears merged": 2}
    assert_expected_inline(
        text,
        """\
%x: float32[2,3]
%1: float32[2,3] = aten.layer_norm(%x, [3], None, None, 1e-05)
%2: float32[12,3] = weight_2_folded_merged_weight
%3: float32[12] = weight_2_folded_merged_bias
%4: float32[2,12] = aten.linear(%1, %2, %3)
%5: (float32[2,4], float32[2,4], float32[2,4]) = aten.split_with_sizes(%4, [4, 4, 4], -1)
%6: float32[2,4] = operator.getitem(%5, 0)
%7: float32[2,4] = operator.getitem(%5, 1)
%8: float32[2,4] = operator.getitem(%5, 2)
%9: float32[2,4] = aten.clone(%6)
%10: float32[2,4] = aten.clone(%7)
%11: float32[2,4] = aten.clone(%8)
return %9, %10, %11""",
    )


def one_by_one(b, x):
    return conv(b, x, parameter(4, 3, 1, 1), BIAS)


def padded(b, x):
    return conv(b, x, parameter(4, 3, 3, 3), None, [1, 1], [1, 1])


def flat(b, x):
    """Return a linear of an image's pixels, as attention of a decoder has it."""
    rows = b(aten.transpose.int, b(aten.view.default, x, [1, 3, 16]), 1, 2)
    return linear(b, rows, Q, BIAS)


def rms_norm(b, x):
    return b(aten.rms_norm.default, x, [3], NORM, 1e-5)


@pytest.mark.parametrize(
    ("make", "sample", "folded"),
    [
        (lambda b, x: linear(b, rms_norm(b, x), Q), X, "norms"),
        (lambda b, x: linear(b, norm(b, x, NORM, None), Q, BIAS), X, "norms"),
        (lambda b, x: one_by_one(b, group_norm(b, x)), IMAGE, "norms"),
        (lambda b, x: padded(b, group_norm(b, x, NORM, None)), IMAGE, "norms"),
        (lambda b, x: flat(b, group_norm(b, x)), IMAGE, "norms"),
        (lambda b, x: linear(b, b(aten.mul.Tensor, x, 0.3), Q, BIAS), X, "scales"),
        (lambda b, x: linear(b, b(aten.div.Tensor, x, randn(3)), Q), X, "scales"),
        (lambda b, x: linear(b, b(aten.mul.Tensor, randn(3), x), Q), X, "scales"),
        (lambda b, x: linear(b, b(aten.add.Tensor, x, randn(1, 3)), Q), X, "scales"),
        (lambda b, x: linear(b, b(aten.sub.Tensor, x, 1.5), Q, BIAS), X, "scales"),
        (lambda b, x: padded(b, b(aten.mul.Tensor, x, randn(3, 1, 1))), IMAGE, "scales"),
        (lambda b, x: one_by_one(b, b(aten.sub.Tensor, x, randn(3, 1, 1))), IMAGE, "scales"),
        (lambda b, x: flat(b, b(aten.mul.Tensor, x, randn(3, 1, 1))), IMAGE, "scales"),
        (
            lambda b, x: linear(
                b, b(aten.unsqueeze.default, b(aten.mul.Tensor, x, randn(3)), 1), Q
            ),
            *(X, "scales"),
        ),
    ],
)
def test_what_is_folded_into_the_next_layer(make, sample, folded):
    _, record = fuse(make, sample, only="scales", atol=3e-5)
    name = {"norms": "norms folded", "scales": "scales in front folded"}[folded]
    assert record.notes == {name: 1}


def test_a_weight_behind_equal_norms_is_stored_once():
    def make(b, x):
        return [linear(b, norm(b, y), Q) for y in (x, b(aten.exp.default, x))]

    _, record = fuse(make, only="scales", atol=1e-5)
    assert record.notes == {"norms folded": 2}
    assert record.after.parameters == 12 + 4


@pytest.mark.parametrize(
    ("make", "sample"),
    [
        # Something else reads the result, too.
        (lambda b, x: (lambda y: [linear(b, y, Q), b(aten.exp.default, y)])(norm(b, x)), X),
        (lambda b, x: (lambda y: [linear(b, y, Q), y])(norm(b, x)), X),
        (lambda b, x: linear(b, b(aten.silu.default, norm(b, x)), Q), X),
        # Zeros at the border are not shifted.
        (lambda b, x: padded(b, group_norm(b, x)), IMAGE),
        (lambda b, x: padded(b, b(aten.add.Tensor, x, 1.0)), IMAGE),
        # The constants are not those of the layer's channels.
        (lambda b, x: linear(b, b(aten.mul.Tensor, x, randn(2, 1)), Q), X),
        (lambda b, x: linear(b, group_norm(b, x), parameter(5, 4)), IMAGE),
        (lambda b, x: conv(b, norm(b, x), parameter(4, 3, 1, 1)), randn(1, 3, 4, 3)),
        (lambda b, x: linear(b, b(aten.mul.Tensor, x, b(aten.exp.default, x)), Q), X),
        (lambda b, x: linear(b, b(aten.add.Tensor, x, 1.0, alpha=2), Q), X),
        (lambda b, x: linear(b, b(aten.sub.Tensor, 1.0, x), Q), X),
        # Groups, half precision, a norm without weights, one of two dimensions.
        (
            lambda b, x: conv(b, group_norm(b, x), parameter(3, 1, 1, 1), None, [1], [0], [1], 3),
            IMAGE,
        ),
        (
            lambda b, x: linear(b, norm(b, x, NORM.half(), SHIFT.half()), Q.detach().half()),
            X.half(),
        ),
        (lambda b, x: linear(b, norm(b, x, None, None), Q), X),
        (
            lambda b, x: linear(b, b(aten.layer_norm.default, x, [2, 3], parameter(2, 3), None), Q),
            X,
        ),
    ],
)
def test_what_is_not_folded_into_the_next_layer(make, sample):
    _, record = fuse(make, sample, only="scales")
    assert not record.changed
    assert record.skipped == []


def shared_weight(b, x):
    return [linear(b, norm(b, x), Q), linear(b, b(aten.exp.default, x), Q)]


def shared_by_another_norm(b, x):
    return [linear(b, norm(b, x, parameter(3, seed=s)), Q) for s in range(2)]


def one_of_two(b, x):
    y = norm(b, x)
    return [linear(b, y, Q), linear(b, y, K), b(aten.exp.default, K)]


def infinite(b, x):
    return linear(b, b(aten.mul.Tensor, x, 1e39), Q)


USED = "the next layer's weight is also used in another way"


@pytest.mark.parametrize(
    ("make", "reasons"),
    [
        (shared_weight, [f"layer_norm_default: {USED}"]),
        (
            shared_by_another_norm,
            [f"layer_norm_default: {USED}", f"layer_norm_default_1: {USED}"],
        ),
        (one_of_two, [f"layer_norm_default: {USED}"]),
        (infinite, ["mul_tensor: the next layer's new weights would not be finite"]),
    ],
)
def test_weights_that_a_norm_is_not_folded_into(make, reasons):
    _, record = fuse(make, only="scales")
    assert not record.changed
    assert record.skipped == reasons


# Real blocks


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(8, 8, bias=i == 0) for i in range(3))
        self.out = torch.nn.Linear(8, 8)

    def forward(self, x):
        heads = [
            layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        ]
        y = torch.nn.functional.scaled_dot_product_attention(heads[0] * 0.5, *heads[1:])
        return x + self.out(y.transpose(1, 2).flatten(2)) * 0.7


def test_an_attention_block():
    torch.manual_seed(0)
    block = Attention()

    def loop(x):
        return block(x).cos()

    loop.components = {"block": block}
    built = trace_function(loop, randn(2, 5, 8))
    _, record = check_pass("fuse(steps=false)", built, atol=LAST_PLACES)
    assert record.notes == {"scales folded": 2, "linears merged": 2}
    assert record.max_abs <= LAST_PLACES


def test_peft():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=False)
    block = peft.inject_adapter_in_model(config, Attention()).eval()

    def loop(x):
        return block(x).cos()

    loop.components = {"block": block}
    built = trace_function(loop, randn(2, 5, 8))
    text, record = check_pass("simplify,fuse(steps=false)", built, atol=LAST_PLACES)
    assert record.notes["LoRA merged"] == 2
    assert text.count("aten.linear") == 2


def test_steps():
    class Denoiser(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 3)

        def forward(self, x, t):
            return self.layer(x).tanh() * t

    denoiser = Denoiser()

    def loop(x):
        for step in range(3):
            t = torch.tensor(float(step))
            x = x - denoiser(x, t) * (t + 1)
        return x

    loop.components = {"denoiser": denoiser}
    text, _ = check_pass("fuse", trace_function(loop, X), atol=LAST_PLACES)
    root = text.partition("\n\n")[0]
    assert root.count("denoiser_step(") == 3
    assert "aten." not in root
