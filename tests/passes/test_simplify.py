"""What `simplify` drops, shares and evaluates, and what it must leave alone."""

import operator

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

from diffopt.core import Pipeline, Record
from diffopt.ir import graph as g
from diffopt.ir.program import Program
from diffopt.testing import check_pass
from tests.passes.build import Make, body, parameter, program, randn

aten = torch.ops.aten

X = randn(2, 3)
ONE = torch.tensor(1.0)


def simplify(make: Make, *samples: Tensor, step: str = "simplify", **parts) -> tuple[str, Record]:
    return check_pass(step, program(make, *(samples or (X,)), **parts))


def run(built: Program, step: str = "simplify") -> Program:
    return Pipeline.parse(step).run(built)


# Main rewrites


def test_no_ops_and_equal_nodes():
    def make(b, x):
        once = b(aten.exp.default, b(aten.mul.Tensor, x, 1.0))
        return b(aten.add.Tensor, once, b(aten.exp.default, x))

    text, record = simplify(make)
    assert_expected_inline(
        text,
        """\
%x: float32[2,3]
%1: float32[2,3] = aten.exp(%x)
%2: float32[2,3] = aten.add.Tensor(%1, %1)
return %2""",
    )
    assert record.notes == {"no-ops": 1, "equal nodes": 1}


def test_chains_of_views():
    def make(b, x):
        back = b(aten.permute.default, b(aten.permute.default, x, [1, 2, 0]), [2, 0, 1])
        flat = b(aten.view.default, b(aten.view.default, back, [24]), [6, 4])
        transposed = b(aten.transpose.int, b(aten.permute.default, x, [2, 0, 1]), 0, 1)
        single = b(aten.squeeze.dim, b(aten.unsqueeze.default, x, 1), 1)
        return [b(aten.exp.default, value) for value in (flat, transposed, single)]

    text, _ = simplify(make, randn(2, 3, 4))
    assert_expected_inline(
        text,
        """\
%x: float32[2,3,4]
%1: float32[6,4] = aten.view(%x, [6, 4])
%2: float32[2,4,3] = aten.permute(%x, [0, 2, 1])
%3: float32[6,4] = aten.exp(%1)
%4: float32[2,4,3] = aten.exp(%2)
%5: float32[2,3,4] = aten.exp(%x)
return %3, %4, %5""",
    )


def test_constants():
    def make(b, x):
        steps = b(aten.arange.start, 0, 3, dtype=torch.float32)
        row = b(aten.unsqueeze.default, b(aten.cos.default, steps), 0)
        return b(aten.mul.Tensor, x, b(aten.add.Tensor, row, torch.ones(1)))

    text, record = simplify(make)
    assert_expected_inline(
        text,
        """\
%x: float32[2,3]
%1: float32[1,3] = constant_add_tensor
%2: float32[2,3] = aten.mul.Tensor(%x, %1)
return %2""",
    )
    assert record.notes == {"constants": 1}


def test_what_components_take_and_return():
    def make(b, x, unused, y):
        total = b(aten.add.Tensor, x, y)
        return [b(aten.exp.default, total), b(aten.cos.default, x), total, x, total]

    part = body(make, X, X, X)

    def loop(b, x):
        first = b.call("part", x, x, ONE.expand(2, 3).clone())
        second = b.call("part", first[0], x, first[0])
        third = b.call("part", b(aten.add.Tensor, second[2], second[3]), x, second[4])
        return third[0]

    text, record = simplify(loop, part=part)
    assert_expected_inline(
        text,
        """\
program:
  %x: float32[2,3]
  %1: float32[2,3] = constant
  %2: (float32[2,3], float32[2,3]) = part(%x, %1)
  %3: float32[2,3] = operator.getitem(%2, 0)
  %4: (float32[2,3], float32[2,3]) = part(%3, %3)
  %5: float32[2,3] = operator.getitem(%4, 1)
  %6: float32[2,3] = aten.add.Tensor(%5, %3)
  %7: (float32[2,3], float32[2,3]) = part(%6, %5)
  %8: float32[2,3] = operator.getitem(%7, 0)
  return %8

component part:
  %x0: float32[2,3]
  %x2: float32[2,3]
  %2: float32[2,3] = aten.add.Tensor(%x0, %x2)
  %3: float32[2,3] = aten.exp(%2)
  return %3, %2""",
    )
    assert record.notes == {"outputs": 3, "arguments": 1, "equal nodes": 1}


def test_arguments_that_are_the_same_in_every_call():
    part = body(lambda b, x, y, c: b(aten.add.Tensor, b(aten.mul.Tensor, x, y), c), X, X, X)
    constant = randn(2, 3, seed=1)

    def loop(b, x):
        once = b.call("part", x, x, constant)[0]
        return b.call("part", once, once, constant)[0]

    text, record = simplify(loop, part=part)
    assert_expected_inline(
        text.partition("\n\n")[2],
        """\
component part:
  %x0: float32[2,3]
  %1: float32[2,3] = constant
  %2: float32[2,3] = aten.mul.Tensor(%x0, %x0)
  %3: float32[2,3] = aten.add.Tensor(%2, %1)
  return %3""",
    )
    assert record.notes == {"arguments": 2}


def test_equal_calls_and_components():
    weight = parameter(3, 3)

    def make(b, x):
        return b(aten.linear.default, x, b.weight(weight, name="first"))

    def again(b, x):
        return b(aten.linear.default, x, b.weight(weight, name="second"))

    def loop(b, x):
        results = [b.call(name, x)[0] for name in ("one", "two", "one")]
        return b(aten.cat.default, results)

    text, record = simplify(loop, one=body(make, X), two=body(again, X))
    assert_expected_inline(
        text.partition("\n\n")[0],
        """\
program:
  %x: float32[2,3]
  %1: (float32[2,3]) = one(%x)
  %2: float32[2,3] = operator.getitem(%1, 0)
  %3: float32[6,3] = aten.cat([%2, %2, %2])
  return %3""",
    )
    assert record.notes["components"] == 1
    assert record.after.parameters == 9


def test_a_call_on_constants_is_evaluated():
    part = body(lambda b, x: b(aten.exp.default, x), X)

    def make(b, x):
        return b(aten.add.Tensor, x, b.call("part", ONE.expand(2, 3).clone())[0])

    text, record = simplify(make, part=part)
    assert text.splitlines()[1] == "%1: float32[2,3] = constant_getitem"
    assert record.notes == {"constants": 1}


def test_equal_constants_are_stored_once():
    def make(b, x):
        negative = torch.tensor([0.0, -0.0, 0.0])
        values = [torch.zeros(3), torch.zeros(3), negative, torch.zeros(3, dtype=torch.int32)]
        return [b(aten.add.Tensor, x, value) for value in values]

    _, record = simplify(make)
    assert record.notes == {"equal constants": 1, "equal nodes": 2}
    assert record.after.parameters == 9


def test_dead_code_goes():
    part = body(lambda b, x: b(aten.exp.default, x), X)

    def make(b, x):
        b.call("part", x)
        b(aten.add.Tensor, x, parameter(3))
        return b(aten.cos.default, x)

    result = run(program(make, X, part=part))
    assert str(result).count("\n") == 3
    assert not result.components
    assert not result.weights()


# No-ops


@pytest.mark.parametrize(
    "make",
    [
        lambda b, x: b(aten.dropout.default, x, 0.5, False),
        lambda b, x: b(operator.getitem, b(aten.native_dropout.default, x, 0.5, False), 0),
        lambda b, x: b(aten.alias.default, x),
        lambda b, x: b(aten.detach.default, x),
        lambda b, x: b(aten._to_copy.default, x, dtype=torch.float32),
        lambda b, x: b(aten.to.dtype, x, torch.float32),
        lambda b, x: b(aten.clone.default, x, memory_format=torch.contiguous_format),
        lambda b, x: b(aten.contiguous.default, x),
        lambda b, x: b(aten.view.default, x, [2, -1]),
        lambda b, x: b(aten.expand.default, x, [-1, 3]),
        lambda b, x: b(aten.permute.default, x, [0, 1]),
        lambda b, x: b(aten.transpose.int, x, -1, 1),
        lambda b, x: b(aten.slice.Tensor, x, 0, 0, 9223372036854775807),
        lambda b, x: b(aten.repeat.default, x, [1, 1]),
        lambda b, x: b(aten.constant_pad_nd.default, x, [0, 0]),
        lambda b, x: b(aten.cat.default, [x]),
        lambda b, x: b(operator.getitem, b(aten.split.Tensor, x, 2), 0),
        lambda b, x: b(operator.getitem, b(aten.unsafe_split.Tensor, x, 2), 0),
        lambda b, x: b(aten.mul.Tensor, x, 1),
        lambda b, x: b(aten.mul.Tensor, torch.ones(2, 3), x),
        lambda b, x: b(aten.div.Tensor, x, torch.tensor(1.0)),
        lambda b, x: b(aten.pow.Tensor_Scalar, x, 1),
        lambda b, x: b(aten.sub.Tensor, x, 0),
        lambda b, x: b(aten.sub.Tensor, x, torch.zeros(3)),
        lambda b, x: b(aten.add.Tensor, x, -0.0),
    ],
)
def test_a_no_op(make):
    special = torch.tensor([[-0.0, 0.0, 1.5], [float("inf"), float("nan"), 1e-40]])
    text, record = simplify(lambda b, x: b(aten.neg.default, make(b, x)), special)
    assert text.splitlines()[1:] == ["%1: float32[2,3] = aten.neg(%x)", "return %1"]
    assert record.notes == {"no-ops": 1}


def test_a_cast_there_and_back():
    def make(b, x):
        wide = b(aten._to_copy.default, x, dtype=torch.float32)
        return b(aten.neg.default, b(aten._to_copy.default, wide, dtype=torch.bfloat16))

    _, record = simplify(make, X.bfloat16())
    assert record.notes == {"no-ops": 1}


def test_adding_an_integer_zero():
    def make(b, x):
        return b(aten.neg.default, b(aten.add.Tensor, x, 0))

    _, record = simplify(make, torch.arange(3))
    assert record.notes == {"no-ops": 1}


# Guards


@pytest.mark.parametrize(
    "make",
    [
        lambda b, x: b(aten.dropout.default, x, 0.0, True),
        lambda b, x: b(aten.add.Tensor, x, 0.0),
        lambda b, x: b(aten.sub.Tensor, x, -0.0),
        lambda b, x: b(aten.sub.Tensor, x, 0, alpha=2),
        lambda b, x: b(aten.mul.Tensor, x, 1 + 1e-6),
        lambda b, x: b(aten.mul.Tensor, x, torch.tensor([1.0, 1.0, 2.0])),
        lambda b, x: b(aten.mul.Tensor, x, torch.ones(1, 2, 3)),
        lambda b, x: b(aten.mul.Tensor, x, torch.ones((), dtype=torch.float64).expand(2, 3)),
        lambda b, x: b(aten.mul.Tensor, x, parameter(2, 3)),
        lambda b, x: b(aten.constant_pad_nd.default, x, [1, -1]),
        lambda b, x: b(aten.repeat.default, x, [1, 2]),
        lambda b, x: b(aten.slice.Tensor, x, 0, 1, 2),
        lambda b, x: b(aten.expand.default, b(aten.unsqueeze.default, x, 0), [2, -1, -1]),
        lambda b, x: b(aten.transpose.int, x, 0, 1),
        lambda b, x: b(operator.getitem, b(aten.split.Tensor, x, 1), 1),
        lambda b, x: b(aten.contiguous.default, b(aten.transpose.int, x, 0, 1)),
        lambda b, x: b(aten.exp.default, b(aten._to_copy.default, x, dtype=torch.float64)),
    ],
)
def test_what_is_no_no_op(make):
    _, record = simplify(lambda b, x: b(aten.neg.default, make(b, x)))
    assert not record.changed
    assert record.skipped == []


def test_a_copy_that_is_read_by_places_in_memory_stays():
    def make(b, x):
        part = b(aten.slice.Tensor, x, 0, 1, 2)
        own = b(aten.clone.default, part, memory_format=torch.contiguous_format)
        return b(aten.as_strided.default, own, [2], [1], 1)

    _, record = simplify(make, torch.arange(6.0).reshape(2, 3))
    assert not record.changed


@pytest.mark.parametrize(
    ("start", "between"),
    [
        (torch.float32, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.int64, torch.float32),
        (torch.float32, torch.int64),
    ],
)
def test_a_cast_that_loses_bits_stays(start, between):
    def make(b, x):
        there = b(aten._to_copy.default, x, dtype=between)
        return b(aten.neg.default, b(aten._to_copy.default, there, dtype=start))

    _, record = simplify(make, (X * 1e3).to(start))
    assert not record.changed


def test_views_that_no_single_view_gives():
    def make(b, x):
        flat = b(aten.reshape.default, b(aten.transpose.int, x, 0, 1), [6])  # copies
        part = b(aten.slice.Tensor, b(aten.slice.Tensor, x, 0, 1, 2), 1, 1, 3)
        transposed = b(aten.permute.default, b(aten.view.default, x, [2, 3, 1]), [1, 0, 2])
        values = (b(aten.view.default, flat, [3, 2]), part, transposed)
        return [b(aten.exp.default, value) for value in values]

    _, record = simplify(make)
    assert not record.changed


def test_a_chain_back_to_other_memory_stays():
    def make(b, x):
        second = b(aten.slice.Tensor, x, 0, 1, 2)
        rows = b(aten.expand.default, second, [2, 3])
        return b(aten.exp.default, b(aten.slice.Tensor, rows, 0, 0, 1))

    text, _ = simplify(make)
    assert "aten.slice.Tensor(%x, 0, 1, 2)" in text


def test_random_operators_are_not_shared():
    def make(b, x):
        first, second = (b(aten.bernoulli.p, b(aten.mul.Tensor, x, 0.0), 1.0) for _ in range(2))
        return b(aten.add.Tensor, first, second)

    text, _ = simplify(make)
    assert text.count("bernoulli") == 2


def test_numbers_of_other_types_are_not_shared():
    def make(b, x):
        return [b(aten.mul.Tensor, x, number) for number in (2, 2.0, 0.0, -0.0)]

    _, record = simplify(make)
    assert not record.changed


def test_a_large_constant_stays_an_operator():
    def make(b, x):
        table = b(aten.repeat.default, b(aten.cos.default, randn(1, 3)), [200_000, 1])
        return b(aten.sum.default, b(aten.mul.Tensor, table, b(aten.slice.Tensor, x, 0, 0, 1)))

    text, record = simplify(make, step="simplify(max-constant-mb=1)")
    assert record.skipped == [
        "repeat_default: the constant would take 2.29 MB, over max-constant-mb"
    ]
    assert text.splitlines()[2] == "%2: float32[200000,3] = aten.repeat(%1, [200000, 1])"
    assert record.notes == {"constants": 1}


def test_what_is_smaller_than_its_source_is_evaluated():
    def make(b, x):
        return b(aten.add.Tensor, x, b(aten.sum.default, randn(10)))

    _, record = simplify(make, step="simplify(max-constant-mb=0)")
    assert record.notes == {"constants": 1}


def test_a_view_of_a_weight_stays_a_view():
    def make(b, x):
        weight = parameter(4, 3)
        return [b(aten.mm.default, x, b(aten.t.default, weight)), b(aten.add.Tensor, x, weight[:1])]

    _, record = simplify(make)
    assert not record.changed


@pytest.mark.parametrize(
    "make",
    [
        lambda b, x: b(aten.clone.default, x),
        lambda b, x: b(aten.clone.default, b(aten.view.default, x, [3, 2])),
        lambda b, x: b(aten.clone.default, b.weight(parameter(2))),
        lambda b, x: b(aten.clone.default, b(aten.slice.Tensor, randn(2, 3), 1, 0, 2)),
        lambda b, x: (lambda y: [y, b(aten.clone.default, y)])(b(aten.exp.default, x)),
    ],
)
def test_a_copy_that_keeps_an_output_apart_stays(make):
    _, record = simplify(make)
    assert not record.changed
    assert record.skipped == ["clone_default: without this copy an output would share memory"]


def test_outputs_that_come_to_share_memory_are_copied():
    part = body(lambda b, x: b(aten.clone.default, x), X)

    def make(b, x):
        one, other = (b(aten.exp.default, x) for _ in range(2))
        return [one, other, b(aten.mul.Tensor, x, 1.0), *b.call("part", x)]

    text, record = simplify(make, part=part)
    assert_expected_inline(
        text,
        """\
%x: float32[2,3]
%1: float32[2,3] = aten.exp(%x)
%2: float32[2,3] = aten.clone(%1)
%3: float32[2,3] = aten.clone(%x)
%4: float32[2,3] = aten.clone(%x)
return %1, %2, %3, %4""",
    )
    assert record.notes == {"no-ops": 2, "equal nodes": 1, "outputs": 1, "arguments": 1}


def test_components_that_differ_stay():
    def make(weight, strided=X):
        return body(lambda b, x: b(aten.linear.default, x, weight), strided)

    shared = parameter(3, 3)
    parts = {"one": make(shared), "two": make(parameter(3, 3))}

    def loop(b, x):
        return b(aten.add.Tensor, b.call("one", x)[0], b.call("two", x)[0])

    _, record = simplify(loop, **parts)
    assert not record.changed


def test_arguments_that_differ_in_one_call_stay():
    part = body(lambda b, x, y: b(aten.mul.Tensor, x, y), X, X)

    def loop(b, x):
        once = b.call("part", x, x)[0]
        return b.call("part", once, x)[0]

    _, record = simplify(loop, part=part)
    assert not record.changed


def test_inputs_of_the_program_stay():
    built = run(program(lambda b, x, y: b(aten.exp.default, y), X, X))
    assert [node.name for node in g.placeholders(built.root)] == ["x0", "x1"]


# Real blocks


def test_an_attention_block():
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.LayerNorm(8)
            self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
            self.dropout = torch.nn.Dropout(0.5)

        def forward(self, x):
            y = self.norm(x)
            y = self.attention(y, y, y, need_weights=False)[0]
            return x + self.dropout(y) / 1.0

    block = Attention().eval()

    def loop(x):
        return block(block(x)) * 1.0

    loop.components = {"block": block}
    _, record = check_pass("simplify", loop, randn(1, 4, 8))
    assert record.after.nodes < record.before.nodes
    assert record.max_abs == 0
