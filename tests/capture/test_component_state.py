"""A component means what it is at each call: weights by value, buffers, hooks, closures, modes."""

from types import SimpleNamespace

import pytest
import torch

import diffopt
from diffopt.capture.module_state import pipeline_digests
from diffopt.errors import DiffoptError
from tests.capture.random_samplers import STATEMENTS, Net, Sampler
from tests.zoo import CASES, call

STATES = (
    *("attribute", "deep attribute", "hooks", "closure of a hook", "forward replaced", "buffer"),
    *("buffer of an input", "averaged weights", "other data", "double", "kept", "loop"),
    *("whole loop", "autocast", "guided"),
)


def sampler(*names: str) -> Sampler:
    statements = [STATEMENTS[name][1] for name in names]

    def first(env: SimpleNamespace) -> None:
        env.x = env.a["x"] * 1

    return Sampler([first, *statements], list(names), lambda r: {}, {"net": Net().eval()})


@pytest.mark.parametrize("name", STATES)
def test_each_call_has_the_state_of_then(name):
    pipe = sampler(name, "net")
    before = {n: t.clone() for n, t in pipe.components["net"].state_dict().items()}
    program = diffopt.trace(pipe, check=False, x=torch.ones(2, 4))
    after = pipe.components["net"].state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items()), "capture leaves no trace"
    for seed in range(3):
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))
        pipe.components["net"].reset()
        with torch.no_grad():
            expected = pipe(x=x)
        assert torch.equal(program(x=x), expected)


def test_a_state_that_comes_back_makes_no_new_component():
    pipe = sampler("averaged weights", "averaged weights", "net")
    program = diffopt.trace(pipe, x=torch.ones(2, 4))
    assert len(program.components) == 2, "with the average and without it"


@pytest.mark.filterwarnings("ignore")
def test_a_decoder_that_is_cast_for_its_call(tmp_path):
    pipe = CASES["sdxl"].build()
    pipe.to(torch.float16)
    pipe.vae.register_to_config(force_upcast=True)
    arguments = CASES["sdxl"].inputs(0) | {"num_inference_steps": 1}
    program = diffopt.trace(pipe, **arguments)
    diffopt.build(program, "eager", tmp_path / "a.engine")
    (expected,) = call(pipe, CASES["sdxl"].inputs(1) | {"num_inference_steps": 1})
    again = CASES["sdxl"].inputs(1) | {"num_inference_steps": 1}
    assert torch.equal(call(program, again)[0], expected)
    again = CASES["sdxl"].inputs(1) | {"num_inference_steps": 1}
    assert torch.equal(call(diffopt.load(tmp_path / "a.engine"), again)[0], expected)


# After the capture


def test_weights_that_change_after_the_capture(tmp_path):
    pipe = sampler("net")
    program = diffopt.trace(pipe, x=torch.ones(2, 4))
    expected = program(x=torch.ones(2, 4))
    pipe.components["net"].half()  # gives the module other memory
    assert torch.equal(program(x=torch.ones(2, 4)), expected)
    program.save(tmp_path / "a.program")
    pipe = sampler("net")
    program = diffopt.trace(pipe, x=torch.ones(2, 4))
    pipe.components["net"].linear.weight.data.mul_(2)  # as adapters are fused
    message = (
        "the weight net.linear.weight of the pipeline has changed since it was traced (an adapter "
        "was fused or taken off, say): trace it again"
    )
    for use in (lambda: program.save(tmp_path / "b.program"), lambda: run_passes(program)):
        with pytest.raises(DiffoptError) as caught:
            use()
        assert str(caught.value) == message
    assert not (tmp_path / "b.program").exists()


def run_passes(program):
    diffopt.Pipeline.parse("hoist").run(program)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
        lambda pipe: pipe.vae.enable_tiling(),
        lambda pipe: setattr(pipe.unet.mid_block.attentions[0], "scale", 0.5),
        lambda pipe: pipe.unet.conv_in.weight.data.mul_(2),
        lambda pipe: pipe.unet.train(),
    ],
)
def test_digests_cover_settings(change):
    pipe = CASES["sd"].build()
    before = pipeline_digests(pipe.components)
    assert before == pipeline_digests(CASES["sd"].build().components)
    change(pipe)
    after = pipeline_digests(pipe.components)
    assert [name.partition(" ")[0] for name in before if before[name] != after[name]] in (
        ["unet"],
        ["vae"],
    )


def test_digests_are_those_of_before_a_call():
    pipe = CASES["sd"].build()
    before = pipeline_digests(pipe.components)
    with torch.no_grad():
        call(pipe, CASES["sd"].inputs(0))
    assert pipeline_digests(pipe.components) == before
