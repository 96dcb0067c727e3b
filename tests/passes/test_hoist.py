"""Prologues: what is the same in every step, and what is known before the loop."""

import torch

from diffopt.capture.trace import trace_function
from diffopt.core import Pipeline, Record
from diffopt.ir import graph as g
from diffopt.ir.program import Program
from tests import loops


def hoist(program: Program, text: str = "hoist") -> tuple[Program, Record]:
    result = Pipeline.parse(text).run(program)
    return result, Record.from_json(result.history[-1])


def test_keys_and_values_are_computed_once() -> None:
    result, record = hoist(loops.program(), "unroll,hoist(batch=false)")
    assert record.max_abs == 0.0
    once = result.components["denoiser_once"]
    assert len(result.calls("denoiser_once")) == 1
    weights = {name for name, _ in g.named_tensors(once)}
    assert {"key_weight", "value_weight", "label_weight"} <= weights
    assert "query_weight" not in weights
    left = {name for name, _ in g.named_tensors(result.components["denoiser"])}
    assert left.isdisjoint({"key_weight", "value_weight", "label_weight"})


def test_modulation_is_computed_for_all_steps_in_one_call() -> None:
    result, record = hoist(loops.program(), "unroll,hoist")
    assert record.max_abs <= 1e-5  # one product over all steps sums in another order
    steps = result.components["denoiser_steps"]
    assert len(result.calls("denoiser_steps")) == 1
    assert "modulation_weight" in {name for name, _ in g.named_tensors(steps)}
    # Of every step, for both guidance branches: 1 + scale, and the product that has the shift in
    # it.
    assert [list(n.meta["val"].shape) for n in g.outputs(steps)] == [[4, 2 * (8 + 16)]]
    body = {name for name, _ in g.named_tensors(result.components["denoiser"])}
    assert body == {"query_weight", "query_bias", "out_weight", "out_bias"}


def test_new_inputs_give_what_the_loop_gives() -> None:
    result, _ = hoist(loops.program(), "unroll,hoist")
    expected = loops.Loop()(**loops.arguments(seed=5))
    torch.testing.assert_close(result(**loops.arguments(seed=5)), expected, rtol=0, atol=1e-5)


def test_the_weights_of_prologues_are_releasable() -> None:
    result, record = hoist(loops.program(), "unroll,hoist")
    free = set(result.releasable())
    assert {"denoiser_once.key_weight", "denoiser_steps.modulation_weight"} <= free
    assert not any("query" in name or "out_" in name for name in free)
    assert record.notes["denoiser"]["parameters moved"] == 2 * 72 + 5 * 8 + 8 * 16 + 16


def test_without_unroll_the_time_embedding_is_batched_too() -> None:
    result, _ = hoist(loops.program())
    weights = {name for name, _ in g.named_tensors(result.components["denoiser_steps"])}
    assert {"time_0_weight", "time_2_weight", "modulation_weight"} <= weights


def test_a_second_run_changes_nothing() -> None:
    result, _ = hoist(loops.program(), "unroll,hoist,hoist")
    assert not result.history[-1]["changed"]


def test_values_over_the_limit_are_not_batched() -> None:
    _, record = hoist(loops.program(), "unroll,hoist(max-mb=0)")
    assert "denoiser: values of all steps would take 0 MB, over max-mb=0" in record.skipped


def test_a_component_that_is_called_once_is_left_alone() -> None:
    _, record = hoist(loops.program(steps=1))
    assert record.skipped == ["denoiser: is called once only"]
    assert not record.changed


def test_calls_that_do_not_follow_one_another_are_no_loop() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return linear(x) + linear(y)

    linear = torch.nn.Linear(2, 2).requires_grad_(False)
    function.components = {"linear": linear}  # type: ignore[attr-defined]
    program = trace_function(function, torch.ones(1, 2), torch.zeros(1, 2))
    _, record = hoist(program)
    assert record.skipped == [
        "linear: nothing depends only on arguments that stay the same",
        "linear: its calls do not follow one another: there is no loop to move work out of",
    ]
    assert not record.changed
