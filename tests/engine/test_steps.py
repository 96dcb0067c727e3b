"""Engines between their steps: progress, latents as diffusers has them, previews, ends, threads."""

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import diffopt
from diffopt.core import Pipeline
from diffopt.engine.engine import Engine, build
from diffopt.engine.steps import Step
from diffopt.errors import Cancelled, DiffoptError
from diffopt.ir.program import Program
from diffopt.ir.step_boundaries import step_boundaries
from tests import sampler
from tests.command import Run
from tests.zoo import CASES, scheduler_case, traced

EXACT = "unroll,hoist,simplify,fuse"
STEPS = 3


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    path = tmp_path_factory.mktemp("steps") / "sd.engine"
    return build(Pipeline.parse(EXACT).run(traced("sd"), compare=False), "eager", path)


def seen_by_diffusers(pipe: Any, arguments: dict[str, Any]) -> list[tuple[float, Tensor]]:
    """Return the timestep and the latents of each step, as diffusers' callback has them."""
    seen: list[tuple[float, Tensor]] = []

    def look(_: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert index == len(seen)
        seen.append((float(timestep), tensors["latents"].clone()))
        return {}

    pipe(**arguments, callback_on_step_end=look)
    return seen


def expect_same_steps(pipe: Any, program: Program, arguments: dict[str, Any], path: Path) -> None:
    """Compare the latents of an engine's steps with those of the pipeline's."""
    engine = build(program, "eager", path)
    expected = seen_by_diffusers(pipe, {**arguments, "generator": torch.manual_seed(5)})
    steps: list[Any] = []
    latents: list[Tensor] = []

    def look(step: Step) -> None:
        steps.append(step)
        latents.append(step.latents)

    engine(**arguments, generator=torch.manual_seed(5), on_step=look)
    assert [step.index for step in steps] == list(range(1, len(expected) + 1))
    assert {step.total for step in steps} == {len(expected)}
    # Some models are told a thousandth of what the scheduler counts.
    times = [step.timestep for step in steps]
    theirs = [timestep for timestep, _ in expected]
    assert times in (theirs, pytest.approx([each / 1000 for each in theirs]))
    for ours, (_, value) in zip(latents, expected, strict=True):
        torch.testing.assert_close(ours, value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("passes", ["", EXACT])
@pytest.mark.parametrize("name", ["sd", "sd-controlnet", "sd-inpaint", "sd3", "flux"])
def test_latents_after_each_step_are_those_of_diffusers(
    name: str, passes: str, tmp_path: Path
) -> None:
    case = CASES[name]
    arguments = {k: v for k, v in case.inputs(0).items() if k != "generator"}
    program = Pipeline.parse(passes).run(traced(name), compare=False) if passes else traced(name)
    boundaries = step_boundaries(program)
    assert all(boundary.latents and boundary.timestep is not None for boundary in boundaries)
    expect_same_steps(case.build(), program, arguments, tmp_path / "x.engine")


@pytest.mark.parametrize("name", ["dpm++-2m", "unipc", "heun", "lms"])
def test_latents_are_told_from_what_a_solver_keeps(name: str, tmp_path: Path) -> None:
    case = scheduler_case(name)
    program = diffopt.trace(case.build(), check=False, **case.inputs(0))
    for each in (program, Pipeline.parse(EXACT).run(program, compare=False)):
        boundaries = step_boundaries(each)
        assert all(boundary.latents for boundary in boundaries), boundaries
        engine = build(each, "eager", tmp_path / "x.engine")
        kept: list[Tensor] = []
        images = engine(seed=0, on_step=lambda step, kept=kept: kept.append(step.latents.clone()))
        # Put back in another run, they lead to its images.
        for index in (0, len(boundaries) - 2):

            def put(step: Step, index: int = index, kept: list[Tensor] = kept) -> None:
                if step.index == index + 1 and index == len(kept) - 2:
                    step.latents = kept[index]

            again = engine(seed=0, on_step=put)
            assert torch.equal(again["images"], images["images"])


def test_a_step_of_two_branches_and_of_a_controlnet_is_one() -> None:
    for name in ("sd", "sd-controlnet"):
        assert len(step_boundaries(traced(name))) == STEPS


def test_latents_that_are_changed_are_those_that_the_run_goes_on_with(engine: Engine) -> None:
    zeros = engine(seed=0, on_step=lambda step: setattr(step, "latents", step.latents * 0))
    other = engine(seed=1, on_step=lambda step: setattr(step, "latents", step.latents * 0))
    assert np.array_equal(zeros["images"], other["images"])
    assert not np.array_equal(zeros["images"], engine(seed=0)["images"])


@pytest.mark.parametrize("value", [torch.zeros(1), torch.zeros(1, 4, 8, 8).double(), None])
def test_latents_of_another_type_are_refused(value: Any, engine: Engine) -> None:
    with pytest.raises(DiffoptError, match=r"latents must be torch\.float32"):
        engine(seed=0, on_step=lambda step: setattr(step, "latents", value))


def test_diffusers_callback_looks_and_changes(engine: Engine) -> None:
    pipe, arguments = CASES["sd"].build(), CASES["sd"].inputs(0)
    calls: list[tuple[int, float]] = []

    def halve(_: Any, index: int, timestep: float, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        calls.append((index, float(timestep)))
        return {"latents": tensors["latents"] * 0.5}

    theirs = pipe(**arguments, callback_on_step_end=halve)
    mine = engine(seed=0, callback_on_step_end=halve)
    assert calls[: len(calls) // 2] == calls[len(calls) // 2 :]
    assert torch.allclose(
        torch.as_tensor(mine["images"]), torch.as_tensor(theirs.images), atol=1e-4
    )
    names = ["latents", "prompt_embeds"]
    with pytest.raises(DiffoptError, match="no prompt_embeds"):
        engine(seed=0, callback_on_step_end=halve, callback_on_step_end_tensor_inputs=names)
    with pytest.raises(DiffoptError, match="give one of the two"):
        engine(seed=0, callback_on_step_end=halve, on_step=print)


def test_what_a_callback_changes_besides_latents_is_refused(engine: Engine) -> None:
    def interrupt(
        pipe: Any, index: int, timestep: float, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        pipe._interrupt = True
        return tensors

    with pytest.raises(DiffoptError, match="sets _interrupt, which an engine does not read"):
        engine(seed=0, callback_on_step_end=interrupt)
    with pytest.raises(DiffoptError, match="returned 'prompt_embeds'"):
        engine(seed=0, callback_on_step_end=lambda *_: {"prompt_embeds": torch.zeros(1)})


def test_latents_are_taken_from_a_callback_that_did_not_ask_for_them(engine: Engine) -> None:
    shape = (1, 4, 8, 8)
    results = [
        engine(
            seed=seed,
            callback_on_step_end=lambda *_: {"latents": torch.zeros(shape)},
            callback_on_step_end_tensor_inputs=[],
        )
        for seed in (0, 1)
    ]
    assert np.array_equal(results[0]["images"], results[1]["images"])


def test_a_callback_can_end_the_run(engine: Engine) -> None:
    def end(pipe: Any, index: int, timestep: float, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe.cancel()
        return tensors

    with pytest.raises(Cancelled):
        engine(seed=0, callback_on_step_end=end)


def test_a_run_ends_where_it_is_told_to_and_the_next_one_does_not(engine: Engine) -> None:
    expected = engine(seed=0)["images"]
    seen: list[int] = []

    def second(step: Step) -> bool:
        seen.append(step.index)
        return step.index < 2

    with pytest.raises(Cancelled, match=f"cancelled after step 2 of {STEPS}"):
        engine(seed=0, on_step=second)
    assert seen == [1, 2]
    with pytest.raises(Cancelled):
        engine(seed=0, on_step=lambda step: engine.cancel())
    assert np.array_equal(engine(seed=0)["images"], expected)


def test_cancel_ends_a_run_of_another_thread_without_a_callback(tmp_path: Path) -> None:
    engine = build(sampler.program(), "eager", tmp_path / "x.engine")
    began, ended = threading.Event(), threading.Event()
    execute = engine._executor.run

    def slow(tensors: Any, watch: Callable[[Any], None]) -> Any:
        def waits(pause: Any) -> None:
            began.set()
            assert ended.wait(20)
            watch(pause)

        return execute(tensors, waits)

    engine._executor.run = slow  # type: ignore[method-assign]
    ends: list[str] = []

    def call() -> None:
        with pytest.raises(Cancelled) as caught:
            engine(generator=torch.manual_seed(0))
        ends.append(str(caught.value))

    thread = threading.Thread(target=call)
    thread.start()
    assert began.wait(20)
    engine.cancel()
    ended.set()
    thread.join(20)
    assert ends == ["cancelled after step 1 of 3"]


def test_threads_get_what_they_get_alone(engine: Engine) -> None:
    expected = [engine(seed=seed)["images"] for seed in range(4)]
    results: dict[int, Any] = {}

    def call(seed: int) -> None:
        results[seed] = engine(seed=seed)["images"]

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(results[seed], expected[seed]) for seed in range(4))


def test_previews_are_the_decoded_picture_and_then_a_linear_one(engine: Engine) -> None:
    pictures: list[Any] = []
    whole: list[Any] = []

    def look(step: Step) -> None:
        pictures.append(step.previews())
        whole.append(step.previews("decode"))

    result = engine(seed=0, output_type="pil", on_step=look)
    assert list(np.asarray(whole[-1][0]).flat) == list(np.asarray(result["images"][0]).flat)
    assert [each[0].size for each in pictures] == [(16, 16), (8, 8), (8, 8)]
    with pytest.raises(DiffoptError, match="wants 'linear' or 'decode'"):
        engine(seed=0, on_step=lambda step: step.previews("big"))


def test_an_engine_is_freed_when_nothing_refers_to_it(tmp_path: Path) -> None:
    engine = build(traced("sd"), "eager", tmp_path / "x.engine")
    engine(seed=0, on_step=lambda step: bool(step.previews()))
    with pytest.raises(DiffoptError):
        engine.load_lora(tmp_path)
    alive = weakref.ref(engine)
    gc.disable()
    try:
        del engine
        assert alive() is None
    finally:
        gc.enable()


def test_an_engine_of_one_step_says_so(tmp_path: Path) -> None:
    pipe = sampler.Sampler()
    program: Program = diffopt.trace(pipe, latents=torch.zeros(2, 8), steps=1, check=False)
    engine = build(program, "eager", tmp_path / "x.engine")
    assert engine.steps == 0
    with pytest.raises(DiffoptError, match="on_step has no step to be called after"):
        engine(latents=torch.zeros(2, 8), on_step=print)


def test_the_command_shows_steps(engine: Engine, diffopt: Run) -> None:
    outcome = diffopt("run", engine.path, "-o", "x.png", "--seed", "0")
    assert outcome.code == 0, outcome.err
