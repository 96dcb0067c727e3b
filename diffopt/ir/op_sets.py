"""The sets of operators that more than one module asks for, each with one meaning."""

import torch

aten = torch.ops.aten

RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
"""Give the first argument the shape that the second says, with the order of its elements kept."""
SQUEEZES = (*(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default),)
"""Add or remove dimensions of size 1."""
PERMUTES = (aten.permute.default, aten.transpose.int, aten.t.default)
"""Order the dimensions of the first argument in another way."""
REARRANGEMENTS = (*RESHAPES, *SQUEEZES, *PERMUTES)
"""Have all elements of the first argument, in another shape."""
VIEWS = frozenset(
    {
        *(*REARRANGEMENTS, aten.expand.default, aten.slice.Tensor, aten.select.int),
        *(aten.alias.default, aten.detach.default),
    }
)
"""Say how the first argument's memory is read, mostly without a copy."""
SPLITS = (
    *(aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default),
    *(aten.unsafe_split.Tensor, aten.unsafe_split_with_sizes.default, aten.unsafe_chunk.default),
)
"""Cut one dimension of the first argument into several results."""
COPIES = (aten.clone.default, aten._to_copy.default)
"""Have the first argument's elements in memory of their own."""
STRIDED = (aten.as_strided.default, aten.as_strided_scatter.default)
"""Count places in the memory of the first argument, which must be all of that memory."""
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
"""Have a weight [out, in, places...] as the second argument."""
ROWWISE = (aten.linear.default, aten.layer_norm.default, aten.rms_norm.default)
"""Work on the last dimensions of the first argument; the others are weights."""
NORMS = frozenset(
    {
        *(aten.layer_norm, aten.native_layer_norm, aten.rms_norm, aten._fused_rms_norm),
        *(aten.group_norm, aten.native_group_norm, aten.instance_norm),
    }
)
"""Normalize by statistics of the values themselves, whichever overload: not linear in them."""
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
