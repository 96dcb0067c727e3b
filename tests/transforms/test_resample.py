"""Sampling a pipeline again with other steps and schedulers: as asked, or refused by name."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import diffopt
from diffopt.core import Pipeline
from diffopt.errors import DiffoptError
from tests.zoo import session, traced


class Steps:
    """A sampler whose steps are a number, or sigmas of the caller's."""

    def __init__(self) -> None:
        self.components = {"net": nn.Linear(4, 4).eval().requires_grad_(False)}

    def __call__(self, x, num_inference_steps=4, sigmas=None):
        parts = SimpleNamespace(**self.components)
        for sigma in sigmas or torch.linspace(1, 0, num_inference_steps).tolist():
            x = x - sigma * parts.net(x)
        return x


def refusal(program, text):
    with pytest.raises(DiffoptError) as caught:
        Pipeline.parse(text).run(program)
    return str(caught.value)


def test_the_number_of_steps_is_that_of_the_record():
    program = diffopt.trace(Steps(), x=torch.ones(4), num_inference_steps=4)
    assert len(Pipeline.parse("unroll(steps=2)").run(program).calls()) == 2
    program = diffopt.trace(Steps(), x=torch.ones(4), sigmas=[1.0, 0.5, 0.2])
    assert refusal(program, "unroll(steps=2)") == (
        "unroll(steps=2): the pipeline calls its models as often as in 4 steps (its own sigmas or "
        "timesteps set their number, perhaps): trace it with others"
    )


def test_a_scheduler_for_another_kind_of_model():
    assert refusal(traced("flux"), "unroll(scheduler=DDIM)") == (
        "unroll(scheduler=DDIMScheduler): the pipeline's FlowMatchEulerDiscreteScheduler follows a "
        "flow, and this one cannot: the model was trained for other sigmas"
    )
    assert refusal(traced("sd"), "unroll(scheduler=FlowMatchEulerDiscrete)") == (
        "unroll(scheduler=FlowMatchEulerDiscreteScheduler): it follows a flow, and the pipeline's "
        f"{type(session('sd').pipeline.scheduler).__name__} does not: the model was trained for "
        "other sigmas"
    )


def test_what_the_pipeline_refuses_is_one_line():
    class Refuses(Steps):
        def __call__(self, x, num_inference_steps=4):
            if num_inference_steps < 3:
                raise ValueError("too few steps\nby far")
            return super().__call__(x, num_inference_steps)

    program = diffopt.trace(Refuses(), x=torch.ones(4))
    assert refusal(program, "unroll(steps=2)") == (
        "unroll: the pipeline refuses to be sampled like this: too few steps"
    )
