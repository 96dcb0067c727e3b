"""Folds low-rank adapters into the weights that they adapt.

An adapter adds a product of two small weights to a layer: with the weights as matrices,

    x Wᵀ + b + s ((x Aᵀ + a) Bᵀ + c) = x (W + s B A)ᵀ + b + s (B a + c)

The same holds for convolutions if B is one of single pixels.
"""

from functools import partial
from itertools import chain

import torch
from torch import Tensor, fx

from diffopt.ir.matcher import Pattern, Var, named, once, through
from diffopt.ir.nodes import args, conv_geometry, replace_node, same_layout
from diffopt.transforms import canonicalize
from diffopt.transforms.weight_folding import (
    LINEAR,
    Affine,
    Fold,
    Weights,
    double,
    factor_of,
    layer_weights,
    stored_layer,
)

aten = torch.ops.aten


def _module(node: fx.Node) -> fx.GraphModule:
    module = node.graph.owning_module
    assert module is not None
    return module


def _unchanged(node: fx.Node) -> fx.Node:
    """Return the node whose value `node` passes on unchanged."""
    while (source := canonicalize.identity_source(_module(node), node)) is not None:
        node = source
    return node


def _scaled(node: fx.Node) -> tuple[float, fx.Node]:
    """Return a node as a product of a number and another node."""
    scale = 1.0
    while (factor := factor_of(_module(node), node := _unchanged(node))) is not None:
        scale *= factor.number
        node = factor.source
    return scale, node


plain = through(_unchanged, "is a literal")
scaled = through(lambda node: _scaled(node)[1], "is a literal")


@Pattern
def _lora(x: Var, w: Var, b: Var, down: Var, a: Var, up: Var, c: Var) -> Var:
    first = named("first")(stored_layer(plain(x), down, a))
    second = named("second")(stored_layer(plain(first), up, c))
    base = named("base")(stored_layer(plain(x), w, b))
    return once(base) + once(named("branch")(scaled(second)))


def find_lora(gm: fx.GraphModule, name: str, node: fx.Node) -> Fold | None:
    """Return the fold of an adapter, of which `node` is the sum."""
    match = _lora.match(node)
    if not match:
        return None
    layers = base, *_ = match["base"], match["first"], match["second"]
    if not _is_low_rank(*layers) or not same_layout(node, base):
        return None
    pairs = [pair for layer in layers[1:] if (pair := layer_weights(gm, layer)) is not None]
    scale, _ = _scaled(match["branch"])
    shape = args(base)[1].meta["val"].shape
    merged = partial(_merged, pairs, scale, tuple(shape))
    key = (*map(id, chain(*pairs)), scale)
    return Fold(name, node, (base,), merged, key, partial(replace_node, new=base))


def _is_low_rank(base: fx.Node, first: fx.Node, second: fx.Node) -> bool:
    """Tell whether the product of two layers' weights is a weight of the base layer."""
    if not base.target is first.target is second.target:
        return False
    if base.target is LINEAR:
        return True
    kernel = list(args(second)[1].meta["val"].shape[2:])
    one, zero = [1] * len(kernel), [0] * len(kernel)
    is_of_pixels = kernel == one and conv_geometry(second) == (one, zero, one, 1)
    *_, groups = sizes = conv_geometry(base)
    return is_of_pixels and conv_geometry(first) == sizes and groups == 1


def _merged(pairs: list[Weights], scale: float, shape: tuple[int, ...]) -> Affine:
    """Return that W becomes W + s B A, and b becomes b + s (B a + c)."""
    (down, a), (up, c) = [(w.detach().double(), double(b)) for w, b in pairs]
    up = up.flatten(1)
    low_rank = (up @ down.flatten(1)).reshape(shape)
    shift = (0 if a is None else up @ a) + (0 if c is None else c)
    return Affine(
        weight_shift=scale * low_rank,
        output_shift=scale * shift if isinstance(shift, Tensor) else None,
        sources=tuple(chain(*pairs)),
    )
