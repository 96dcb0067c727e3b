"""Random programs stay what they are under random pipelines of the exact passes.

Every value has the shape of the input, so that any operator can follow any other; weights come from
a small pool, so that components share them.
"""

import operator
from typing import Any

import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import fx

from diffopt.core import Pipeline, Record
from diffopt.ir.program import Program
from tests.passes.build import Builder, body, parameter, program, randn

aten = torch.ops.aten

SHAPE = (2, 4)
WEIGHTS = [torch.nn.Parameter(parameter(4, 4, seed=i) / 2, requires_grad=False) for i in range(4)]
DOWN = [parameter(2, 4, seed=10 + i) for i in range(2)]
UP = [parameter(4, 2, seed=20 + i) for i in range(2)]
VECTORS = [None, parameter(4, seed=30), parameter(4, seed=31)]
CONSTANTS = [
    *(torch.ones(4), torch.zeros(4), torch.zeros(4), -torch.zeros(4), torch.tensor(1.0)),
    *(torch.tensor(0.3), randn(2, 4), randn(4), randn(2, 1)),
]
NUMBERS = [1, 1.0, 2, 0.5, 0.0, -0.0, -1.5]

Op = tuple[str, int, int, int]


def linear(b: Builder, x: Any, y: Any, n: int) -> Any:
    bias = VECTORS[n % len(VECTORS)]
    more = [] if bias is None else [bias]
    return b(aten.linear.default, x, WEIGHTS[n % len(WEIGHTS)], *more)


def three_linears(b: Builder, x: Any, y: Any, n: int) -> Any:
    one, two, three = (linear(b, x, y, n + i) for i in range(3))
    return b(aten.add.Tensor, b(aten.mul.Tensor, one, b(aten.tanh.default, two)), three)


def lora(b: Builder, x: Any, y: Any, n: int) -> Any:
    low = b(aten.linear.default, b(aten.linear.default, x, DOWN[n % 2]), UP[n % 2])
    return b(aten.add.Tensor, linear(b, x, y, n), b(aten.mul.Tensor, low, NUMBERS[n % 7]))


def scale(b: Builder, x: Any, y: Any, n: int) -> Any:
    target = [aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor][n % 3]
    return b(target, x, NUMBERS[n % len(NUMBERS)])


def divide(b: Builder, x: Any, y: Any, n: int) -> Any:
    return b(aten.div.Tensor, x, NUMBERS[n % 4])


def constant(b: Builder, x: Any, y: Any, n: int) -> Any:
    target = [aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor][n % 3]
    value = b.weight(CONSTANTS[n % len(CONSTANTS)])
    if n % 2:
        value = b(aten.cos.default, value)
    return b(target, value, x) if n % 4 == 0 else b(target, x, value)


def combine(b: Builder, x: Any, y: Any, n: int) -> Any:
    return b([aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor][n % 3], x, y)


def unary(b: Builder, x: Any, y: Any, n: int) -> Any:
    return b([aten.tanh.default, aten.silu.default, aten.cos.default][n % 3], x)


def norm(b: Builder, x: Any, y: Any, n: int) -> Any:
    if n % 2:
        return b(aten.layer_norm.default, x, [4], VECTORS[1], VECTORS[2], 0.1)
    return b(aten.group_norm.default, x, 2, None, None, 0.1)


def nothing(b: Builder, x: Any, y: Any, n: int) -> Any:
    forms = [
        lambda: b(aten.clone.default, x),
        lambda: b(aten.dropout.default, x, 0.5, False),
        lambda: b(aten._to_copy.default, x, dtype=torch.float32),
        lambda: b(aten.slice.Tensor, x, 0, 0, 2),
        lambda: b(aten.contiguous.default, x),
        lambda: b(operator.getitem, b(aten.split.Tensor, x, 4, 1), 0),
    ]
    return forms[n % len(forms)]()


def views(b: Builder, x: Any, y: Any, n: int) -> Any:
    forms = [
        lambda: b(aten.reshape.default, b(aten.reshape.default, x, [4, 2]), [2, 4]),
        lambda: b(aten.permute.default, b(aten.transpose.int, x, 0, 1), [1, 0]),
        lambda: b(aten.squeeze.dim, b(aten.unsqueeze.default, x, 1), 1),
        lambda: b(aten.reshape.default, b(aten.t.default, x), [2, 4]),
        lambda: b(aten.t.default, b(aten.clone.default, b(aten.t.default, x))),
        lambda: b(aten.expand.default, b(aten.slice.Tensor, x, 0, 1, 2), [2, 4]),
    ]
    return forms[n % len(forms)]()


def cat(b: Builder, x: Any, y: Any, n: int) -> Any:
    both = b(aten.cat.default, [x, y], n % 2)
    if n % 3:
        return b(aten.slice.Tensor, both, n % 2, 1, 1 + SHAPE[n % 2])
    return b(operator.getitem, b(aten.chunk.default, both, 2, n % 2), 1)


OPS = {
    f.__name__: f
    for f in (
        *(linear, three_linears, lora, scale, divide, constant, combine, unary, norm, nothing),
        *(views, cat),
    )
}

small = st.integers(0, 11)
ops = st.lists(st.tuples(st.sampled_from(sorted(OPS)), small, small, small), min_size=1, max_size=6)
bodies = st.lists(st.tuples(ops, st.lists(small, min_size=1, max_size=3)), min_size=1, max_size=2)
# A step: which component it calls, its arguments, and what happens to the results.
steps = st.lists(st.tuples(small, st.tuples(small, small), ops), min_size=1, max_size=3)


def pipelines(*passes: str) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(passes), min_size=1, max_size=3).map(",".join)


def apply(b: Builder, values: list[fx.Node], rows: list[Op]) -> list[fx.Node]:
    """Add operators whose operands count back from the latest value."""
    for name, i, j, n in rows:
        x, y = (values[-1 - k % len(values)] for k in (i // 2, j))
        values = [*values, OPS[name](b, x, y, n)]
    return values


def make(parts: Any, loop: Any, results: list[int]) -> Program:
    components = {}
    for index, (rows, outs) in enumerate(parts):

        def inner(b: Builder, *takes: fx.Node, rows: Any = rows, outs: Any = outs) -> Any:
            values = apply(b, list(takes), rows)
            return [values[-1 - k % len(values)] for k in outs]

        components[f"part{index}"] = body(inner, randn(*SHAPE), randn(*SHAPE), randn(*SHAPE))

    def outer(b: Builder, *inputs: fx.Node) -> Any:
        values = list(inputs)
        for number, (part, operands, rows) in enumerate(loop):
            x, y = (values[-1 - k % len(values)] for k in operands)
            step = torch.full(SHAPE, float(number))
            values += b.call(f"part{part % len(parts)}", x, y, step)
            values = apply(b, values, rows)
        return [values[-1 - k % len(values)] for k in results]

    return program(outer, randn(*SHAPE), randn(*SHAPE, seed=1), **components)


def check(built: Program, text: str) -> None:
    """Run passes, each of which is checked with numbers and verified; end with `simplify`."""
    note(str(built))
    result = Pipeline.parse(text).run(built)
    note(str(result))
    done = Pipeline.parse("simplify,simplify").run(result)
    assert not Record.from_json(done.history[-1]).changed, "simplify is not done after one run"


results = st.lists(small, min_size=1, max_size=3)
fusions = pipelines("simplify", "fuse(steps=false)", "fuse(lora=false,scales=false,steps=false)")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(bodies, steps, results, fusions)
def test_simplify_and_fuse(parts: Any, loop: Any, outs: list[int], text: str) -> None:
    check(make(parts, loop, outs), text)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(bodies, steps, results, pipelines("simplify", "fuse", "hoist", "unroll"))
def test_all_exact_passes(parts: Any, loop: Any, outs: list[int], text: str) -> None:
    check(make(parts, loop, outs), text)
