"""The CPU as a stand-in for a GPU, to run code for GPUs."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffopt.lowering import cuda_runtime


def replace_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the GPU by the CPU; return the log of calls of streams, which grows."""
    log: list[str] = []

    def stream(name: str) -> Any:
        return SimpleNamespace(
            wait_stream=lambda other: log.append(f"{name} waits for {other.name}"),
            synchronize=lambda: log.append(f"{name} is done"),
            name=name,
        )

    @contextmanager
    def inside(current: Any) -> Iterator[None]:
        log.append(f"on {current.name}")
        yield

    monkeypatch.setattr(cuda_runtime, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream("own"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream("caller"))
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(
        torch.Tensor,
        "record_stream",
        lambda tensor, current: log.append(f"kept for {current.name}"),
    )
    return log
