"""Splits work over processes, of which `accelerate launch` or `torchrun` starts one a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt import optional
from diffopt.execution.differentiable import device


class Workers:
    """The processes among which batches are split: this one alone, or those of `accelerate`."""

    def __init__(self, accelerate: bool = False) -> None:
        self._accelerator: Any = None
        if accelerate:
            what = "recover(accelerate=true)"
            library = optional.require("accelerate", what, "'diffopt[diffusers]'")
            self._accelerator = library.Accelerator(cpu=not torch.cuda.is_available())

    @property
    def rank(self) -> int:
        """Which of them this one is."""
        return int(self._accelerator.process_index) if self._accelerator else 0

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self._accelerator.num_processes) if self._accelerator else 1

    @property
    def device(self) -> torch.device:
        """What this one computes on."""
        return torch.device(self._accelerator.device) if self._accelerator else device()

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums of all processes' tensors."""
        if self.count == 1:
            return list(tensors)
        return [self._accelerator.reduce(t, reduction="sum") for t in tensors]

    def wait(self) -> None:
        """Wait until all have come here."""
        if self._accelerator:
            self._accelerator.wait_for_everyone()
