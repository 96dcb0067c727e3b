"""A minimal sampling loop, with every part of a pipeline that an engine stores."""

from typing import Any

import torch
from torch import Tensor, nn

import diffopt
from diffopt.engine.engine import Engine
from diffopt.ir.program import Program


class Denoiser(nn.Module):
    """Predict noise from a latent and a timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.second(nn.functional.silu(self.first(x)) * t)


class Decoder(nn.Module):
    """Make an image in 0…1 of a latent."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 3 * 4 * 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x).sigmoid().view(-1, 3, 4, 4)


class Sampler:
    """Call the denoiser three times and decode what comes out."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.components = {
            "unet": Denoiser().eval().requires_grad_(False),
            "vae": Decoder().eval().requires_grad_(False),
        }

    def __call__(
        self,
        latents: Tensor | None = None,
        generator: torch.Generator | None = None,
        steps: int = 3,
        decode: bool = True,
    ) -> dict[str, Any]:
        x = torch.randn(2, 8, generator=generator) if latents is None else latents
        for t in torch.linspace(1.0, 0.2, steps):
            x = x - 0.3 * self.components["unet"](x, t)
        return {"images": self.components["vae"](x) if decode else x}


def check_images(engine: Engine, program: Program) -> None:
    """Compare the images of an engine of the loop with those of its program."""
    for seed in range(3):
        # Kernels add up in another order than torch's operators.
        images = engine(seed=seed)["images"]
        torch.testing.assert_close(images, program(seed=seed)["images"], atol=1e-6, rtol=1e-5)
    engine.verify()


def program(**arguments: Any) -> Program:
    """Return the sampling loop as a program with a seed or a generator as its parameter.

    Its weights are its own, and may be changed.
    """
    sampler = Sampler()
    arguments = arguments or {"generator": torch.Generator().manual_seed(0)}
    result = diffopt.trace(sampler, source="tests.sampler:Sampler", check=False, **arguments)
    result.borrowed.clear()
    return result


def denoiser() -> Program:
    """Return the loop without its decoder, where one component to compile is enough."""
    return program(generator=torch.Generator().manual_seed(0), decode=False)
