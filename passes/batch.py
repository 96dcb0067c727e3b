"""Let one run serve several requests: every input and output gets a leading dimension.

Before:

    %noise: float32[1,4,8,8]
    %3: (float32[1,4,8,8]) = unet(%noise, %row)

After `batch(max=8)`, shown with the largest size:

    %noise: float32[8,1,4,8,8]
    %3: (float32[8,1,4,8,8]) = unet(%noise, %row)

No graph fixes that size, so that one engine serves from `min` to `max` requests, each with its own
prompt and seed: `engine.serve([{"prompt": …, "seed": 1}, {"prompt": …, "seed": 2}])`. What depends
on no request (tables of time embeddings, an empty prompt's embedding) is computed once for all.

Not rewritten, but refused, is
- a program to which a pass is yet to come: the others see one request, so this is the last;
- an operator that neither has a batch dimension of its own nor a rule in `torch.vmap`.
"""

from dataclasses import dataclass

from diffopt.core import Context, Pass, option
from diffopt.errors import DiffoptError
from diffopt.ir.program import Program
from diffopt.transforms import request_dimension


@dataclass(frozen=True)
class Batch(Pass):
    """Let one run serve several requests, each with its own prompt and seed."""

    atol = 1e-5
    rtol = 1e-4
    tolerance_reason = "a matrix product over several requests sums in another order"

    max: int = option(8, "the most requests of one run")
    min: int = option(1, "the fewest")

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.max:
            raise DiffoptError(f"min={self.min}, max={self.max}: wants 1 <= min <= max")

    def run(self, program: Program, ctx: Context) -> None:
        """Rewrite the outer graph and all components that an input reaches."""
        request_dimension.batch_root(program.root, self.max)
        program.batch = (self.min, self.max)
        ctx.note("requests of a run", f"{self.min} to {self.max}")
