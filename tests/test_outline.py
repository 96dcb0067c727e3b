"""A step as one call."""

import torch

from diffopt.core import Context, Pipeline
from diffopt.outline import outline_steps
from diffopt.program import Program
from tests import loops


def outlined(passes: str, **more: object) -> tuple[Program, Context]:
    program = Pipeline.parse(passes).run(loops.program(**more))
    ctx = Context()
    outline_steps(program, ctx)
    program.refresh()
    program.verify()
    return program, ctx


def test_every_step_is_one_call_of_one_body() -> None:
    program, ctx = outlined("unroll,hoist,simplify")
    assert ctx.notes["steps outlined"] == [4, 4]
    assert len(program.calls("denoiser_step")) == 4
    assert "denoiser" not in program.components
    after = list(program.root.graph.nodes)[
        list(program.root.graph.nodes).index(program.calls("denoiser_step")[0]) :
    ]
    # Between the steps nothing is left but their rows of tables and their results.
    left = {str(n.target) for n in after if n.op == "call_function"} - {"aten.select.int"}
    assert left == {"<built-in function getitem>", "aten.tanh.default"}


def test_outputs_are_equal_for_new_inputs() -> None:
    for passes in ("unroll", "unroll,hoist,simplify"):
        program, _ = outlined(passes)
        expected = loops.Loop()(**loops.arguments(seed=9))
        torch.testing.assert_close(program(**loops.arguments(seed=9)), expected, rtol=0, atol=1e-5)


def test_a_multistep_solver_has_two_kinds_of_steps() -> None:
    program, ctx = outlined("unroll", order=2, steps=6)
    done, total = ctx.notes["steps outlined"]
    assert total == 6
    assert done >= 4
    assert len(program.components) <= 3
    expected = loops.Loop()(**loops.arguments(seed=2, order=2, steps=6))
    torch.testing.assert_close(program(**loops.arguments(seed=2)), expected, rtol=0, atol=1e-5)


def test_the_bodies_do_not_grow_with_the_steps() -> None:
    few, _ = outlined("unroll,hoist,simplify", steps=5)
    many, _ = outlined("unroll,hoist,simplify", steps=20)
    assert list(few.components) == list(many.components)


def test_a_program_without_a_loop_is_left_alone() -> None:
    program, ctx = outlined("simplify", steps=1)
    assert ctx.skipped == ["steps: no component is called more than once"]
    assert list(program.components) == ["denoiser"]
