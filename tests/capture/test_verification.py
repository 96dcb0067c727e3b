"""A capture is compared with the pipeline itself."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import diffopt
from diffopt.capture import verification
from diffopt.capture.verification import EQUAL, differences
from diffopt.errors import CaptureError
from diffopt.ir.program import Program

COUNTER = [0]


class Counts:
    """A pipeline that is no function of its arguments."""

    def __init__(self) -> None:
        self.components = {"net": nn.Linear(4, 4).eval().requires_grad_(False)}

    def __call__(self, x):
        COUNTER[0] += 1
        return self.components["net"](x) + (100.0 if COUNTER[0] > 3 else 0.0)


def test_a_capture_that_differs_does_not_exist():
    COUNTER[0] = 0
    with pytest.raises(CaptureError) as caught:
        diffopt.trace(Counts(), x=torch.ones(2, 4))
    assert str(caught.value) == (
        "the program does not give what the pipeline gives: 8 of 8 values of result differ, by up "
        "to 100; something that the pipeline does was not captured (check=False, or --no-check, "
        "captures it all the same)"
    )
    COUNTER[0] = 0
    program = diffopt.trace(Counts(), x=torch.ones(2, 4), check=False)
    assert program.check == "not compared with the pipeline's own result"


def test_a_program_that_fails_where_the_pipeline_does_not(monkeypatch):
    def fail(self, tensors):
        raise RuntimeError("out of range")

    COUNTER[0] = -100
    monkeypatch.setattr(Program, "run", fail)
    with pytest.raises(CaptureError) as caught:
        diffopt.trace(Counts(), x=torch.ones(2, 4))
    assert str(caught.value) == "the program fails where the pipeline gives a result: out of range"


def test_a_result_without_a_number_tells_nothing(caplog):
    pipe = Counts()
    COUNTER[0] = -100
    pipe.components["net"].weight.fill_(torch.nan)
    program = diffopt.trace(pipe, x=torch.ones(2, 4))
    assert program.check == f"{EQUAL}, which has no finite number"
    assert "the comparison tells nothing" in caplog.text


def test_whether_it_was_compared_is_kept(tmp_path, monkeypatch, caplog):
    COUNTER[0] = -100
    program = diffopt.trace(Counts(), x=torch.ones(2, 4))
    assert program.check == EQUAL
    program.save(tmp_path / "a.program")
    assert Program.load(tmp_path / "a.program").check == EQUAL
    assert diffopt.build(program, "eager", tmp_path / "a.engine").manifest["check"] == EQUAL
    monkeypatch.setattr(verification, "seconds", lambda program: 840.0)
    with caplog.at_level("WARNING", "diffopt"):
        program = diffopt.trace(Counts(), x=torch.ones(2, 4))
    assert caplog.messages[-1] == (
        "the program was not compared with the pipeline, which would take about 14 minutes: "
        "`--check` (check=True in Python) does"
    )
    assert program.check.startswith("not compared")
    assert diffopt.trace(Counts(), x=torch.ones(2, 4), check=True).check == EQUAL


def test_an_estimate_grows_with_the_program():
    small, large = (
        diffopt.trace(nn.Linear(4, 4).eval(), check=False, input=torch.ones(rows, 4))
        for rows in (8, 800)
    )
    assert 0 < verification.seconds(small) < verification.seconds(large) < 1


@pytest.mark.parametrize(
    ("one", "other", "text"),
    [
        (torch.ones(2), torch.ones(2), None),
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")]), None),
        (torch.ones(2), torch.ones(2).double(), "result is a float64 tensor of [2], not a float32"),
        (torch.ones(2), torch.tensor([1.0, 3.0]), "1 of 2 values of result differ, by up to 2"),
        ([torch.ones(2)], [], "result is a list of 0, not a list of 1"),
        ({"a": 1}, {"a": 2}, "result.a is 2, not 1"),
        (np.ones(2), np.zeros(2), "2 of 2 values of result differ, by up to 1"),
        (Image.new("L", (2, 2)), Image.new("L", (2, 2), 9), "4 of 4 values of result differ"),
    ],
)
def test_differences(one, other, text):
    found = list(differences(one, other))
    assert (not found) if text is None else found[0].startswith(text)
