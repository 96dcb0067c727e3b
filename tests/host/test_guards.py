"""What Python reads of the caller's tensors is checked again by the program and by the engine."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import diffopt
from diffopt.errors import DiffoptError


def normalized(image: Tensor) -> Tensor:
    """Scale an image to -1…1 unless it is so already, as pipelines do."""
    if image.min() < 0:
        return image * 2.0
    return image * 2.0 - 1.0


def pipeline(image: Tensor) -> Tensor:
    return normalized(image).tanh()


def test_program_and_engine_refuse_what_would_take_the_other_branch(tmp_path: Path) -> None:
    program = diffopt.trace(pipeline, components={}, image=torch.rand(2, 2))
    engine = diffopt.build(program, "eager", tmp_path / "guarded.engine")
    program.save(tmp_path / "guarded.program")
    loaded = diffopt.Program.load(tmp_path / "guarded.program")
    inside, outside = torch.full((2, 2), 0.25), torch.full((2, 2), -0.25)
    for run in (program, loaded, engine):
        assert torch.equal(run(image=inside), pipeline(inside))
        with pytest.raises(DiffoptError) as error:
            run(image=outside)
        assert "host/test_guards.py:" in str(error.value)
        assert "if image.min() < 0:" in str(error.value)
