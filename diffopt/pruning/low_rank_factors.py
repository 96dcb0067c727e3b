"""Factors the weight of a layer into two smaller ones: linears, and convolutions in two forms.

    channel:  linear(x, w, b) or conv(x, w, b)  becomes  layer(layer(x, down), up, b)
    spatial:  conv(x, w, b) with a kernel of kh x kw  becomes  conv(conv(x, down), up, b)

The channel form's first layer has the kernel of the original and `rank` outputs, its second one a
single pixel. The spatial form's kernels are kh x 1 and 1 x kw (Jaderberg et al. 2014). Either way
the weight is a matrix, here called so, of which the product of the two is nearest for its rank: in
the norm of the matrix, or in that of what the layer computes from inputs whose second moments are
given (as SVD-LLM, Wang et al. 2024, by whitening).
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
"""Of patches of up to so many numbers all second moments are taken; else those of channels."""


@dataclass(frozen=True)
class Cost:
    """What the layers of one form cost.

    Attributes:
        flops: Multiply-adds of one run, for each of `rank`.
        parameters: Numbers stored, for each of `rank`.
        whole_flops: Of the layer as it is.
        whole_parameters: Of the layer as it is.
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
    """A weight as a matrix, and what each direction of its outputs weighs.

    Attributes:
        form: How the weight is a matrix.
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
        """Return the share of the energy that the largest `rank` directions have."""
        return float(self.energy[:rank].sum() / self.energy.sum().clamp_min(1e-300))

    def rank_for(self, share: float) -> int:
        """Return the least rank that keeps a share of the energy."""
        shares = self.energy.cumsum(0) / self.energy.sum().clamp_min(1e-300)
        return min(int((shares < share - 1e-12).sum()) + 1, len(self.energy))


def forms(layer: qdq.Layer) -> tuple[Form, ...]:
    """Return the forms that a layer can have; none if it is a convolution in groups."""
    if not layer.convolution:
        return ("channel",)
    if conv_geometry(layer.node)[-1] != 1:
        return ()
    shape = layer.weight.meta["val"].shape
    return ("channel", "spatial") if len(shape) == 4 and min(shape[2:]) > 1 else ("channel",)


def full_rank(weight: Tensor) -> int:
    """Return the rank that a weight [out, in, …] can have at most."""
    return min(len(weight), weight[0].numel())


def cost(layer: qdq.Layer, form: Form) -> Cost:
    """Return what a layer costs in a form."""
    weight, made = layer.weight.meta["val"], layer.node.meta["val"]
    out, taken = len(weight), weight[0].numel()
    places = made.numel() // out  # of which each is computed for every output
    whole = out * taken * places, out * taken
    if form == "channel":
        return Cost((taken + out) * places, taken + out, *whole)
    down, up = weight.shape[1] * weight.shape[2], out * weight.shape[3]
    wide = made.numel() // out // made.shape[-1] * layer.x.meta["val"].shape[-1]
    return Cost(down * wide + up * places, down + up, *whole)


def spectrum(weight: Tensor, form: Form, moments: Tensor | None = None) -> Spectrum:
    """Decompose a weight [out, in, …].

    Args:
        weight: Of a linear or a convolution without groups.
        form: How it is a matrix.
        moments: Of what the layer reads; see `second_moments`.
    """
    matrix = _matrix(weight.detach().double(), form)
    if moments is not None:
        moments = _fitting(moments.double(), weight.shape, form)
    energy, basis = _directions(matrix, moments)
    return Spectrum(form, tuple(weight.shape), matrix, energy, basis)


def factors(found: Spectrum, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the weights of the two layers, the first [rank, in, …] and the second [out, rank, …].

    The nearest product is the projection of the matrix onto the largest directions of the outputs.
    """
    basis = found.basis[:, :rank]
    down = basis.T @ found.matrix
    # Both layers have about the same range, so that none is hard to store in few bits.
    root = down.norm(dim=1).sqrt().clamp_min(1e-12)
    down, up = down / root[:, None], basis * root
    out, taken, *kernel = found.shape
    if found.form == "spatial":
        first = down.reshape(rank, taken, kernel[0], 1)
        second = up.reshape(out, kernel[1], rank).transpose(1, 2).reshape(out, rank, 1, kernel[1])
    else:
        first = down.reshape(rank, taken, *kernel)
        second = up.reshape(out, rank, *[1] * len(kernel))
    return _parameter(first, dtype), _parameter(second, dtype)


def place(gm: fx.GraphModule, layer: qdq.Layer, form: Form, first: Tensor, second: Tensor) -> None:
    """Put two layers in the place of one."""
    graph, node, name = gm.graph, layer.node, str(layer.weight.target)
    x = args(node)[0]  # not `layer.x`, in whose place two layers may be by now
    early, late = _geometries(layer, form)
    with graph.inserting_before(node):
        weights = [
            g.get_attr(gm, f"{name}_{which}", tensor)
            for which, tensor in (("down", first), ("up", second))
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
    out, taken, high, wide = weight.shape
    return weight.permute(0, 3, 1, 2).reshape(out * wide, taken * high)


def _directions(matrix: Tensor, moments: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return squared singular values, the largest first, and the left singular vectors."""
    if moments is not None:
        # A little of every direction, so that what calibration has not seen is not thrown away.
        some = 1e-4 * moments.diagonal().mean()
        moments = moments + some * torch.eye(len(moments), dtype=moments.dtype)
    if len(matrix) <= matrix.shape[1]:
        gram = matrix @ matrix.T if moments is None else matrix @ moments @ matrix.T
        energy, basis = torch.linalg.eigh(gram)
        return energy.flip(0).clamp_min(0), basis.flip(1)
    root = None if moments is None else torch.linalg.cholesky(moments)
    scaled = matrix if root is None else matrix @ root
    energy, right = torch.linalg.eigh(scaled.T @ scaled)
    energy = energy.flip(0).clamp_min(0)
    made = scaled @ right.flip(1)
    # Directions of no energy are turned to zero by it, whatever they are divided by.
    return energy, torch.linalg.qr(made / made.norm(dim=0).clamp_min(1e-12))[0]


# Second moments of what layers read


def second_moments(layer: qdq.Layer, x: Tensor) -> tuple[Tensor, int]:
    """Return the sum of the products of the n inputs of one output, [n, n], and of how many.

    For a convolution these are the numbers of a patch, or its channels where patches are large.
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


def _fitting(moments: Tensor, shape: torch.Size, form: Form) -> Tensor:
    """Return moments for the columns of a weight's matrix in a form."""
    taken, kernel = shape[1], shape[2:]
    if len(moments) == taken and math.prod(kernel) > 1:
        moments = torch.kron(moments, torch.eye(math.prod(kernel), dtype=moments.dtype))
    if form == "channel":
        return moments
    high, wide = kernel
    each = moments.view(taken, high, wide, taken, high, wide).diagonal(dim1=2, dim2=5)
    return each.sum(-1).reshape(taken * high, taken * high)
