"""Do in one operator what takes several: merge linears, LoRA, scales, norms and a step's glue.

Before (`linears`; then `lora` and `scales`):

    %5: float32[4,8] = aten.linear(%x, %q)
    %6: float32[4,8] = aten.linear(%x, %k)

    %9: float32[4,8] = aten.add.Tensor(aten.linear(%x, %w), aten.mul.Tensor(%up, 0.5))

    %9: float32[4,8] = aten.mul.Tensor(aten.linear(%x, %w), 0.5)

    %9: float32[4,8] = aten.linear(aten.layer_norm(%x, [8], %norm_weight, %norm_bias), %w)

After:

    %4: float32[4,16] = aten.linear(%x, %q_merged_weight)
    %5: (float32[4,8], float32[4,8]) = aten.split_with_sizes(%4, [8, 8], -1)

    %9: float32[4,8] = aten.linear(%x, %w_folded_weight)

    %9: float32[4,8] = aten.linear(%x, %w_folded_weight)

    %9: float32[4,8] = aten.linear(aten.layer_norm(%x, [8], None, None), %w_folded_weight, …)

With `steps`, the guidance and scheduler arithmetic that all steps have moves into the component
that it surrounds: the denoiser is compiled once. What only some steps have stays between the calls.

Not rewritten when
- a weight is also used in another way, in any component: the new weight would come on top of it;
- a layer's result has other users than the one that would be folded into it, or a norm's or a
  scale's result other users than the layers behind it;
- a shift comes before a convolution that pads with zeros;
- a merged weight would be larger than `max-merged-mb`;
- the new weights would not be finite, or (`scales`) are in half precision.

The maths: x W1ᵀ | x W2ᵀ = x [W1; W2]ᵀ, and x Wᵀ + s (x Aᵀ) Bᵀ = x (W + s B A)ᵀ, and
c (x Wᵀ + b) = x (c W)ᵀ + c b, and (s x + t) Wᵀ = x (W s)ᵀ + W t. New weights are computed in
float64 and rounded once.
"""

from dataclasses import dataclass

from diffopt.core import Context, Pass, option
from diffopt.ir.aliasing import clone_aliased_outputs, output_aliases
from diffopt.ir.program import Program
from diffopt.transforms import (
    fold_following,
    fold_lora,
    fold_preceding,
    merge_linears,
    weight_folding,
)
from diffopt.transforms.outline_steps import outline_steps


@dataclass(frozen=True)
class Fuse(Pass):
    """Merge linear layers of one input, LoRA, scales, and the arithmetic between steps."""

    atol = 1e-5
    rtol = 1e-4
    tolerance_reason = (
        "other weights are rounded and a matrix product of another size sums in another order"
    )

    linears: bool = option(True, "merge linear layers that share their input")
    lora: bool = option(True, "merge low-rank adapters into the weights that they change")
    scales: bool = option(True, "fold constant scales and shifts, norms' too, into layers")
    steps: bool = option(True, "outline a step's arithmetic together with its denoiser")
    max_merged_mb: int = option(1024, "make no merged weight that is larger")

    def run(self, program: Program, ctx: Context) -> None:
        """Fold into weights first, so that merged weights are folded ones."""
        counts: dict[str, int] = {}
        before = output_aliases(program)
        if self.lora:
            folded = weight_folding.fold_all(program, fold_lora.find_lora, ctx.skip)
            counts["LoRA merged"] = folded.total()
        if self.scales:
            graphs = program.graphs.values()
            counts["scales combined"] = sum(map(fold_following.combine_scales, graphs))
            folded = weight_folding.fold_all(program, fold_following.find_scale, ctx.skip)
            counts["scales folded"] = folded.total()
            counts |= fold_preceding.fold_preceding(program, ctx.skip)
        if self.linears:
            size = self.max_merged_mb << 20
            counts["linears merged"] = merge_linears.merge_linears(program, size, ctx.skip)
        clone_aliased_outputs(program, before)
        if self.steps:
            outline_steps(program, ctx)
        for what, count in counts.items():
            if count:
                ctx.note(what, count)
