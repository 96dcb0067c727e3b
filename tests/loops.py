"""Sampling loops with a timestep, a condition and guidance, for the passes that work on loops."""

from typing import Any

import torch
from torch import Tensor, nn

import diffopt
from diffopt.ir.program import Program


class Denoiser(nn.Module):
    """Embed the timestep, attend to the text, modulate by timestep and class."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(4, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(5, width)
        self.modulation = nn.Linear(width, 2 * width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, label: Tensor) -> Tensor:
        angles = t * torch.arange(1, 3, dtype=torch.float32)
        emb = self.time(torch.cat([angles.sin(), angles.cos()])[None].expand(x.shape[0], 4))
        x = x + emb[:, None]
        scale, shift = self.modulation(nn.functional.silu(emb + self.label(label))).chunk(2, dim=1)
        y = x * (1 + scale[:, None]) + shift[:, None]
        scores = self.query(y) @ self.key(text).transpose(1, 2)
        return self.out(scores.softmax(-1) @ self.value(text))


class Loop:
    """Sample with guidance; `order=2` makes a multistep solver, whose first step differs."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.components = {"denoiser": Denoiser().eval().requires_grad_(False)}

    def __call__(
        self,
        text: Tensor,
        label: Tensor,
        generator: torch.Generator,
        steps: int = 4,
        order: int = 1,
    ) -> Tensor:
        x = torch.randn(1, 3, 8, generator=generator)
        both, labels = torch.cat([torch.zeros_like(text), text]), torch.cat([label, label])
        before = None
        times = torch.linspace(1.0, 0.1, steps)
        for i, t in enumerate(times):
            without, with_text = self.components["denoiser"](
                torch.cat([x, x]), t, both, labels
            ).chunk(2)
            noise = without + 3.0 * (with_text - without)
            used = noise if before is None else 1.5 * noise - 0.5 * before
            before = noise if order == 2 else None
            x = x * (1 - 0.1 * t) - 0.2 * times[i] * used
        return x.tanh()


def arguments(seed: int = 0, **more: Any) -> dict[str, Any]:
    """Return the arguments of a call of `Loop`."""
    random = torch.Generator().manual_seed(seed)
    return {
        "text": torch.randn(1, 2, 8, generator=random),
        "label": torch.randint(0, 5, (1,), generator=random),
        "generator": torch.Generator().manual_seed(seed),
        **more,
    }


def program(**more: Any) -> Program:
    """Return the loop as a program."""
    return diffopt.trace(Loop(), **arguments(**more))
