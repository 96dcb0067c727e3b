"""Folding of what depends on the timestep alone, and sampling again."""

import pytest
import torch

from diffopt.capture.trace import trace_function
from diffopt.core import Pipeline, Record
from diffopt.errors import DiffoptError
from diffopt.ir import graph as g
from diffopt.ir.printing import format_graph
from diffopt.ir.program import Program
from tests import loops


def unroll(program: Program, text: str = "unroll") -> tuple[Program, Record]:
    result = Pipeline.parse(text).run(program)
    return result, Record.from_json(result.history[-1])


def test_the_time_embedding_becomes_a_row_of_a_table() -> None:
    program = loops.program()
    result, record = unroll(program)
    assert record.max_abs == 0.0
    body = result.components["denoiser"]
    assert [n.name for n in g.placeholders(body)] == ["arg0", "arg2", "arg3", "row"]
    assert not any(name.startswith("time") for name, _ in g.named_tensors(body))
    # The time embedding alone, 8 numbers: the modulation depends on the class as well.
    assert g.attribute(result.root, "denoiser_table").shape == (4, 8)
    assert record.notes["denoiser"] == {
        "calls": 4,
        "values in tables": 1,
        "table bytes": 4 * 2 * 8 * 4,
    }


def test_new_inputs_give_what_the_loop_gives() -> None:
    result, _ = unroll(loops.program())
    expected = loops.Loop()(**loops.arguments(seed=7))
    assert torch.equal(result(**loops.arguments(seed=7)), expected)


def test_a_second_run_changes_nothing() -> None:
    result, _ = unroll(loops.program(), "unroll,unroll")
    assert not result.history[-1]["changed"]


def test_fifty_steps_have_as_many_bodies_as_ten() -> None:
    ten, fifty = (unroll(loops.program(steps=steps))[0] for steps in (10, 50))
    assert list(ten.components) == list(fifty.components)
    bodies = [format_graph(p.components["denoiser"]) for p in (ten, fifty)]
    assert bodies[0] == bodies[1]


def test_a_table_over_the_limit_is_not_made() -> None:
    _, record = unroll(loops.program(), "unroll(max-table-mb=0)")
    assert record.skipped == ["denoiser: the table would take 0 MB, over max-table-mb=0"]
    assert not record.changed


def test_a_component_without_constant_arguments_is_left_alone() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return linear(x)

    linear = torch.nn.Linear(2, 2).requires_grad_(False)
    function.components = {"linear": linear}  # type: ignore[attr-defined]
    _, record = unroll(trace_function(function, torch.ones(1, 2)))
    assert record.skipped == ["linear: no argument is a constant at every call"]
    assert not record.changed


def test_other_steps_sample_again_and_say_how_far_it_is() -> None:
    result, record = unroll(loops.program(), "unroll(steps=2)")
    assert not record.exact
    assert record.relative > 0.01
    assert len(result.calls("denoiser")) == 2
    expected = loops.Loop()(**loops.arguments(seed=3, steps=2))
    assert torch.equal(result(**loops.arguments(seed=3)), expected)


def test_a_program_can_be_sampled_anew_more_than_once() -> None:
    program = loops.program()
    for steps in (2, 3, 2):
        result = Pipeline.parse(f"unroll(steps={steps}),hoist").run(program)
        expected = loops.Loop()(**loops.arguments(seed=3, steps=steps))
        assert torch.allclose(result(**loops.arguments(seed=3)), expected, atol=1e-5)


def test_sampling_again_must_come_first() -> None:
    with pytest.raises(DiffoptError) as error:
        unroll(loops.program(), "unroll,unroll(steps=2)")
    assert str(error.value) == (
        "unroll(steps=…) begins again from the pipeline and would undo unroll: put it first"
    )


def test_a_saved_program_cannot_be_sampled_again(tmp_path) -> None:  # type: ignore[no-untyped-def]
    loops.program().save(tmp_path / "loop.program")
    with pytest.raises(
        DiffoptError, match="a saved program has no pipeline: give the model itself"
    ):
        unroll(Program.load(tmp_path / "loop.program"), "unroll(steps=2)")


def test_no_steps_are_refused() -> None:
    with pytest.raises(DiffoptError) as error:
        unroll(loops.program(), "unroll(steps=0)")
    assert str(error.value) == "unroll(steps=0): wants at least 1 step"
