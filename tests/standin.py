"""The CPU in a GPU's place, to run what runs on GPUs."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffopt.lowering import cuda_runtime


def replace_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put the CPU in the GPU's place; return what streams are asked for, which grows."""
    said: list[str] = []

    def stream(name: str) -> Any:
        return SimpleNamespace(
            wait_stream=lambda other: said.append(f"{name} waits for {other.name}"), name=name
        )

    @contextmanager
    def inside(own: Any) -> Iterator[None]:
        said.append(f"on {own.name}")
        yield

    monkeypatch.setattr(cuda_runtime, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream("own"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream("caller"))
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, own: said.append(f"kept for {own.name}")
    )
    return said
