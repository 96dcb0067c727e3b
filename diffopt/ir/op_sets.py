"""The sets of operators that more than one module asks for, each with one meaning."""

import torch

aten = torch.ops.aten

RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
"""Give the first argument another shape, with the order of its elements kept."""
SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
"""Cut one dimension of the first argument into several results."""
FOLDED_BATCH = {
    **{getattr(aten, f"conv{n}d").default: n + 2 for n in (1, 2, 3)},
    **{getattr(aten, f"conv{n}d").padding: n + 2 for n in (1, 2, 3)},
    aten.conv_transpose1d.default: 3,
    aten.conv_transpose2d.input: 4,
    aten.conv_transpose3d.input: 5,
    aten.group_norm.default: None,
    aten.batch_norm.default: None,
    aten.avg_pool1d.default: 3,
    aten.avg_pool2d.default: 4,
    aten.max_pool2d.default: 4,
    **{getattr(aten, f"upsample_nearest{n}d").vec: n + 2 for n in (1, 2, 3)},
    **{getattr(aten, f"_upsample_nearest_exact{n}d").vec: n + 2 for n in (1, 2, 3)},
    aten.upsample_linear1d.vec: 3,
    aten.upsample_bilinear2d.vec: 4,
    aten.upsample_bicubic2d.vec: 4,
    aten.upsample_trilinear3d.vec: 5,
}
"""With a batch as the first of the first argument's dimensions: so many, or (None) any number."""

# Operators that only say how memory is read: cheaper to repeat in a body than to hand over.
VIEWS = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten.expand.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.alias.default,
        aten.detach.default,
        aten.chunk.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
    }
)
