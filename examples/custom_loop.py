"""Optimize a sampling loop of your own: plain PyTorch, no diffusers.

A small denoiser draws points on a ring. The loop is an ordinary function of a seed and a class;
what it needs for diffopt is the mapping `components` that names its modules.

    python examples/custom_loop.py ring.engine
"""

import itertools
import sys

import torch
from torch import Tensor, nn

import diffopt
from diffopt.core import Record


class Denoiser(nn.Module):
    """Predict where a noisy point came from, given the noise level and a class."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.level = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(4, width)
        self.first, self.last = nn.Linear(2, width), nn.Linear(width, 2)

    def forward(self, points: Tensor, level: Tensor, label: Tensor) -> Tensor:
        """Return the clean points (n, 2) for noisy ones (n, 2), a level () and classes (1,)."""
        hidden = self.first(points) + self.level(level[None]) + self.label(label)
        return self.last(nn.functional.silu(hidden))


class Ring:
    """Draw `count` points: a sampling loop as one would write it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.components = {"denoiser": Denoiser().eval().requires_grad_(False)}

    def __call__(
        self, label: Tensor, generator: torch.Generator, steps: int = 20, count: int = 64
    ) -> Tensor:
        """Return `count` points (count, 2) of a class (1,)."""
        points = torch.randn(count, 2, generator=generator)
        levels = torch.linspace(1.0, 0.0, steps + 1)
        for now, after in itertools.pairwise(levels):
            clean = self.components["denoiser"](points, now, label)
            points = clean + (points - clean) * (after / now)
        return points


def main(path: str) -> None:
    """Trace, optimize, build, and compare the engine with the loop."""
    loop = Ring()
    program = diffopt.trace(
        loop, label=torch.tensor([1]), generator=torch.Generator().manual_seed(0)
    )
    program = diffopt.Pipeline.parse("unroll,hoist,simplify,fuse").run(program)
    for record in map(Record.from_json, program.history):
        print(f"{record.text:10} max abs difference {record.max_abs:.1e}")
    engine = diffopt.build(program, "eager", path)
    expected = loop(torch.tensor([3]), torch.Generator().manual_seed(7))
    got = engine(label=torch.tensor([3]), seed=7)
    print(f"engine against loop, new class and seed: {(got - expected).abs().max():.1e}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "ring.engine")
