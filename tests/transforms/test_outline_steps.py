"""What all steps have in common as one body, and the rest around its calls."""

import operator
from typing import Any

import pytest
import torch
from torch import fx

import diffopt
from diffopt.core import Context, Pipeline
from diffopt.ir import graph as g
from diffopt.ir.printing import target_name
from diffopt.ir.program import Program
from diffopt.transforms.outline_steps import outline_steps
from tests import loops
from tests.passes import build
from tests.zoo import scheduler_case

aten = torch.ops.aten
X = build.randn(1, 3)


def outlined(passes: str, **more: object) -> tuple[Program, Context]:
    return outline(Pipeline.parse(passes).run(loops.program(**more)))


def outline(before: Program) -> tuple[Program, Context]:
    """Outline; check the result, and that there is nothing more to do."""
    program, ctx = before.clone(), Context()
    program.refresh()
    outline_steps(program, ctx)
    program.refresh()
    program.verify()
    arguments = [node for call in program.calls() for node in call.all_input_nodes]
    assert all(isinstance(node.meta["val"], torch.Tensor) for node in arguments)
    for one, other in zip(before.run(before.sample), program.run(before.sample), strict=True):
        assert torch.equal(one, other)
    again = program.clone()
    outline_steps(again, Context())
    again.refresh()
    assert again.fingerprint() == program.fingerprint()
    return program, ctx


def bodies_with(program: Program, weight: str) -> list[str]:
    """Return the components that hold a weight."""
    bodies = program.components.items()
    return [name for name, gm in bodies if any(weight in key for key, _ in g.named_tensors(gm))]


def test_every_step_is_one_call_of_one_body() -> None:
    program, ctx = outlined("unroll,hoist,simplify")
    assert ctx.notes == {"steps outlined": 4}
    assert ctx.skipped == []
    assert len(program.calls("denoiser_step")) == 4
    assert "denoiser" not in program.components
    after = list(program.root.graph.nodes)[
        list(program.root.graph.nodes).index(program.calls("denoiser_step")[0]) :
    ]
    # Between the steps nothing is left but their rows of tables and their results.
    left = {str(n.target) for n in after if n.op == "call_function"} - {"aten.select.int"}
    assert left == {"<built-in function getitem>", "aten.tanh.default"}


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("passes", ["unroll", "unroll,hoist,simplify"])
def test_outputs_are_equal_for_new_inputs(passes: str, order: int) -> None:
    program, _ = outlined(passes, order=order)
    expected = loops.Loop()(**loops.arguments(seed=9, order=order))
    torch.testing.assert_close(program(**loops.arguments(seed=9)), expected, rtol=0, atol=1e-5)


def test_the_denoiser_of_a_multistep_solver_is_in_one_body() -> None:
    few, ctx = outlined("unroll,hoist,simplify", order=2, steps=5)
    assert ctx.skipped == [
        "steps: 4 of 5 have nodes that not all have, up to 6: these stay outside of the shared body"
    ]
    assert bodies_with(few, "query_weight") == ["denoiser_step"]
    assert len(few.calls("denoiser_step")) == 5
    many, _ = outlined("unroll,hoist,simplify", order=2, steps=20)
    assert list(few.components) == list(many.components)
    bodies = [program.components["denoiser_step"] for program in (few, many)]
    assert len(bodies[0].graph.nodes) == len(bodies[1].graph.nodes)


@pytest.mark.parametrize("scheduler", ["ddpm", "heun", "unipc", "dpm++-3m"])
def test_the_denoiser_of_a_pipeline_is_in_one_body(scheduler: str) -> None:
    case = scheduler_case(scheduler)
    program = diffopt.trace(case.build(), **case.inputs(0))
    calls = len(program.calls("unet"))
    result, ctx = outline(Pipeline.parse("unroll,hoist,simplify").run(program))
    assert bodies_with(result, "downsamplers") == ["unet_step"]
    assert len(result.calls("unet_step")) == calls
    assert len(ctx.skipped) == 1  # what differs from step to step


# Written down node by node


def chain(b: Any, calls: list[fx.Node], x: fx.Node) -> fx.Node:
    """Return x after as many rounds as there are functions from the results of a call to x."""
    for follow in calls:
        x = follow(b, x, b.call("denoiser", x))
    return x


DENOISER = build.body(
    lambda b, x: [b(aten.linear.default, x, build.parameter(3, 3)), b(aten.exp.default, x)], X
)


def add(b: Any, x: Any, results: Any) -> fx.Node:
    return b(aten.add.Tensor, x, results[0])


def add_both(b: Any, x: Any, results: Any) -> fx.Node:
    return b(aten.add.Tensor, b(aten.add.Tensor, x, results[0]), results[1])


def add_sine_between(b: Any, x: Any, results: Any) -> fx.Node:
    return b(aten.add.Tensor, x, b(aten.sin.default, results[0]))


def run(*follow: Any) -> tuple[Program, Context]:
    program = build.program(lambda b, x: chain(b, follow, x), X, denoiser=DENOISER)
    return outline(program)


def test_a_result_that_only_some_steps_use() -> None:
    program, _ = run(add, add_both, add, add)
    assert len(program.calls("denoiser_step")) == 4
    body = program.components["denoiser_step"]
    assert [target_name(n) for n in g.outputs(body)] == ["aten.exp", "aten.add.Tensor"]


def test_a_value_that_leaves_the_common_part_does_not_come_back() -> None:
    program, ctx = run(add, add, add_sine_between, add)
    assert ctx.skipped == ["steps: they have nothing in common but the call"]
    assert len(program.calls("denoiser")) == 4


@pytest.mark.parametrize(("twice", "calls"), [([0], 4), ([3], 4), ([1, 2], 0)])
def test_a_call_that_gets_one_value_for_two_arguments(twice: list[int], calls: int) -> None:
    def denoiser(b: Any, x: Any, y: Any) -> fx.Node:
        linear = b(aten.linear.default, x, build.parameter(3, 3))
        return b(aten.add.Tensor, linear, b(aten.exp.default, y))

    def loop(b: Any, x: Any) -> list[fx.Node]:
        values = [x, x]
        for step in range(4):
            (result,) = b.call("denoiser", values[-1], values[-1 if step in twice else -2])
            values.append(b(aten.mul.Tensor, result, 0.1))
        return values[2:]

    program, _ = outline(build.program(loop, X, denoiser=build.body(denoiser, X, X)))
    assert len(program.calls("denoiser_step")) == calls


@pytest.mark.parametrize("other", [False, True])
def test_a_tuple_before_the_call(other: bool) -> None:
    def loop(b: Any, x: Any) -> fx.Node:
        for step in range(3):
            parts = b(aten.split.Tensor, x, 1, 1)
            if other and step == 1:  # the values are of equal types, their tuple is another node
                parts = b(aten.split_with_sizes.default, x, [1, 1, 1], 1)
            permuted = [b(operator.getitem, parts, i) for i in (1, 2, 0)]
            result = b.call("denoiser", b(aten.cat.default, permuted, 1))[0]
            x = b(aten.add.Tensor, x, result)
        return x

    program, _ = outline(build.program(loop, X, denoiser=DENOISER))
    assert len(program.calls("denoiser_step")) == 3


def test_a_value_of_a_tuple_that_the_next_step_takes() -> None:
    def loop(b: Any, x: Any) -> fx.Node:
        for _ in range(4):
            result = b.call("denoiser", x)[0]
            parts = b(aten.split.Tensor, b(aten.mul.Tensor, result, 0.5), 1, 1)
            last = b(operator.getitem, parts, 2)
            x = b(aten.cat.default, [last, last, last], 1)
        return x

    program, _ = outline(build.program(loop, X, denoiser=DENOISER))
    assert len(program.calls("denoiser_step")) == 4


def test_a_program_without_a_loop_is_left_alone() -> None:
    program, ctx = outlined("simplify", steps=1)
    assert ctx.skipped == ["steps: no component is called more than once"]
    assert list(program.components) == ["denoiser"]
