"""The target that compiles nothing."""

from pathlib import Path

import torch

from diffopt.engine.engine import build
from tests.sampler import program


def test_bodies_run_operator_by_operator(tmp_path: Path) -> None:
    captured = program()
    engine = build(captured, "eager", tmp_path / "x.engine")
    assert torch.equal(engine(seed=5)["images"], captured(seed=5)["images"])
    assert engine.manifest["components"] == {}
    assert not [name for name in engine.manifest["members"] if name.startswith("kernels/")]


def test_weights_changed_in_place_are_changed_for_the_graphs(tmp_path: Path) -> None:
    captured = program()
    engine = build(captured, "eager", tmp_path / "x.engine")
    with torch.no_grad():
        for name, tensor in captured.components["unet"].named_parameters():
            tensor.mul_(0.5)
            engine.tensors[f"unet.{name}"].mul_(0.5)
    assert torch.equal(engine(seed=0)["images"], captured(seed=0)["images"])
