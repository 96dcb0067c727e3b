"""Rewrites of layers that make them easier to quantize, and leave what they compute as it is.

Bodies share weights, so what is made of a weight for one body is used in all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.analysis.scope import Scope, by_step
from diffopt.execution import trajectories
from diffopt.ir import graph as g
from diffopt.ir import qdq
from diffopt.ir.nodes import args, argument, is_call, replace_node, stored_tensor
from diffopt.ir.program import Program
from diffopt.progress import Progress
from diffopt.quantization import smoothquant, svdquant, weight_rounding
from diffopt.quantization.quantize_body import Format, Formats
from diffopt.quantization.tensor_memo import Shared

aten = torch.ops.aten

FEW = 4
"""In how many steps, of how many requests, layers' inputs are looked at to smooth them."""

# Matrix products


def as_linears(gm: fx.GraphModule) -> None:
    """Write products with a stored matrix as the linear layers that they were before `hoist`."""
    for node in list(gm.graph.nodes):
        bias: fx.Node | None = None
        if is_call(node, aten.mm.default):
            x, turned = args(node)
        elif is_call(node, aten.addmm.default) and not node.kwargs:
            bias, x, turned = args(node)
        else:
            continue
        weight = _turned(turned)
        if weight is None or (bias is not None and bias.meta["val"].ndim != 1):
            continue
        with gm.graph.inserting_before(node):
            new = g.call(gm.graph, aten.linear.default, x, weight, bias, like=node)
        for key in ("module", "where"):
            if key not in new.meta and key in turned.meta:
                new.meta[key] = turned.meta[key]
        replace_node(node, new)


def _turned(node: fx.Node) -> fx.Node | None:
    """Return the stored matrix of which a node is the transpose."""
    if node.op != "call_function" or not node.all_input_nodes:
        return None
    source = node.all_input_nodes[0]
    turns = {aten.t.default: (), aten.transpose.int: (0, 1), aten.permute.default: ([1, 0],)}
    if node.target not in turns or tuple(args(node)[1:]) != turns[node.target]:
        return None
    return source if source.op == "get_attr" and source.meta["val"].ndim == 2 else None


# Concatenations


def split_concats(gm: fx.GraphModule, shared: Shared) -> int:
    """Give each operand of a concatenation that a layer reads a layer of its own; return how many.

    In front of a UNet's shortcuts, the features of two depths lie side by side, and their ranges
    differ: with one scale for both, the narrower ones lose their last bits (Q-Diffusion, Li et al.
    2023, section 4.2). W [a, b] = W_a a + W_b b.
    """
    count = 0
    for layer in qdq.layers(gm):
        pieces = _pieces(layer)
        weight = stored_tensor(gm, layer.weight)
        if not pieces or weight is None:
            continue
        node, total, at = layer.node, None, 0
        with gm.graph.inserting_before(node):
            for piece in pieces:
                end = at + piece.meta["val"].shape[1 if layer.convolution else -1]
                make = functools.partial(_part, weight, at, end)
                part = shared.get(weight, (at, end), make)
                own = g.get_attr(gm, f"{layer.weight.target}_{at}", part)
                rest = args(node)[2:] if total is None else (None, *args(node)[3:])
                made = g.call(gm.graph, node.target, piece, own, *rest, like=node)
                both = (total, made)
                add = aten.add.Tensor
                total = made if total is None else g.call(gm.graph, add, *both, like=node)
                at = end
        assert total is not None
        node.replace_all_uses_with(total)
        gm.graph.erase_node(node)
        count += 1
    return count


def _part(weight: Tensor, start: int, end: int) -> Tensor:
    return weight.detach()[:, start:end].contiguous()


def _pieces(layer: qdq.Layer) -> list[fx.Node]:
    """Return the operands of the concatenation of features that a layer reads, if it reads one."""
    x = layer.x
    if not is_call(x, aten.cat.default) or layer.node.kwargs:
        return []
    rank = x.meta["val"].ndim
    axis = argument(x, 1, "dim", 0) % rank
    if axis != (1 if layer.convolution else rank - 1):
        return []
    if layer.convolution and argument(layer.node, 6, "groups", 1) != 1:
        return []
    return list(args(x)[0])


# Smoothing


def smooth_layers(
    program: Program,
    scope: Scope,
    formats: Formats,
    inputs: Sequence[Sequence[Tensor]],
    scale: weight_rounding.Scale,
    shared: Shared,
    progress: Progress,
) -> int:
    """Move the range of what the loop's layers read into their weights; return of how many.

    Each layer's scales are searched on what it reads in a few steps (SmoothQuant, Xiao et al. 2023,
    with the grid of SVDQuant).
    """
    todo = _to_quantize(program, scope.loop, formats)
    reads = {layer.x for _, layer, _ in todo}
    calls = by_step(scope)
    seen = _sample(program, calls, inputs, reads, progress)
    steps = len({step for step, _ in calls})
    count = 0
    for index, (gm, layer, how) in enumerate(todo):
        progress("smoothing", index / len(todo))
        weight = stored_tensor(gm, layer.weight)
        assert weight is not None

        def search(gm: fx.GraphModule = gm, la: qdq.Layer = layer, how: Format = how) -> Any:
            scaling = None if how.activations == "none" else how.activations
            kinds: Any = {"number": how.number, "group": how.group, "scale": scale}
            kinds |= {"scaling": scaling, "repeats": steps}
            return smoothquant.search(gm, la, seen[la.x], **kinds).scales

        s = shared.get(weight, "smoothing", search)
        if s is not None:
            make = functools.partial(smoothquant.scaled, layer, weight, s)
            smoothquant.smooth_layer(gm, layer, s, shared.get(weight, "smoothed", make))
            count += 1
    return count


def _to_quantize(
    program: Program, names: Iterable[str], formats: Formats
) -> list[tuple[fx.GraphModule, qdq.Layer, Format]]:
    """Return the layers of some components that are to be quantized."""
    bodies = [(program.components[n], formats[n]) for n in names if n in formats]
    return [(gm, la, own[la.node]) for gm, own in bodies for la in qdq.layers(gm) if la.node in own]


def _sample(
    program: Program,
    calls: Mapping[tuple[int, int], fx.Node],
    inputs: Sequence[Sequence[Tensor]],
    nodes: Collection[fx.Node],
    progress: Progress,
) -> dict[fx.Node, list[Tensor]]:
    """Return the values of nodes in a few steps of each request, spread over the trajectory."""
    steps = sorted({step for step, _ in calls})
    chosen = {steps[(2 * i + 1) * len(steps) // (2 * FEW)] for i in range(FEW)}
    found: dict[fx.Node, list[Tensor]] = {node: [] for node in nodes}
    for index, tensors in enumerate(inputs[:FEW]):
        progress("sampling what layers read", index / len(inputs[:FEW]))
        for visit in trajectories.steps(program, calls, tensors, nodes):
            for node, value in visit.values.items():
                # A body that few steps call may not be among the chosen: it keeps one call.
                if visit.step in chosen or not found[node]:
                    found[node].append(value)
    return found


# Branches of low rank


def branch_layers(
    program: Program,
    scope: Scope,
    formats: Formats,
    rank: int,
    scale: weight_rounding.Scale,
    shared: Shared,
    progress: Progress,
) -> int:
    """Take the largest singular values out of weights (SVDQuant); return of how many.

    Those of the loop get branches, and those of components that were named. Weights with fewer than
    four times `rank` inputs or outputs stay: the branch would take about as much as it spares.
    """
    names = [name for name in scope.calls if name not in scope.weights]
    todo = _to_quantize(program, names, formats)
    count = 0
    for index, (gm, layer, how) in enumerate(todo):
        progress("decomposing weights", index / len(todo))
        weight = stored_tensor(gm, layer.weight)
        assert weight is not None
        in_groups = layer.convolution and argument(layer.node, 6, "groups", 1) != 1
        if in_groups or min(len(weight), weight[0].numel()) < 4 * rank:
            continue

        def make(weight: Tensor = weight, how: Format = how) -> tuple[Tensor, Tensor, Tensor]:
            kinds: Any = {"number": how.number, "group": how.group, "scale": scale}
            down, up, _ = svdquant.decompose(weight, rank=rank, **kinds)
            return down, up, svdquant.rest(weight, down, up)

        svdquant.place_lowrank(gm, layer, *shared.get(weight, "branch", make))
        count += 1
    return count
