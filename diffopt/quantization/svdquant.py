"""Split the largest singular values off a weight before it is quantized: SVDQuant.

    linear(x, w, b)  becomes  linear(x, r, b) + linear(linear(x, down), up),  r = w - up down

The residual `r` is quantized, the branch has 16 bits; a convolution's branch is one to `rank`
channels with the same kernel, and one of a single pixel. `r` has fewer outliers than `w`, above all
after SmoothQuant has moved them there from the activations (Li et al. 2024, arXiv 2411.05007).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from diffopt.errors import DiffoptError
from diffopt.ir import graph as g
from diffopt.ir import qdq
from diffopt.ir.nodes import args, stored_tensor
from diffopt.quantization import weight_rounding

aten = torch.ops.aten

_EXACT = 512  # rows or columns up to which all singular values are computed


def decompose(
    weight: Tensor,
    number: qdq.Number,
    group: int | None = None,
    *,
    rank: int = 32,
    scale: weight_rounding.Scale = "max",
    iterations: int = 100,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, qdq.Packed]:
    """Return `down` [rank, in, …], `up` [out, rank] and the quantized residual of a weight.

    Alternates (up down)[k+1] = svd(w - q(r[k])) and r[k+1] = w - (up down)[k+1], so that the branch
    compensates for the rounding, until |r - q(r)| falls no more.

    Args:
        weight: [out, in, …].
        number: The residual's number format.
        group: How many weights in a row of it share a scale; None: all of an output.
        rank: Of the branch; at most that of the weight.
        scale: How the scales of the residual are chosen.
        iterations: The most iterations.
        dtype: Of the branch. By default that of a weight of 16 bits, so that the residual
            compensates for its rounding and kernels read it without a cast; else float16.
    """
    dtype = dtype or (weight.dtype if weight.element_size() == 2 else torch.float16)
    exact = weight.detach().float()
    rank = min(rank, len(weight), weight[0].numel())
    best, least = None, math.inf
    lost = torch.zeros_like(exact)
    for _ in range(iterations):
        down, up = (part.to(dtype) for part in _largest((exact - lost).flatten(1), rank))
        remains = exact - _product(down, up).reshape(weight.shape)
        packed = weight_rounding.quantize_weight(remains, number, group, scale)
        lost = weight_rounding.dequantized(packed)
        error = float((remains - lost).norm())
        if error >= least:
            break
        least, best = error, (down.reshape(rank, *weight.shape[1:]), up, packed)
    if best is None:
        raise DiffoptError(f"{iterations} iterations make no branch: allow at least 1")
    return best


def _largest(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return sqrt(S) V [rank, in] and U sqrt(S) [out, rank] of a matrix's truncated SVD."""
    if min(matrix.shape) <= _EXACT:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        v = v.T
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=min(rank + 16, *matrix.shape), niter=4)
    root = s[:rank].sqrt()
    return (v[:, :rank] * root).T.contiguous(), u[:, :rank] * root


def _product(down: Tensor, up: Tensor) -> Tensor:
    return up.float() @ down.float().flatten(1)


def residual_weight(weight: Tensor, down: Tensor, up: Tensor) -> torch.nn.Parameter:
    """Return the residual of a weight without its branch."""
    left = weight.detach().float() - _product(down, up).reshape(weight.shape)
    return torch.nn.Parameter(left.to(weight.dtype), requires_grad=False)


def place_lowrank(
    gm: fx.GraphModule, layer: qdq.Layer, down: Tensor, up: Tensor, left: Tensor | None = None
) -> qdq.Layer:
    """Add a branch to a layer, whose weight becomes the residual; return the layer.

    The branch reads the input before it is quantized; the layer's weight must not be quantized yet.
    `left` is the residual, if it is known.
    """
    x = args(layer.node)[0]  # not `layer.x`: the branch of a layer in front may have replaced it
    weight = stored_tensor(gm, layer.weight)
    if weight is None:
        raise DiffoptError(f"{layer.node.name} has no branch: its weight is quantized already")
    if layer.groups != 1:
        raise DiffoptError(f"{layer.node.name} has no branch: it is a convolution in groups")
    name = str(layer.weight.target)
    left = residual_weight(weight, down, up) if left is None else left
    read = qdq.activation(x)
    source = x if read is None else read.source
    graph, node, target = gm.graph, layer.node, layer.node.target
    ones = [1] * (weight.dim() - 2)
    with graph.inserting_before(node):
        main = g.get_attr(gm, f"{name}_rest", left)
        parts = {"down": down, "up": up.reshape(*up.shape, *ones)}
        first, second = (
            g.to_dtype(graph, g.get_attr(gm, f"{name}_{which}", part), weight.dtype)
            for which, part in parts.items()
        )
        inner = g.call(graph, target, source, first, None, *args(node)[3:], like=node)
        branch = g.call(graph, target, inner, second, like=node)
    with graph.inserting_after(node):
        total = graph.call_function(aten.add.Tensor)
    node.replace_all_uses_with(total)
    node.update_arg(1, main)
    total.args = (node, branch)
    total.meta = {key: node.meta[key] for key in ("module", "where", "val") if key in node.meta}
    return qdq.Layer(node, x, main, layer.bias, layer.convolution)
