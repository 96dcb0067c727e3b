"""Factorize the weight of a layer into two smaller ones: linears, and convolutions in two forms.

    channel:  linear(x, w, b) or conv(x, w, b)  becomes  layer(layer(x, down), up, b)
    spatial:  conv(x, w, b) with a kernel of kh x kw  becomes  conv(conv(x, down), up, b)

The channel form's first layer has the kernel of the original and `rank` outputs, its second one a
single pixel. The spatial form's kernels are kh x 1 and 1 x kw (Jaderberg et al. 2014). Either way
the weight is reshaped to a matrix W, and the product of the two is the nearest matrix of its rank:
in the norm |W - UV|, or, with second moments M = E[x x^T] of the inputs, in that of the outputs,
tr((W - UV) M (W - UV)^T) (by whitening, as SVD-LLM, Wang et al. 2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from diffopt.ir import graph as g
from diffopt.ir import qdq
from diffopt.ir.nodes import args, conv_geometry
from diffopt.ir.propagation import propagate_layouts

aten = torch.ops.aten

Form = Literal["channel", "spatial"]

PATCH = 4096
"""The largest patch of which all second moments are computed; of larger ones those of channels."""


@dataclass(frozen=True)
class FormCost:
    """The cost of the two layers of one form.

    Attributes:
        flops: Multiply-adds of one run, for a rank of 1.
        parameters: Stored numbers, for a rank of 1.
        whole_flops: Of the original layer.
        whole_parameters: Of the original layer.
    """

    flops: int
    parameters: int
    whole_flops: int
    whole_parameters: int

    @property
    def most(self) -> int:
        """The largest rank that saves both FLOPs and parameters."""
        flops = (self.whole_flops - 1) // self.flops
        return min(flops, (self.whole_parameters - 1) // self.parameters)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A weight as a matrix, and its singular values.

    Attributes:
        form: How the weight is reshaped to a matrix.
        shape: Of the weight.
        matrix: float64, [rows, columns].
        energy: The squared singular values, the largest first.
        basis: The left singular vectors, [rows, len(energy)].
    """

    form: Form
    shape: tuple[int, ...]
    matrix: Tensor
    energy: Tensor
    basis: Tensor

    def kept(self, rank: int) -> float:
        """Return the fraction of the energy in the `rank` largest directions."""
        return float(self.energy[:rank].sum() / self.energy.sum().clamp_min(1e-300))

    def rank_for(self, share: float) -> int:
        """Return the least rank that keeps a fraction of the energy."""
        shares = self.energy.cumsum(0) / self.energy.sum().clamp_min(1e-300)
        return min(int((shares < share - 1e-12).sum()) + 1, len(self.energy))


def forms(layer: qdq.Layer) -> tuple[Form, ...]:
    """Return the forms that a layer supports; none if it is a grouped convolution."""
    if not layer.convolution:
        return ("channel",)
    if conv_geometry(layer.node)[-1] != 1:
        return ()
    shape = layer.weight.meta["val"].shape
    return ("channel", "spatial") if len(shape) == 4 and min(shape[2:]) > 1 else ("channel",)


def full_rank(weight: Tensor) -> int:
    """Return the rank that a weight [out, in, …] can have at most."""
    return min(len(weight), weight[0].numel())


def cost(layer: qdq.Layer, form: Form) -> FormCost:
    """Return the cost of a layer in a form."""
    weight, output = layer.weight.meta["val"], layer.node.meta["val"]
    out, inputs = len(weight), weight[0].numel()
    positions = output.numel() // out  # of which each is computed for every output
    whole = out * inputs * positions, out * inputs
    if form == "channel":
        return FormCost((inputs + out) * positions, inputs + out, *whole)
    down, up = weight.shape[1] * weight.shape[2], out * weight.shape[3]
    wide = output.numel() // out // output.shape[-1] * layer.x.meta["val"].shape[-1]
    return FormCost(down * wide + up * positions, down + up, *whole)


def spectrum(weight: Tensor, form: Form, moments: Tensor | None = None) -> Spectrum:
    """Decompose a weight [out, in, …].

    Args:
        weight: Of a linear or a convolution without groups.
        form: How it is reshaped to a matrix.
        moments: Of the layer's inputs; see `second_moments`.
    """
    matrix = _matrix(weight.detach().double(), form)
    if moments is not None:
        moments = _moments_of_columns(moments.double(), weight.shape, form)
    energy, basis = _directions(matrix, moments)
    return Spectrum(form, tuple(weight.shape), matrix, energy, basis)


def factorize(decomposed: Spectrum, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the weights of the two layers, the first [rank, in, …] and the second [out, rank, …].

    U U^T W, with U the largest directions of the outputs, is the nearest matrix of this rank.
    """
    basis = decomposed.basis[:, :rank]
    down = basis.T @ decomposed.matrix
    # Balance the ranges of both layers, so that both can be quantized.
    root = down.norm(dim=1).sqrt().clamp_min(1e-12)
    down, up = down / root[:, None], basis * root
    out, inputs, *kernel = decomposed.shape
    if decomposed.form == "spatial":
        first = down.reshape(rank, inputs, kernel[0], 1)
        second = up.reshape(out, kernel[1], rank).transpose(1, 2).reshape(out, rank, 1, kernel[1])
    else:
        first = down.reshape(rank, inputs, *kernel)
        second = up.reshape(out, rank, *[1] * len(kernel))
    return _parameter(first, dtype), _parameter(second, dtype)


def place_factors(
    gm: fx.GraphModule, layer: qdq.Layer, form: Form, down: Tensor, up: Tensor
) -> None:
    """Replace a layer by two."""
    graph, node, name = gm.graph, layer.node, str(layer.weight.target)
    x = args(node)[0]  # not `layer.x`, which two layers may have replaced
    early, late = _geometries(layer, form)
    with graph.inserting_before(node):
        weights = [
            g.get_attr(gm, f"{name}_{which}", tensor)
            for which, tensor in (("down", down), ("up", up))
        ]
        inner = g.call(graph, node.target, x, weights[0], None, *early, like=node)
        both = g.call(graph, node.target, inner, weights[1], layer.bias, *late, like=node)
    node.replace_all_uses_with(both)
    graph.erase_node(node)
    propagate_layouts(gm, {both})


def _geometries(layer: qdq.Layer, form: Form) -> tuple[tuple[list[int], ...], ...]:
    """Return strides, paddings and dilations of the first layer, and of the second."""
    if not layer.convolution:
        return (), ()
    both = conv_geometry(layer.node)[:3]
    if form == "channel":
        return both, ()
    neutral = 1, 0, 1
    early = tuple([one[0], plain] for one, plain in zip(both, neutral, strict=True))
    return early, tuple([plain, one[1]] for one, plain in zip(both, neutral, strict=True))


def _parameter(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.nn.Parameter(tensor.to(dtype).contiguous(), requires_grad=False)


def _matrix(weight: Tensor, form: Form) -> Tensor:
    if form == "channel":
        return weight.flatten(1)
    out, inputs, high, wide = weight.shape
    return weight.permute(0, 3, 1, 2).reshape(out * wide, inputs * high)


def _directions(matrix: Tensor, moments: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return squared singular values, the largest first, and the left singular vectors."""
    if moments is not None:
        # Regularize, so that directions that calibration has not seen are not dropped.
        ridge = 1e-4 * moments.diagonal().mean()
        moments = moments + ridge * torch.eye(len(moments), dtype=moments.dtype)
    if len(matrix) <= matrix.shape[1]:
        gram = matrix @ matrix.T if moments is None else matrix @ moments @ matrix.T
        energy, basis = torch.linalg.eigh(gram)
        return energy.flip(0).clamp_min(0), basis.flip(1)
    root = None if moments is None else torch.linalg.cholesky(moments)
    scaled = matrix if root is None else matrix @ root
    energy, right = torch.linalg.eigh(scaled.T @ scaled)
    energy = energy.flip(0).clamp_min(0)
    left = scaled @ right.flip(1)
    # QR orthonormalizes directions of no energy, which the division cannot scale.
    return energy, torch.linalg.qr(left / left.norm(dim=0).clamp_min(1e-12))[0]


# Second moments of inputs


def second_moments(layer: qdq.Layer, x: Tensor) -> tuple[Tensor, int]:
    """Return the sum of x x^T over rows x [n] of a layer's input, [n, n], and how many rows.

    A convolution's rows are its patches, or the pixels' channels where patches are large.
    """
    weight = layer.weight.meta["val"]
    if not layer.convolution:
        rows = x.reshape(-1, weight.shape[1]).float()
    elif weight.dim() == 4 and weight[0].numel() <= PATCH:
        stride, padding, dilation = map(tuple, conv_geometry(layer.node)[:3])
        kernel = tuple(weight.shape[2:])
        patches = torch.nn.functional.unfold(x.float(), kernel, dilation, padding, stride)
        rows = patches.transpose(1, 2).flatten(0, 1)
    else:
        rows = x.float().movedim(1, -1).flatten(0, -2)
    return rows.T @ rows, len(rows)


def _moments_of_columns(moments: Tensor, shape: torch.Size, form: Form) -> Tensor:
    """Return the moments of the columns of a weight's matrix in a form."""
    inputs, kernel = shape[1], shape[2:]
    if len(moments) == inputs and math.prod(kernel) > 1:
        moments = torch.kron(moments, torch.eye(math.prod(kernel), dtype=moments.dtype))
    if form == "channel":
        return moments
    high, wide = kernel
    each = moments.view(inputs, high, wide, inputs, high, wide).diagonal(dim1=2, dim2=5)
    return each.sum(-1).reshape(inputs * high, inputs * high)
