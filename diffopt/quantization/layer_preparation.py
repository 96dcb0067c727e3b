"""Rewrite layers so that they are easier to quantize, without changing what they compute.

Bodies share weights: the replacement of a weight is computed once and used in all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Collection

import torch
from torch import Tensor, fx

from diffopt.analysis.scope import by_step
from diffopt.execution import trajectories
from diffopt.ir import graph as g
from diffopt.ir import qdq
from diffopt.ir.nodes import args, argument, is_call, replace_node, stored_tensor
from diffopt.quantization import smoothquant, svdquant, weight_rounding
from diffopt.quantization.quantize_body import Calibration, Format
from diffopt.quantization.tensor_memo import TensorMemo

aten = torch.ops.aten

FEW = 4
"""How many steps, and how many requests, smoothing samples inputs of layers from."""

# Matrix products


def restore_linears(gm: fx.GraphModule) -> None:
    """Rewrite products with a stored matrix to the linear layers that they were before `hoist`."""
    for node in list(gm.graph.nodes):
        bias: fx.Node | None = None
        if is_call(node, aten.mm.default):
            x, transposed = args(node)
        elif is_call(node, aten.addmm.default) and not node.kwargs:
            bias, x, transposed = args(node)
        else:
            continue
        weight = _transposed_source(transposed)
        if weight is None or (bias is not None and bias.meta["val"].ndim != 1):
            continue
        with gm.graph.inserting_before(node):
            new = g.call(gm.graph, aten.linear.default, x, weight, bias, like=node)
        for key in ("module", "where"):
            if key not in new.meta and key in transposed.meta:
                new.meta[key] = transposed.meta[key]
        replace_node(node, new)


def _transposed_source(node: fx.Node) -> fx.Node | None:
    """Return the stored matrix that a node transposes; None if it does not."""
    if node.op != "call_function" or not node.all_input_nodes:
        return None
    source = node.all_input_nodes[0]
    transposes = {aten.t.default: (), aten.transpose.int: (0, 1), aten.permute.default: ([1, 0],)}
    if node.target not in transposes or tuple(args(node)[1:]) != transposes[node.target]:
        return None
    return source if source.op == "get_attr" and source.meta["val"].ndim == 2 else None


# Concatenations


def split_concats(gm: fx.GraphModule, memo: TensorMemo) -> int:
    """Split each layer that reads a concatenation into one for each operand; return how many.

    W [a, b] = W_a a + W_b b. In a UNet's up blocks the features of two depths are concatenated, and
    their ranges differ: with one scale for both, the narrower ones lose their last bits
    (Q-Diffusion, Li et al. 2023, section 4.2).
    """
    count = 0
    for layer in qdq.layers(gm):
        operands = _concat_operands(layer)
        weight = stored_tensor(gm, layer.weight)
        if not operands or weight is None:
            continue
        node, total, start = layer.node, None, 0
        with gm.graph.inserting_before(node):
            for operand in operands:
                end = start + operand.meta["val"].shape[1 if layer.convolution else -1]
                part = memo.get(
                    weight, (start, end), functools.partial(_input_slice, weight, start, end)
                )
                weight_slice = g.get_attr(gm, f"{layer.weight.target}_{start}", part)
                rest = args(node)[2:] if total is None else (None, *args(node)[3:])
                term = g.call(gm.graph, node.target, operand, weight_slice, *rest, like=node)
                if total is not None:
                    term = g.call(gm.graph, aten.add.Tensor, total, term, like=node)
                total, start = term, end
        assert total is not None
        node.replace_all_uses_with(total)
        gm.graph.erase_node(node)
        count += 1
    return count


def _input_slice(weight: Tensor, start: int, end: int) -> Tensor:
    return weight.detach()[:, start:end].contiguous()


def _concat_operands(layer: qdq.Layer) -> list[fx.Node]:
    """Return the operands of the concatenation along channels that a layer reads; else none."""
    x = layer.x
    if not is_call(x, aten.cat.default) or layer.node.kwargs:
        return []
    rank = x.meta["val"].ndim
    axis = argument(x, 1, "dim", 0) % rank
    if axis != (1 if layer.convolution else rank - 1):
        return []
    if layer.groups != 1:
        return []
    return list(args(x)[0])


# Smoothing


def smooth_layers(job: Calibration, scale: weight_rounding.Scale, memo: TensorMemo) -> int:
    """Move the input ranges of the loop's layers into their weights; return of how many.

    Each layer's scales are searched on its inputs in a few steps (SmoothQuant, Xiao et al. 2023,
    with the grid of SVDQuant).
    """
    todo = job.layers(job.scope.loop)
    samples = _sample_inputs(job, {layer.x for _, layer, _ in todo})
    steps = len({step for step, _ in by_step(job.scope)})
    count = 0
    for index, (gm, layer, fmt) in enumerate(todo):
        job.progress("smoothing", index / len(todo))
        weight = stored_tensor(gm, layer.weight)
        assert weight is not None

        search = functools.partial(
            smoothquant.search_scales,
            gm,
            layer,
            samples[layer.x],
            rounding=weight_rounding.WeightFormat(fmt.number, fmt.group, scale),
            scaling=None if fmt.activations == "none" else fmt.activations,
            repeats=steps,
        )
        s = memo.get(weight, "smoothing", search).scales
        if s is not None:
            make = functools.partial(smoothquant.smoothed_weight, layer, weight, s)
            smoothquant.smooth_layer(gm, layer, s, memo.get(weight, "smoothed", make))
            count += 1
    return count


def _sample_inputs(job: Calibration, nodes: Collection[fx.Node]) -> dict[fx.Node, list[Tensor]]:
    """Return the values of nodes in a few steps of each request, spread over the trajectory."""
    calls = by_step(job.scope)
    steps = sorted({step for step, _ in calls})
    chosen = {steps[(2 * i + 1) * len(steps) // (2 * FEW)] for i in range(FEW)}
    samples: dict[fx.Node, list[Tensor]] = {node: [] for node in nodes}
    for index, tensors in enumerate(job.inputs[:FEW]):
        job.progress("sampling what layers read", index / len(job.inputs[:FEW]))
        for visit in trajectories.steps(job.program, calls, tensors, nodes):
            for node, value in visit.values.items():
                # A body that none of the chosen steps calls is sampled in its first call.
                if visit.step in chosen or not samples[node]:
                    samples[node].append(value)
    return samples


# Branches of low rank


def add_low_rank_branches(
    job: Calibration, rank: int, scale: weight_rounding.Scale, memo: TensorMemo
) -> int:
    """Move the largest singular values of weights into branches (SVDQuant); return of how many.

    Layers of the loop and of components that were named are rewritten, but none with fewer than
    four times `rank` inputs or outputs: the branch would cost about as much as it saves.
    """
    todo = job.layers(name for name in job.scope.calls if name not in job.scope.weights)
    count = 0
    for index, (gm, layer, fmt) in enumerate(todo):
        job.progress("decomposing weights", index / len(todo))
        weight = stored_tensor(gm, layer.weight)
        assert weight is not None
        if layer.groups != 1 or min(len(weight), weight[0].numel()) < 4 * rank:
            continue

        def make(weight: Tensor = weight, fmt: Format = fmt) -> tuple[Tensor, Tensor, Tensor]:
            down, up, _ = svdquant.decompose(weight, fmt.number, fmt.group, rank=rank, scale=scale)
            return down, up, svdquant.residual_weight(weight, down, up)

        svdquant.place_lowrank(gm, layer, *memo.get(weight, "branch", make))
        count += 1
    return count
