"""Digests of weights: any other value shows, and what is no other value does not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from diffopt.storage.weight_digests import BLOCK, digests
from tests.zoo import CASES, call


def digest(*tensors: Tensor, **named: Tensor) -> str:
    module = nn.Module()
    for name, tensor in {**{f"w{i}": t for i, t in enumerate(tensors)}, **named}.items():
        module.register_buffer(name, tensor)
    return digests({"module": module})["module"]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.complex64]
)
@pytest.mark.parametrize("size", [1, 7, 8 * BLOCK, 24 * BLOCK + 3])
def test_every_value_counts(dtype: torch.dtype, size: int) -> None:
    tensor = torch.ones(size).to(dtype)
    for place in (0, size // 2, size - 1):
        other = torch.ones(size)
        other[place] = -1
        assert digest(other.to(dtype)) != digest(tensor)


def test_shape_type_name_and_order_count() -> None:
    values = torch.arange(6.0)
    rows = torch.arange(16.0 * BLOCK).view(4, -1)
    seen = [
        *(digest(values), digest(values.view(2, 3)), digest(values.to(torch.float64))),
        *(digest(values.to(torch.bfloat16)), digest(other=values), digest(values, values)),
        *(digest(torch.tensor(1.0)), digest(torch.ones(1)), digest(torch.ones(0)), digest()),
        *(digest(rows), digest(rows.flip(0))),
    ]
    assert len(set(seen)) == len(seen)


def test_memory_does_not_count() -> None:
    values = torch.arange(48.0).view(2, 4, 3, 2)
    shifted = torch.arange(-1.0, 48.0)[1:].view(2, 4, 3, 2)
    channels_last = values.to(memory_format=torch.channels_last)
    assert digest(values) == digest(channels_last) == digest(shifted)
    assert digest(torch.ones(3, 4)) == digest(torch.ones(1, 1).expand(3, 4))


def change_nothing(module: nn.Module) -> None:
    module.eval().requires_grad_(False)


def change_temporary_buffer(module: nn.Module) -> None:
    module.register_buffer("table", torch.zeros(3), persistent=False)


def change_buffer(module: nn.Module) -> None:
    module.running_mean[0] += 1


@pytest.mark.parametrize(
    ("change", "shows"),
    [(change_nothing, False), (change_temporary_buffer, False), (change_buffer, True)],
)
def test_buffers_that_are_saved_with_the_weights_count(
    change: Callable[[nn.Module], None], shows: bool
) -> None:
    module = nn.BatchNorm1d(4)
    before = digests({"norm": module})
    change(module)
    assert (digests({"norm": module}) != before) is shows


def test_weights_without_values_are_described() -> None:
    with torch.device("meta"):
        module = nn.Linear(2, 3)
    assert digests({"a": module})["a"] == digests({"b": module})["b"]


def test_only_modules_have_weights() -> None:
    assert digests({"unet": nn.Linear(1, 1), "scheduler": object(), "vae": None}).keys() == {"unet"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["sd", "flux", "svd", "wan"])
def test_a_pipeline_built_again_or_called_has_the_same(name: str) -> None:
    case = CASES[name]
    pipe = case.build()
    before = digests(pipe.components)
    call(pipe, case.inputs(0))
    assert digests(pipe.components) == before == digests(case.build().components)
    assert before
