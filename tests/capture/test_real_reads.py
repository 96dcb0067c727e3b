"""Branches on what models compute: the real run's way, checked in every run."""

import logging

import pytest
import torch
from torch import nn

import diffopt
from diffopt.capture.verification import EQUAL
from diffopt.core import Pipeline
from diffopt.errors import CaptureError, DiffoptError
from diffopt.ir.program import Program
from tests.capture.test_arguments import expect_equal, refusal, sampler

LOW, HIGH = torch.full((4,), -1.0), torch.full((4,), 3.0)


def net():
    layer = nn.Linear(4, 4, bias=False).requires_grad_(False)
    nn.init.eye_(layer.weight)
    return layer


def limited(parts, x):
    y = parts.net(x)
    if torch.any(y > 1.0):
        y = y / y.abs().max()
    return y * 2


def refuses_nan(parts, x):
    y = parts.net(x)
    if torch.isnan(y).any():
        raise ValueError("not a number")
    return y + 1


def cut(parts, x):
    y = parts.net(x)
    return y[: int((y > 0).sum())].clone() * 3


def by_places(parts, x):
    y = parts.net(x)
    return sum(y[place] * (count + 1) for count, place in enumerate((y > 0).long().tolist()))


def in_a_loop(parts, x):
    for _ in range(3):
        x = parts.net(x) - 1
        if (x < 0).all():
            x = -x * 2
    return x


def compares(parts, x):
    y = parts.net(x)
    if torch.equal(y, x) and not torch.equal(y, x[:2]) and torch.allclose(y, x):
        y = y * 3
    return y if torch.equal(x[:3], x) or y.ravel()[:1] > 1e6 else y + 1


CASES = {
    "comparisons": (compares, HIGH, LOW, LOW * torch.nan),
    "a limit": (limited, HIGH, HIGH * 2, LOW),
    "below it": (limited, LOW, LOW * 2, HIGH),
    "nan": (refuses_nan, LOW, HIGH, LOW * torch.nan),
    "a count": (
        cut,
        torch.tensor([1.0, 2.0, -1.0, -1.0]),
        HIGH * LOW.sign().cumsum(0).add(2.5),
        LOW,
    ),
    "a list": (
        by_places,
        torch.tensor([1.0, -2.0, 1.0, 1.0]),
        torch.tensor([2.0, -1.0, 3.0, 4.0]),
        LOW,
    ),
    "a loop": (in_a_loop, HIGH, HIGH * 1.5, LOW),
}


@pytest.mark.parametrize("name", CASES)
def test_the_way_of_the_real_run(name, tmp_path):
    function, x, alike, other = CASES[name]
    pipe = sampler(function, net=net())
    program = diffopt.trace(pipe, x=x)
    program.save(tmp_path / "a.program")
    passed = Pipeline.parse("unroll,hoist,simplify,fuse").run(program)
    diffopt.write(passed, "eager", tmp_path / "a.engine")
    for built in (
        program,
        Program.load(tmp_path / "a.program"),
        passed,
        diffopt.load(tmp_path / "a.engine"),
    ):
        expect_equal(pipe, built, x=alike)
        assert "what Python reads here is" in refusal(built, x=other)


def test_the_comparison_takes_the_probes_way_where_it_is_the_same():
    assert diffopt.trace(sampler(refuses_nan, net=net()), x=HIGH).check == EQUAL


def test_a_pipeline_that_is_not_asked_does_not_run(caplog):
    calls = []

    def function(parts, x):
        calls.append(x)
        return parts.net(x) * 2

    with caplog.at_level(logging.INFO, "diffopt"):
        diffopt.trace(sampler(function, net=net()), x=LOW, check=False)
    assert len(calls) == 3
    assert not [message for message in caplog.messages if "runs for real" in message]


@pytest.mark.parametrize(
    "function",
    [
        lambda parts, x: parts.net(x) * parts.net(x).max().item(),
        lambda parts, x: parts.net(x) * float(parts.net(x)[0]),
        lambda parts, x: torch.tensor(parts.net(x).tolist()) * x,
    ],
)
def test_numbers_that_every_run_changes_are_refused(function):
    with pytest.raises(CaptureError, match=r"a traced value (here|becomes a Python list)"):
        diffopt.trace(sampler(function, net=net()), x=LOW)


def test_an_error_of_the_real_run_is_the_pipelines():
    with pytest.raises(ValueError, match="not a number"):
        diffopt.trace(sampler(refuses_nan, net=net()), x=LOW * torch.nan)


def test_several_requests_in_one_run(tmp_path):
    pipe = sampler(limited, net=net())
    program = Pipeline.parse("batch(max=2)").run(diffopt.trace(pipe, x=HIGH))
    results = program.serve([{"x": HIGH}, {"x": HIGH * 2}])
    for x, result in zip((HIGH, HIGH * 2), results, strict=True):
        torch.testing.assert_close(result, pipe(x=x))
    with pytest.raises(DiffoptError, match="what Python reads here is False"):
        program.serve([{"x": HIGH}, {"x": LOW}])
