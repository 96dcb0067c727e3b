"""2:4 sparse weights: at most two of every four numbers along an output's inputs are not zero.

Sparse kernels require that of linears along their inputs, and of convolutions along their input
channels, for each pixel of the kernel separately. The weights are dense tensors with zeros: a
program runs without such kernels, and a lowering that has them detects sparse weights by their
values (`is_2_4`, `sparse_layers`), quantized or not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.errors import DiffoptError
from diffopt.ir import graph as g
from diffopt.ir import qdq
from diffopt.ir.nodes import args, module_path, stored_tensor, weight_uses
from diffopt.ir.program import Program

_ROWS = 16  # outputs that are checked first: most dense weights fail there


def fits_2_4(weight: Tensor, groups: int = 1) -> bool:
    """Tell whether a weight [out, in, …] of a layer can be made 2:4 sparse."""
    return weight.dim() >= 2 and groups == 1 and weight.shape[1] % 4 == 0


def mask_2_4(weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """Return which two of every four weights along the inputs to keep: the most important ones.

    Args:
        weight: [out, in, …].
        importance: In the weight's shape; None: |w|.
    """
    if not fits_2_4(weight):
        raise DiffoptError(
            f"a weight of shape {list(weight.shape)} cannot be 2:4 sparse: it wants a multiple of 4"
            " inputs"
        )
    quadruples = _quadruples((weight if importance is None else importance).detach().float().abs())
    kept = quadruples.topk(2, dim=-1).indices
    mask = torch.zeros_like(quadruples, dtype=torch.bool).scatter_(-1, kept, True)
    return mask.flatten(-2).movedim(-1, 1).reshape(weight.shape)


def sparsify(
    program: Program,
    names: Sequence[str],
    wants: Callable[[str, str], bool],
    skip: Callable[[str, str], None],
    importance: Mapping[int, Tensor] | None = None,
    ends: Collection[int] = (),
) -> dict[str, int]:
    """Make weights of layers 2:4 sparse in all bodies; return how many layers and parameters.

    Args:
        program: The program to rewrite.
        names: The components whose layers are pruned.
        wants: Tells, by component and module, whether a layer is selected.
        skip: Called with the path of a layer that is not pruned, and why.
        importance: Of weights by their id, in their shape; |w| for those that are missing.
        ends: The ids of weights of the first and the last layers, which are not pruned.
    """
    uses, by_weight = weight_uses(program), dict[int, list[tuple[str, Tensor]]]()
    for name in names:
        for layer in qdq.layers(program.components[name]):
            module = module_path(layer.node)
            if not wants(name, module):
                continue
            weight = stored_tensor(program.components[name], layer.weight)
            if weight is None:
                skip(f"{name}.{module}", "its weight is quantized: make it sparse before")
            elif id(weight) in ends:
                skip(f"{name}.{module}", "it is the first or the last of the denoiser")
            elif not fits_2_4(weight, layer.groups):
                skip(f"{name}.{module}", "it has no multiple of 4 inputs for each output")
            else:
                by_weight.setdefault(id(weight), []).append((f"{name}.{module}", weight))
    new: dict[int, torch.nn.Parameter] = {}
    for key, layers in by_weight.items():
        path, weight = layers[0]
        if uses[key] != len(layers):
            skip(path, "its weight is also used elsewhere")
            continue
        zeroed = weight.detach() * mask_2_4(weight, (importance or {}).get(key))
        new[key] = torch.nn.Parameter(zeroed, requires_grad=False)
    for gm in program.components.values():
        for name, tensor in list(g.named_tensors(gm)):
            if id(tensor) in new:
                delattr(gm, name)
                gm.register_parameter(name, new[id(tensor)])
    sizes = {"layers": sum(len(by_weight[key]) for key in new)}
    return sizes | {"parameters": sum(tensor.numel() for tensor in new.values())}


def is_2_4(weight: Tensor) -> bool:
    """Tell whether a weight [out, in, …] is 2:4 sparse.

    Most of its quadruples must have two nonzeros: weights that are mostly zero, as of a zeroed
    branch or an initialization, are not 2:4 sparse.
    """
    if not fits_2_4(weight) or weight.numel() == 0:
        return False
    if not _at_most_two(weight[:_ROWS]):
        return False
    counts = (_quadruples(weight) != 0).sum(-1)
    return bool((counts <= 2).all()) and bool((counts == 2).float().mean() > 0.5)


def sparse_layers(gm: fx.GraphModule) -> Iterator[qdq.Layer]:
    """Yield the layers of a body whose weights are 2:4 sparse, quantized ones too."""
    known: dict[int, bool] = {}
    for layer in qdq.layers(gm):
        if layer.groups != 1:
            continue
        values = _values(gm, layer)
        if values is None:
            continue
        if id(values[0]) not in known:
            known[id(values[0])] = is_2_4(_unpacked(*values))
        if known[id(values[0])]:
            yield layer


def _values(gm: fx.GraphModule, layer: qdq.Layer) -> tuple[Tensor, list[int] | None] | None:
    """Return the stored numbers of a weight, and its shape if they are quantized."""
    shape = list(layer.weight.meta["val"].shape)
    if (tensor := stored_tensor(gm, layer.weight)) is not None:
        return tensor, None
    quantized = qdq.weight(layer.weight)
    node: Any = None if quantized is None else quantized.values
    while isinstance(node, fx.Node) and node.op == "call_function":
        node = args(node)[0]  # views, int4 widened to int8
    tensor = stored_tensor(gm, node)
    return None if tensor is None else (tensor, shape)


def _unpacked(tensor: Tensor, shape: list[int] | None) -> Tensor:
    if shape is None:
        return tensor
    if tensor.dtype == torch.uint8:
        tensor = qdq.unpack_int4(tensor, shape)
    return (tensor.float() if tensor.dtype == qdq.FP8 else tensor).reshape(shape)


def _at_most_two(weight: Tensor) -> bool:
    return bool(((_quadruples(weight) != 0).sum(-1) <= 2).all())


def _quadruples(weight: Tensor) -> Tensor:
    """Return a weight as [out, …, in / 4, 4]."""
    last = weight.movedim(1, -1)
    return last.reshape(*last.shape[:-1], -1, 4)
