"""Rounding weights: scales, numbers, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from diffopt.errors import DiffoptError
from diffopt.ir import qdq
from diffopt.quantization import weight_rounding
from tests.passes.build import randn

W = randn(6, 4, 3, 4, seed=1)


def error(packed: qdq.Packed, weight: Tensor) -> float:
    return float((weight_rounding.dequantized(packed) - weight).norm() / weight.norm())


@pytest.mark.parametrize("group", [None, 8, 12])
@pytest.mark.parametrize("number", ["int4", "int8"])
def test_no_weight_is_further_off_than_half_a_step(number: Any, group: int | None) -> None:
    packed = weight_rounding.quantize_weight(W, number, group)
    off = (weight_rounding.dequantized(packed) - W).abs()
    # Scales of groups are rounded to half precision after the range is taken.
    assert bool((off <= weight_rounding.broadcast_scales(packed) * (0.5 + 0.01)).all())
    assert packed.scales.shape == ((6,) if group is None else (6, 48 // group))
    assert packed.scales.dtype == (torch.float32 if group is None else torch.float16)
    assert packed.shape == W.shape


def test_numbers_are_those_of_torchao() -> None:
    ao = pytest.importorskip("torchao.quantization.quant_primitives")
    for number, (low, high) in qdq.LIMITS.items():
        block = (1, *W.shape[1:])
        symmetric = ao.MappingType.SYMMETRIC
        scale, zero = ao.choose_qparams_affine(
            W, symmetric, block, torch.int8, low, high, eps=qdq.EPS
        )
        wanted = ao.quantize_affine(W, block, scale, zero, torch.int8, low, high)
        packed = weight_rounding.quantize_weight(W, number)
        assert torch.equal(packed.scales, scale.flatten())
        assert torch.equal(weight_rounding.stored_numbers(packed), wanted)


def test_fp8_has_three_bits_behind_the_point() -> None:
    packed = weight_rounding.quantize_weight(W, "fp8")
    off = (weight_rounding.dequantized(packed) - W).abs()
    least = weight_rounding.broadcast_scales(packed) * 2.0**-10
    assert bool((off <= W.abs() * 2.0**-4 + least).all())
    assert float(packed.values.float().abs().amax()) == qdq.FP8_MAX


@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("number", ["int4", "int8", "fp8"])
def test_mse_is_never_worse_and_better_with_4_bits(number: Any, group: int | None) -> None:
    if number == "fp8" and group:
        pytest.skip("has no groups")
    weight = randn(8, 512, seed=2)
    most = weight_rounding.quantize_weight(weight, number, group)
    best = weight_rounding.quantize_weight(weight, number, group, "mse")
    rows = (8, -1, group or 512)

    def squares(packed: qdq.Packed) -> Tensor:
        return (weight_rounding.dequantized(packed) - weight).reshape(rows).square().sum(-1)

    assert bool((squares(best) <= squares(most) * (1 + 1e-6)).all())
    if number == "int4":
        assert error(best, weight) < (0.95 if group is None else 0.98) * error(most, weight)


def test_zeros_stay_zeros() -> None:
    for group in (None, 4):
        packed = weight_rounding.quantize_weight(torch.zeros(2, 8), "int4", group, "mse")
        assert bool((weight_rounding.dequantized(packed) == 0).all())


@pytest.mark.parametrize(
    ("weight", "number", "group", "message"),
    [
        (
            W,
            "int4",
            32,
            "an output's 48 weights are not whole groups of 32: take a group that divides them, "
            "such as 24",
        ),
        (
            W,
            "int4",
            0,
            "an output's 48 weights are not whole groups of 0: take a group that divides them, "
            "such as 1",
        ),
        (W, "fp8", 8, "fp8 weights have one scale for each output: leave the group out"),
        (
            W * float("nan"),
            "int8",
            None,
            "a weight has values that are not finite, so it has no scale",
        ),
    ],
)
def test_what_is_refused(weight: Tensor, number: Any, group: int | None, message: str) -> None:
    with pytest.raises(DiffoptError) as caught:
        weight_rounding.quantize_weight(weight, number, group)
    assert str(caught.value) == message


@pytest.mark.parametrize(("number", "group"), [("int8", None), ("int4", 16), ("fp8", None)])
def test_scales_do_not_depend_on_the_rows_that_are_tried_together(
    number: Any, group: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = randn(24, 64, seed=3)
    whole = weight_rounding.quantize_weight(weight, number, group, "mse")
    monkeypatch.setattr(weight_rounding, "_CACHED", 100)
    parts = weight_rounding.quantize_weight(weight, number, group, "mse")
    assert torch.equal(parts.scales, whole.scales)
    alone = weight_rounding.quantize_weight(weight[3:4], number, group, "mse")
    assert torch.equal(alone.scales[0], whole.scales[3])
