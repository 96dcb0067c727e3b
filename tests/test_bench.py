"""Timing contenders in turn, and comparing what they make."""

import math

import pytest
import torch

from diffopt import bench


def noisy(size: float) -> bench.Make:
    return lambda seed: torch.full((1, 3, 2, 2), 0.5) + size


def test_measure() -> None:
    calls: list[tuple[str, int]] = []

    def counted(name: str, make: bench.Make) -> bench.Make:
        def call(seed: int) -> torch.Tensor:
            calls.append((name, seed))
            return make(seed)

        return call

    told: list[str] = []
    results = bench.measure(
        {"eager": counted("eager", noisy(0)), "near": counted("near", noisy(0.1))},
        "eager",
        rounds=3,
        warmup=2,
        seed=7,
        report=lambda what, fraction: told.append(what),
    )
    assert calls[:4] == [("eager", 7), ("eager", 7), ("near", 7), ("near", 7)]
    assert calls[4:] == [(name, seed) for seed in (7, 8, 9) for name in ("eager", "near")]
    assert told == ["warming up eager", "warming up near", *(f"round {i} of 3" for i in (1, 2, 3))]
    assert [len(result.seconds) for result in results.values()] == [3, 3]
    assert (results["eager"].max_abs, results["eager"].psnr) == (0, math.inf)
    assert results["near"].max_abs == pytest.approx(0.1)
    assert results["near"].psnr == pytest.approx(20)


def test_medians_and_spreads() -> None:
    result = bench.Result(9.0, [1.0, 2.0, 3.0, 4.0, 50.0], 0.0, 0.0)
    assert (result.median, result.spread) == (3.0, 2.0)
    assert bench.Result(1.0, [1.0], 0.0, 0.0).spread == 0.0


def test_compile_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.zoo import CASES

    compiled = []

    def compile(function: object, mode: str | None) -> object:
        compiled.append((getattr(function, "__qualname__", str(function)), mode))
        return function

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, mode: compiled.append((type(self).__name__, mode))
    )
    bench.compile_pipeline(CASES["sd"].build(), "default")
    assert sorted(compiled) == [
        ("AutoencoderKL.decode", "default"),
        ("UNet2DConditionModel", "default"),
    ]
