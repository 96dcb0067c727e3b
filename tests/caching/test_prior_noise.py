"""Faster Diffusion's prior noise, against pipelines whose scheduler adds it before each step."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import fx

from diffopt.caching.apply_plan import find_loop
from diffopt.caching.policies import faster_diffusion
from diffopt.core import Context, Pipeline, Record
from diffopt.core.equivalence import difference
from diffopt.errors import DiffoptError
from diffopt.ir import graph as g
from diffopt.ir.program import Program
from tests.hooks import hold_outputs
from tests.zoo import CASES, call, traced

STEPS = 6


def inputs(name: str) -> dict[str, Any]:
    return {**CASES[name].inputs(0), "num_inference_steps": STEPS}


@cache
def unrolled(name: str) -> Program:
    return Pipeline.parse("unroll,hoist").run(traced(name, num_inference_steps=STEPS))


def cached(name: str, options: str) -> tuple[Program, Record]:
    program = Pipeline.parse(f"cache(faster-diffusion,{options})").run(unrolled(name))
    return program, Record.from_json(program.history[-1])


def eager(name: str, keys: list[int], factor: float) -> list[torch.Tensor]:
    """Run the pipeline as the authors' parallel code does, one decoder after the other."""
    pipe = CASES[name].build()
    net = pipe.unet
    step = hold_outputs(net, [*net.down_blocks, net.mid_block, net.conv_in], keys)
    initial: list[torch.Tensor] = []
    solve = pipe.scheduler.step

    def advance(noise: Any, t: Any, sample: torch.Tensor, *args: Any, **more: Any) -> Any:
        initial.append(sample)
        if step() >= STEPS / 2:
            sample = sample + factor * initial[0]
        return solve(noise, t, sample, *args, **more)

    pipe.scheduler.step = advance
    return call(pipe, inputs(name))


# DDIM, and Euler, which scales the denoiser's inputs
@pytest.mark.parametrize(("name", "factor"), [("sd", 0.0), ("sd", 0.25), ("sdxl", 0.003)])
def test_it_is_added_before_the_second_half_of_the_schedulers_steps(
    name: str, factor: float
) -> None:
    program, record = cached(name, f"key-steps=(0,2,3),prior-noise={factor}")
    expected = eager(name, [0, 2, 3], factor)
    assert difference(call(program, inputs(name)), expected)[1] < 1e-5
    if factor:
        without = eager(name, [0, 2, 3], 0.0)
        assert difference(without, expected)[1] > 1e-4
    assert record.skipped == []
    # Steps 4 and 5 are one call still: a decoder reads no latents.
    assert record.notes["calls saved by batching decoders"] == 1


def test_the_default_is_that_of_the_authors_code() -> None:
    program, _ = cached("sd", "key-steps=(0,2,3)")
    expected = eager("sd", [0, 2, 3], 0.003)
    assert difference(call(program, inputs("sd")), expected)[1] < 1e-5


def test_it_is_left_out_where_the_initial_latents_are_more_than_noise() -> None:
    program, record = cached("sd-img2img", "key-steps=(0,1),prior-noise=0.1")
    other, _ = cached("sd-img2img", "key-steps=(0,1),prior-noise=0")
    assert record.skipped == [
        "unet: no prior noise is added: the initial latents are not noise alone"
    ]
    assert program.fingerprint() == other.fingerprint()


def test_it_is_left_out_where_the_latents_can_not_be_told() -> None:
    program = unrolled("sd").clone()
    loop, ctx = find_loop(program), Context()
    both = loop.calls[4, 0].args[0]
    assert isinstance(both, fx.Node)
    with program.root.graph.inserting_after(both):
        g.call(program.root.graph, torch.ops.aten.neg.default, both)
    faster_diffusion.add_prior_noise(loop, 0.1, ctx)
    assert ctx.skipped == [
        "unet: no prior noise is added: step 4 has 2 values that the denoiser and the scheduler "
        "both read"
    ]


def test_it_is_left_out_where_the_latents_change_their_shape() -> None:
    loop = find_loop(unrolled("sd").clone())
    both = loop.calls[3, 0].args[0]
    assert isinstance(both, fx.Node)
    with pytest.raises(faster_diffusion.NoLatents) as caught:
        faster_diffusion._check_is_noise(faster_diffusion.latents(loop, 0), [both])
    assert str(caught.value) == "the latents do not keep their shape"


def test_it_is_left_out_where_every_step_computes_all() -> None:
    _, record = cached("sd", "key-steps=(0,1,2,3,4,5)")
    assert not record.changed


@pytest.mark.parametrize("factor", ["-0.1", "1"])
def test_other_factors_are_refused(factor: str) -> None:
    with pytest.raises(DiffoptError) as caught:
        Pipeline.parse(f"cache(faster-diffusion,prior-noise={factor})")
    assert str(caught.value).splitlines()[0] == "faster-diffusion wants prior-noise >= 0 and < 1"
