"""The policy that chooses by measuring: what it measures is what comes out."""

import pytest
import torch

import diffopt
from diffopt import calibrate, reuse
from diffopt.check import difference
from diffopt.core import Pipeline
from diffopt.errors import DiffoptError, ToleranceError
from diffopt.program import Program
from diffopt.search import Evaluator, Lab, reuses
from tests.zoo import CASES

STEPS = 6


@pytest.fixture(scope="module", params=["dit", "sd"])
def program(request: pytest.FixtureRequest) -> Program:
    case = CASES[request.param]
    arguments = case.inputs(0) | {"num_inference_steps": STEPS}
    return Pipeline.parse("unroll,hoist").run(diffopt.trace(case.build(), **arguments))


@pytest.fixture(scope="module")
def lab(program: Program) -> Lab:
    inputs = calibrate.requests(program, (), 2, 0)
    return Lab(reuse.find_loop(program), inputs, lambda what, fraction: None)


def relative_error(new: Program, old: Program, lab: Lab) -> float:
    """Return the error over all calls at once, as the search measures it."""
    pairs = [(new.run(tensors), old.run(tensors)) for tensors in lab.inputs]
    got = [t for outputs, _ in pairs for t in outputs]
    return difference(got, [t for _, outputs in pairs for t in outputs])[1]


def test_an_evaluation_of_a_part_is_what_the_whole_gives(lab: Lab) -> None:
    evaluator, arguments = Evaluator(lab.loop.body), lab._arguments[0][2, 0]
    known = evaluator.everything(arguments)
    expected = lab.loop.body(*arguments)
    for value in lab.candidates[:: len(lab.candidates) // 8]:
        other = {value: known[value] + 1}
        whole = evaluator.run(arguments, other)
        part = evaluator.run(arguments, other, known=known)
        same = evaluator.run(arguments, {value: known[value]})
        for index, result in enumerate(evaluator.results):
            assert torch.equal(whole[result], part[result])
            assert torch.equal(same[result], expected[index])


def test_nothing_taken_is_no_error(lab: Lab) -> None:
    assert lab.error({}) == 0.0


def test_the_error_of_a_plan_is_that_of_the_program_it_makes(program: Program, lab: Lab) -> None:
    cut = lab.candidates[len(lab.candidates) // 2 :][:3]
    (fits,) = lab.fits([cut], 3)
    plan = {s: reuses(cut, fits[s, 1, 0], 1, 0) for s in (2, 3)}
    expected = lab.error(plan)
    made = program.clone()
    loop = reuse.find_loop(made)
    place = {old: new for old, new in zip(lab.loop.places, loop.places, strict=True)}
    reuse.apply(
        made,
        loop,
        {s: [reuse.Reuse(place[r.value], r.terms) for r in own] for s, own in plan.items()},
    )
    made.refresh()
    assert expected > 0
    assert relative_error(made, program, lab) == pytest.approx(expected, rel=1e-3)


def test_fitted_weights_are_better_than_plain_reuse(lab: Lab) -> None:
    cut = lab.candidates[-3:]
    (fits,) = lab.fits([cut], 2)
    for (step, last, before), fit in fits.items():
        rows = [
            [lab.body.run(arguments[at, 0], keep=cut) for at in (last, before, step)]
            for arguments in lab._arguments
        ]
        for value, (a, b) in zip(cut, fit.weights, strict=True):
            fitted = sum(
                float((a * x[value] + b * y[value] - z[value]).square().sum()) for x, y, z in rows
            )
            plain = sum(float((x[value] - z[value]).square().sum()) for x, _, z in rows)
            assert fitted <= plain * 1.001


def test_the_policy_meets_a_speedup_and_keeps_few_bodies(program: Program) -> None:
    text = "cache(auto,speedup=1.4,calls=2,reach=3,trials=4)"
    result = Pipeline.parse(text).run(program)
    notes = result.history[-1]["notes"]
    (loop,) = (value for key, value in notes.items() if key != "calibration")
    flops = loop["flops"]
    assert flops["measured"] <= flops["before"] / 1.4
    assert loop["bodies"] <= 3
    assert result.history[-1]["relative"] < 0.5
    again = Pipeline.parse(text).run(program)
    assert again.history[-1]["notes"] == notes, "seeded"


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
