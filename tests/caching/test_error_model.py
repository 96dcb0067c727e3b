"""The policy that chooses by measuring: what it measures is what comes out."""

import math
from pathlib import Path

import pytest
import torch

from diffopt.caching import apply_plan
from diffopt.caching.error_model import ErrorModel
from diffopt.core import Pipeline
from diffopt.core.equivalence import difference
from diffopt.errors import DiffoptError, ToleranceError
from diffopt.execution import trajectories
from diffopt.execution.partial_evaluation import PartialEvaluator
from diffopt.ir.program import Program
from diffopt.progress import silent
from tests.zoo import traced

STEPS = 6


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements of other runs must not stand in for those of a test."""
    monkeypatch.setenv("DIFFOPT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module", params=["dit", "sd"])
def program(request: pytest.FixtureRequest) -> Program:
    return Pipeline.parse("unroll,hoist").run(traced(request.param, num_inference_steps=STEPS))


@pytest.fixture(scope="module")
def model(program: Program) -> ErrorModel:
    inputs = trajectories.requests(program, (), 2, 0)
    return ErrorModel(apply_plan.find_loop(program), inputs, silent)


def relative_error(new: Program, old: Program, model: ErrorModel) -> float:
    """Return the error over all calls at once, as the search measures it."""
    pairs = [(new.run(tensors), old.run(tensors)) for tensors in model.inputs]
    got = [t for outputs, _ in pairs for t in outputs]
    return difference(got, [t for _, outputs in pairs for t in outputs])[1]


def test_an_evaluation_of_a_part_is_what_the_whole_gives(model: ErrorModel) -> None:
    evaluator, arguments = PartialEvaluator(model.loop.body), model._arguments[0][2, 0]
    known = evaluator.everything(arguments)
    expected = model.loop.body(*arguments)
    for value in model.candidates[:: len(model.candidates) // 8]:
        other = {value: known[value] + 1}
        whole = evaluator.run(arguments, other)
        part = evaluator.run(arguments, other, known=known)
        same = evaluator.run(arguments, {value: known[value]})
        for index, result in enumerate(evaluator.results):
            assert torch.equal(whole[result], part[result])
            assert torch.equal(same[result], expected[index])


def test_nothing_taken_is_no_error(model: ErrorModel) -> None:
    assert model.plan_error({}) == 0.0


def test_the_error_of_a_plan_is_that_of_the_program_it_makes(
    program: Program, model: ErrorModel
) -> None:
    cut = model.candidates[len(model.candidates) // 2 :][:3]
    model.fit(cut)
    plan = {s: model.reuses(cut, s, [1, 0]) for s in (2, 3)}
    expected = model.plan_error(plan)
    cached = program.clone()
    loop = apply_plan.find_loop(cached)
    place = {old: new for old, new in zip(model.loop.positions, loop.positions, strict=True)}
    apply_plan.apply(
        cached,
        loop,
        {
            s: [apply_plan.Reuse(place[r.value], r.terms) for r in reuses]
            for s, reuses in plan.items()
        },
    )
    cached.refresh()
    assert expected > 0
    assert relative_error(cached, program, model) == pytest.approx(expected, rel=1e-3)
    assert model.plan_error(plan, limit=expected * 1.01) == pytest.approx(expected)
    assert model.plan_error(plan, limit=expected / 10) == math.inf


@pytest.mark.parametrize("sources", [[3], [3, 2], [4, 2, 0]])
def test_no_other_weights_are_better_than_those_of_least_squares(
    model: ErrorModel, sources: list[int]
) -> None:
    step = 5
    for value in model.candidates[-3:]:
        model.fit([value])
        rows = [
            torch.cat(
                [
                    model.body.run(arguments[at, 0], keep=[value])[value].flatten()
                    for arguments in model._arguments
                ]
            ).double()
            for at in (step, *sources)
        ]
        weights = torch.tensor(model.weights(value, step, sources)).double()

        def error(weights: torch.Tensor, rows: list[torch.Tensor] = rows) -> float:
            return float((weights @ torch.stack(rows[1:]) - rows[0]).square().sum())

        for place in range(len(sources)):
            for change in (-0.02, 0.02):
                other = weights.clone()
                other[place] += change
                assert error(weights) < error(other)


def test_the_error_of_a_cut_is_what_taking_it_changes(model: ErrorModel) -> None:
    results = list(dict.fromkeys(model.body.results))
    model.fit(results)
    errors = model.cut_errors(results, 2)
    assert set(errors) == {
        (step, last, before)
        for step in range(2, STEPS)
        for last in range(max(1, step - 2), step)
        for before in range(max(0, last - 2), last)
    }
    step, last, before = 5, 4, 2  # every step is probed in so short a loop
    expected = 0.0
    for arguments in model._arguments:
        values = {at: model.body.run(arguments[at, 0]) for at in (step, last, before)}
        for value in results:
            a, b = model.weights(value, step, [last, before])
            taken = a * values[last][value] + b * values[before][value]
            expected += float((taken - values[step][value]).double().square().sum())
    assert errors[step, last, before] == pytest.approx((expected / 2) ** 0.5, rel=1e-4)


def test_large_values_are_studied_by_some_of_their_elements(
    model: ErrorModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = max(model.candidates, key=lambda n: n.meta["val"].numel())
    model.fit([value])
    whole = model._products.pop(value)
    count = value.meta["val"].numel()
    monkeypatch.setattr("diffopt.caching.error_model._SAMPLE", count // 4)
    model.fit([value])
    part = model._products.pop(value)
    assert not torch.equal(part, whole)
    assert torch.allclose(part * 4, whole, rtol=0.5, atol=0.2 * float(whole.abs().max()))


def test_the_policy_meets_a_speedup_and_keeps_few_bodies(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "cache(auto,speedup=1.4,calls=2,reach=3,trials=6)"
    result = Pipeline.parse(text).run(program)
    notes = result.history[-1]["notes"]
    (loop,) = (value for key, value in notes.items() if key != "calibration")
    flops = loop["flops"]
    assert flops["measured"] <= flops["before"] / 1.4
    assert loop["bodies"] <= 3
    assert result.history[-1]["relative"] < 0.5
    kept = tmp_path / "cache"
    kept.rename(tmp_path / "kept")
    again = Pipeline.parse(text).run(program)
    assert again.history[-1]["notes"] == notes, "seeded"

    monkeypatch.setenv("DIFFOPT_CACHE", str(tmp_path / "kept"))
    monkeypatch.delattr("diffopt.caching.policies.auto.ErrorModel")
    known = Pipeline.parse(text).run(program)
    assert known.history[-1]["notes"] == notes, "measured before, with a cache"
    inputs = program.sample_inputs()
    assert all(map(torch.equal, known.run(inputs), result.run(inputs)))
    with pytest.raises(NameError):
        Pipeline.parse(text.replace("1.4", "1.5")).run(program)


def test_the_policy_meets_a_budget(program: Program) -> None:
    result = Pipeline.parse("cache(auto,calls=2,reach=3,trials=6,budget=0.5)").run(program)
    assert result.history[-1]["relative"] <= 0.5
    notes = result.history[-1]["notes"]
    assert notes["calibration"]["error"] <= 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cache(auto)", "auto wants either speedup, as in speedup=2, or a budget of error"),
        ("cache(auto,speedup=2,budget=0.1)", "auto wants either speedup, as in speedup=2"),
        ("cache(auto,speedup=90,calls=1)", "auto cannot meet speedup=90: with reach=6 the"),
        ("cache(auto,speedup=2,terms=1)", "auto wants calls, reach, trials >= 1 and terms"),
        ("cache(auto,calls=1,budget=0)", "auto cannot meet budget=0: with reach=6 the"),
    ],
)
def test_refusals(program: Program, text: str, message: str) -> None:
    with pytest.raises(DiffoptError) as error:
        Pipeline.parse(text).run(program)
    assert error.value.message.startswith(message)
    assert not isinstance(error.value, ToleranceError)


def test_values_out_of_range() -> None:
    with pytest.raises(DiffoptError, match=r"speedup=0.5: wants more than 1"):
        Pipeline.parse("cache(auto,speedup=0.5)")
