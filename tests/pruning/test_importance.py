"""How much each weight matters, against the formulas written out for programs of one layer."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from diffopt.core import Pipeline
from diffopt.errors import DiffoptError
from diffopt.execution.calibration_inputs import requests
from diffopt.ir import call_tags
from diffopt.ir import graph as g
from diffopt.ir.program import Program
from diffopt.pruning.importance import importance
from tests import loops
from tests.passes import build
from tests.passes.build import Builder, randn
from tests.zoo import traced

aten = torch.ops.aten

SIZE = 2, 6
SIGMAS = 1.0, 0.7, 0.4, 0.1, 0.0  # of the noise in each step, and behind the last one
WEIGHT = torch.nn.Parameter(torch.eye(6), requires_grad=False)


def straight(gains: tuple[float, ...], bodies: int = 1) -> Program:
    """Return a sampler from noise to a given result, whose velocity is exact.

    Step i reads (1 - s) z + s n and predicts gains[i] (n - z); `bodies` share the weight.
    """

    def velocity(b: Builder, x: fx.Node, way: fx.Node) -> Any:
        nothing = b(aten.mul.Tensor, x, 0.0)
        return b(aten.add.Tensor, b(aten.linear.default, way, WEIGHT), nothing)

    samples = randn(*SIZE), randn(*SIZE)
    parts = {f"body{i}": build.body(velocity, *samples, name="body") for i in range(bodies)}

    def sampler(b: Builder, noise: fx.Node, result: fx.Node) -> Any:
        x, way = noise, b(aten.sub.Tensor, noise, result)
        for i, gain in enumerate(gains):
            scaled = b(aten.mul.Tensor, way, gain)
            predicted = b.call(f"body{i % bodies}", x, scaled)[0]
            change = (SIGMAS[i + 1] - SIGMAS[i]) / gain
            x = b(aten.add.Tensor, x, b(aten.mul.Tensor, predicted, change))
        return x

    program = build.program(sampler, *samples, **parts)
    call_tags.assign(program.root)
    return program


def inputs(count: int) -> list[list[Tensor]]:
    return [[randn(*SIZE, seed=2 * i), randn(*SIZE, seed=2 * i + 1) * 0.5] for i in range(count)]


@cache
def zoo(name: str, text: str = "") -> Program:
    program = traced(name, num_inference_steps=4)
    return Pipeline.parse(text).run(program) if text else program


def test_magnitude_is_the_absolute_value() -> None:
    program = zoo("dit")
    scores = importance(program, "magnitude")
    stored = program.weights()
    assert len(scores) > 20
    assert all(torch.equal(scores[key], stored[key].abs()) for key in scores)


def test_random_is_seeded() -> None:
    program = straight((1.0, 1.0))
    first, again, other = (importance(program, "random", seed=s)[id(WEIGHT)] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("bodies", [1, 2])
def test_taylor_adds_up_what_each_call_says(bodies: int) -> None:
    gains = (1.0, 2.0, 0.5, 1.0)
    source = torch.Generator().manual_seed(3)
    expected = torch.zeros(6, 6)
    for noise, result in inputs(3):
        for gain in gains:
            weight = WEIGHT.detach().clone().requires_grad_()
            predicted = torch.nn.functional.linear(gain * (noise - result), weight)
            size = predicted.detach().square().mean().sqrt()
            loss = (
                predicted / size * torch.randn(SIZE, generator=source)
            ).sum() / predicted.numel() ** 0.5
            (gradient,) = torch.autograd.grad(loss, [weight])
            expected += (WEIGHT * gradient).abs()
    program = straight(gains, bodies)
    scores = importance(program, "taylor", inputs(3), seed=3)
    assert scores.keys() == {id(WEIGHT)}
    torch.testing.assert_close(scores[id(WEIGHT)], expected)


def published(gains: tuple[float, ...], count: int, last: int) -> Tensor:
    """Return |w dL/dw|, L of the `last` least noisy steps, with the schedule that is known."""
    source = torch.Generator().manual_seed(0)
    drawn = [torch.randn(SIZE, generator=source) for _ in range(count)]
    weight = WEIGHT.detach().clone().requires_grad_()
    for gain in gains[-last:]:
        for (noise, result), e in zip(inputs(count), drawn, strict=True):
            predicted = torch.nn.functional.linear(gain * (noise - result), weight)
            (predicted - gain * (e - result)).square().mean().backward()
    assert weight.grad is not None
    return (WEIGHT * weight.grad).abs()


# The fit takes the noise to have a mean square of 1, and the spread of few numbers is not that.
CLOSE = {"rtol": 0.15, "atol": 0.05}


@pytest.mark.parametrize("bodies", [1, 2])
def test_diff_pruning_is_what_was_published(bodies: int) -> None:
    gains = (1.0, 2.0, 0.5, 1.0)
    scores = importance(straight(gains, bodies), "diff-pruning", inputs(40))
    expected = published(gains, 40, 4)
    torch.testing.assert_close(scores[id(WEIGHT)], expected, **CLOSE)


def test_diff_pruning_stops_at_the_threshold() -> None:
    """The losses are gain^2 times the same: the second step has a 25th of the largest."""
    gains = (1.0, 0.2, 1.0, 1.0)
    program = straight(gains)
    stopped = importance(program, "diff-pruning", inputs(40))[id(WEIGHT)]
    torch.testing.assert_close(stopped, published(gains, 40, 2), **CLOSE)
    whole = importance(program, "diff-pruning", inputs(40), threshold=0.01)[id(WEIGHT)]
    torch.testing.assert_close(whole, published(gains, 40, 4), **CLOSE)


@pytest.mark.parametrize("name", ["sd", "dit"])
@pytest.mark.parametrize("method", ["taylor", "diff-pruning"])
def test_unrolled_bodies_say_the_same(name: str, method: Any) -> None:
    """`sd` has both branches in one batch; `dit` predicts a variance, which has no target."""
    plain, unrolled = zoo(name), zoo(name, "unroll,hoist")
    scores, again = (importance(p, method, requests(p, (), 2), seed=1) for p in (plain, unrolled))
    shared = scores.keys() & again.keys()
    assert len(shared) > 15
    for key in shared:
        assert scores[key].shape == plain.weights()[key].shape
        scale = float(scores[key].max())
        torch.testing.assert_close(again[key], scores[key], rtol=1e-2, atol=1e-3 * scale)
    assert sum(float(scores[key].sum()) > 0 for key in shared) > 15


def test_every_branch_and_every_step_counts() -> None:
    """A call that returns nothing but its weight's product has the sum of all of them."""
    program = Pipeline.parse("unroll").run(loops.program(steps=3))
    weights = {
        str(n.target): g.attribute(program.components["denoiser"], str(n.target))
        for n in program.components["denoiser"].graph.find_nodes(op="get_attr")
    }
    name = next(key for key in weights if key.startswith("out") and weights[key].dim() == 2)
    one, two = (
        importance(program, "taylor", requests(program, (), n))[id(weights[name])] for n in (1, 2)
    )
    assert bool((two >= one).all())
    assert float(two.sum()) > 1.5 * float(one.sum())


def test_the_same_numbers_twice() -> None:
    program = zoo("sd", "unroll,hoist,fuse")
    samples = requests(program, (), 2)
    for method in ("taylor", "diff-pruning"):
        first, again, other = (importance(program, method, samples, seed=s) for s in (1, 1, 2))
        assert all(torch.equal(first[key], again[key]) for key in first)
        assert not all(torch.equal(first[key], other[key]) for key in first)


def test_the_program_stays_as_it_is() -> None:
    program = zoo("dit", "unroll")
    before = program.fingerprint()
    importance(program, "diff-pruning", requests(program, (), 1))
    assert program.fingerprint() == before
    assert not any(t.requires_grad for t in program.weights().values())


def test_components_by_name() -> None:
    program = zoo("dit")
    vae = next(name for name in program.components if "vae" in name)
    scores = importance(program, "taylor", requests(program, (), 1), [vae])
    weights = {id(t) for _, t in g.named_tensors(program.components[vae])}
    assert scores.keys() <= weights
    assert any(float(t.sum()) > 0 for t in scores.values())


def test_bad_input() -> None:
    program = zoo("dit")
    with pytest.raises(DiffoptError) as error:
        importance(program, "taylor")
    assert str(error.value) == "importance=taylor is measured: give it 1 request or more"
    vae = next(name for name in program.components if "vae" in name)
    with pytest.raises(DiffoptError) as error:
        importance(program, "diff-pruning", requests(program, (), 1), [vae])
    assert str(error.value) == (
        f"importance=diff-pruning noises what a sampling loop reads and returns, which {vae} is not"
        " called in; write importance=taylor"
    )
