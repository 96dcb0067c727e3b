"""The pipelines of the zoo run, and depend on their seeds and prompts."""

import pytest
import torch

from tests.zoo import (
    CASES,
    LEFT_OUT,
    SCHEDULERS,
    all_schedulers,
    call,
    generator,
    missing_package,
    modules,
    prompt,
    scheduler_case,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max((x.double() - y.double()).abs().max().item() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_case(name):
    case = CASES[name]
    pipe = case.build()
    first = call(pipe, case.inputs(0))
    assert first
    assert all(torch.equal(a, b) for a, b in zip(first, call(pipe, case.inputs(0)), strict=True))
    assert difference(first, call(case.build(), case.inputs(0))) == 0
    assert difference(first, call(pipe, case.inputs(0) | {"generator": generator(1)})) > 1e-3
    if "prompt" in case.inputs(0):
        assert difference(first, call(pipe, case.inputs(0) | {"prompt": prompt(1)})) > 1e-5

    assert all(tensor.isfinite().all() for tensor in first)
    assert first[0].std() > 0.01
    assert ((first[0] == 0) | (first[0].abs() == 1)).float().mean() < 0.6, "saturated"


@pytest.mark.parametrize("name", CASES)
def test_weights_are_small_and_leave_nothing_constant(name):
    weights = [weight for part in modules(CASES[name].build()) for weight in part.parameters()]
    # Stable Video Diffusion has norms of 32 groups, so that no layer has fewer channels.
    assert sum(weight.nbytes for weight in weights) < (3e6 if name == "svd" else 1e6)
    assert all(weight.dtype == torch.float32 for weight in weights)
    assert not any(weight.requires_grad for weight in weights)
    assert all(weight.std() > 0 for weight in weights if weight.numel() > 1)


@pytest.mark.parametrize(("name", "scheduler"), [row[:2] for row in SCHEDULERS])
def test_scheduler(name, scheduler):
    package = missing_package(scheduler)
    if package:
        pytest.skip(f"needs {package}")
    case = scheduler_case(name)
    pipe = case.build()
    assert type(pipe.scheduler).__name__ == scheduler or scheduler == "UnCLIPScheduler"
    first = call(pipe, case.inputs(0))
    assert difference(first, call(pipe, case.inputs(0))) == 0
    assert difference(first, call(pipe, case.inputs(1))) > 1e-3
    assert all(tensor.isfinite().all() for tensor in first)


def test_every_scheduler_has_a_row_or_a_reason():
    used = {row[1] for row in SCHEDULERS}
    assert len({row[0] for row in SCHEDULERS}) == len(SCHEDULERS)
    assert not used & LEFT_OUT.keys()
    assert sorted(used | LEFT_OUT.keys()) == all_schedulers()
