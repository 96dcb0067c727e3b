"""What each operator does to the labels of what it reads: moves, unites or constrains them.

The table of axes (`axis_rules`) says it for most operators. `RULES` has those of which labels need
more: whether the indices that are kept of an axis still mean the same to the operator. What has no
rule constrains all that it reads, and its name is the reason.
"""

from typing import Any

import torch

from diffopt.pruning.label_propagation import Rule, combine
from diffopt.pruning.label_rules import movement, norms, products

aten = torch.ops.aten

RULES: dict[Any, Rule] = {
    getattr(aten, name): rule
    for rule, names in (
        (movement.strided, "slice"),
        (movement.concatenated, "cat concat concatenate stack"),
        (movement.scattered, "slice_scatter"),
        (movement.paired, "view_as_complex view_as_real"),
        (combine, "copy"),
        (movement.shuffled, "pixel_shuffle pixel_unshuffle"),
        (movement.indexed, "index"),
        (movement.looked_up, "embedding"),
        (products.matmul, "matmul mm bmm addmm baddbmm"),
        (products.product, "einsum"),
        (products.linear, "linear"),
        (products.convolution, "conv1d conv2d conv3d convolution"),
        (products.convolution, "conv_transpose1d conv_transpose2d conv_transpose3d"),
        (products.attention, "scaled_dot_product_attention"),
        (norms.layer_norm, "layer_norm rms_norm"),
        (norms.group_norm, "group_norm"),
        (norms.batch_norm, "batch_norm native_batch_norm _native_batch_norm_legit_no_training"),
    )
    for name in names.split()
}
