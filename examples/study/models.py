"""The models of examples/models, and the arguments of their pipelines."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

FOLDER = Path(__file__).parents[1] / "models"
# The argument that says what to draw.
ARGUMENTS = {"fashion-sd": "prompt", "fashion-dit": "class_labels"}
GUIDANCE = 2.0


def load(name: str) -> Any:
    """Load one of the pipelines."""
    pipe = DiffusionPipeline.from_pretrained(FOLDER / name, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe
