"""Digests of the weights of a pipeline's modules, to tell whether two pipelines are the same."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffopt.storage import container

# SHA-256 alone reads 1 GB/s, sums of words 5 to 10: a trace computes no model and must be quick.
# A changed value changes its block's sum; only a permutation within a block of 2 KiB is missed.
BLOCK = 256


def digests(components: Mapping[str, Any]) -> dict[str, str]:
    """Return a digest of the weights of each component that is a module, by name."""
    modules = {n: c for n, c in components.items() if isinstance(c, torch.nn.Module)}
    return {name: digest(module.state_dict()) for name, module in modules.items()}


@dataclasses.dataclass(frozen=True)
class Sealed:
    """A tensor whose memory is somebody else's, and its digest when it was borrowed."""

    tensor: Tensor
    digest: str

    def is_intact(self) -> bool:
        """Tell whether the tensor holds what it held."""
        return digest({"": self.tensor}) == self.digest


def digest(state: Mapping[str, Any]) -> str:
    """Return a digest of a state dict's tensors and their names."""
    result = hashlib.sha256()
    for name, value in sorted(state.items()):
        if not isinstance(value, Tensor):
            continue  # extra state
        result.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        # Tensors on the meta device have no values, and subclasses of libraries no plain memory.
        if type(value) in (Tensor, torch.nn.Parameter) and not value.is_meta:
            _add(result, container.raw_bytes(value))
    return result.hexdigest()


def _add(result: Any, content: memoryview) -> None:
    size = 8 * BLOCK
    end = len(content) - len(content) % size
    words = np.frombuffer(content[:end], dtype=np.int64)
    result.update(words.reshape(-1, BLOCK).sum(axis=1))
    result.update(content[end:])
