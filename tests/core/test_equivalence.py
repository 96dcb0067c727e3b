"""An exact pass may round elsewhere, though sampling amplifies it; it computes the same."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffopt.capture.trace import Session
from diffopt.core import Context, Pass, Pipeline, Record
from diffopt.core.equivalence import Snapshot, noise_floor
from diffopt.core.record import Size
from diffopt.errors import ToleranceError
from diffopt.ir import graph as g
from diffopt.ir.program import Program

aten = torch.ops.aten


class Amplifies:
    """A sampler each of whose steps makes a difference eight times as large."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 8)).eval()
        self.components = {"net": net.requires_grad_(False)}

    def __call__(self, x):
        parts = SimpleNamespace(**self.components)
        for _ in range(6):
            x = torch.sin(8 * x + parts.net(x))
        return x


@dataclass(frozen=True)
class Scale(Pass):
    """Scale the second layer's result and scale it back: that rounds once more."""

    name = "scale"
    rtol = 1e-6
    tolerance_reason = "a product rounds"
    factor: float = 1.0

    def run(self, program: Program, ctx: Context) -> None:
        for body in program.components.values():
            (output,) = g.outputs(body)
            with body.graph.inserting_before(g.output_node(body)):
                third = g.call(body.graph, aten.mul.Tensor, output, 1 / 3)
                g.set_outputs(body, [g.call(body.graph, aten.mul.Tensor, third, 3 * self.factor)])


def program() -> Program:
    return Session(Amplifies()).program({"x": torch.linspace(-1, 1, 8)})


def test_rounding_that_sampling_amplifies_is_none_of_a_passs_doing():
    result = Pipeline([Scale()]).run(program())
    record = Record.from_json(result.history[-1])
    note = record.notes["rounding is amplified"]
    assert record.max_abs == note["output"] > 1e-6
    assert note["by a last place in each call"] > 1e-4


def test_a_wrong_rewrite_shows_all_the_same():
    with pytest.raises(ToleranceError, match=r"is exact and changed the output by"):
        Pipeline([Scale(factor=1 + 1e-4)]).run(program())


def test_the_noise_floor_is_that_of_the_last_place():
    once = Session(lambda x: x * 2).program({"x": torch.linspace(-1, 1, 8)})
    assert 0 < noise_floor(Snapshot(once, Size.of(once))) <= 4 * torch.finfo(torch.float32).eps
