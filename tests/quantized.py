"""Programs with quantized layers, for passes to work on and targets to lower."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.ir import graph as g
from diffopt.ir import qdq
from diffopt.ir.nodes import stored_tensor
from diffopt.ir.program import Program
from tests.passes.build import body, parameter, program, randn

aten = torch.ops.aten

Ranges = dict[Tensor, tuple[float, float]]
"""The minimum and maximum of the inputs of each weight's layers."""


def pack(weight: Tensor, number: qdq.Number, group: int | None = None) -> qdq.Packed:
    """Round a weight to nearest, with scales of the absolute maximum."""
    wide = weight.detach().float()
    rows = wide.reshape(len(wide), -1, group or wide[0].numel())
    high = qdq.FP8_MAX if number == "fp8" else float(qdq.LIMITS[number][1])
    scales = rows.abs().amax(-1).clamp_min(1e-12) / high
    scaled = (rows / scales[..., None]).reshape(wide.shape)
    if number == "fp8":
        return qdq.Packed.of(number, scaled.to(qdq.FP8), scales[:, 0])
    values = scaled.round().clamp(*qdq.LIMITS[number]).to(torch.int8)
    return qdq.Packed.of(number, values, scales if group else scales[:, 0], group)


def quantized(
    program: Program,
    number: qdq.Number = "int8",
    scaling: qdq.Scaling | None = "static",
    group: int | None = None,
    is_wanted: Callable[[qdq.Layer], bool] = lambda layer: True,
) -> Program:
    """Return a program whose components have quantized layers.

    Args:
        program: The program, which is not changed.
        number: The format of weights; activations are "fp8" if weights are and "int8" otherwise.
        scaling: The scaling of activations; None leaves them in floats.
        group: See `qdq.Packed`; a layer whose rows are no multiple of it has no groups.
        is_wanted: Tells which layers to quantize.
    """
    result = program.clone()
    ranges = _ranges(result) if scaling == "static" else {}
    packed: dict[int, qdq.Packed] = {}
    for gm in result.components.values():
        for layer in qdq.layers(gm):
            weight = stored_tensor(gm, layer.weight)
            if weight is None or not is_wanted(layer):
                continue
            if id(weight) not in packed:
                fits = group is not None and weight[0].numel() % group == 0
                packed[id(weight)] = pack(weight, number, group if fits else None)
            with gm.graph.inserting_before(layer.node):
                _rewrite(gm, layer, packed[id(weight)], scaling, ranges.get(weight))
    result.refresh()
    result.verify()
    return result


def _rewrite(
    gm: fx.GraphModule,
    layer: qdq.Layer,
    packed: qdq.Packed,
    scaling: qdq.Scaling | None,
    extremes: tuple[float, float] | None,
) -> None:
    x, name = layer.x, str(layer.weight.target)
    if scaling is not None:
        if scaling == "rows" and layer.convolution:
            scaling = "dynamic"
        qparams = []
        kind: qdq.Number = "fp8" if packed.number == "fp8" else "int8"
        if scaling == "static":
            assert extremes is not None
            qparams = [
                g.get_attr(gm, f"{name}_{i}", t) for i, t in enumerate(_limits(*extremes, kind))
            ]
        x = qdq.quantize(gm, x, scaling, *qparams, number=kind)
    weight = qdq.place_weight(gm, name, packed, layer.weight.meta["val"].dtype)
    layer.node.update_arg(0, x)
    layer.node.update_arg(1, weight)


def _limits(low: float, high: float, number: qdq.Number) -> list[Tensor]:
    if number == "fp8":
        return [torch.tensor(max(-low, high, 1e-6) / qdq.FP8_MAX)]
    low, high = min(low, 0.0), max(high, 1e-6)
    scale = (high - low) / 255
    return [torch.tensor(scale), torch.tensor(round(-128 - low / scale), dtype=torch.int32)]


def _ranges(program: Program) -> Ranges:
    """Return the extremes of the inputs of each weight's layers in one run."""
    ranges: Ranges = {}

    class Inner(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            layer = qdq.layer(n)
            if layer is not None and layer.weight.op == "get_attr":
                low, high = (float(v) for v in self.env[layer.x].aminmax())
                before = ranges.get(self.env[layer.weight], (low, high))
                ranges[self.env[layer.weight]] = min(low, before[0]), max(high, before[1])
            return super().run_node(n)

    class Outer(fx.Interpreter):
        def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
            return Inner(program.components[str(target)]).run(*args)

    with torch.no_grad():
        Outer(program.root).run(*program.sample_inputs())
    return ranges


def steps(rows: int = 16) -> Program:
    """Return two components that share a weight; each step has its own scales for one of them."""
    weight = pack(parameter(16, 16) * 0.1, "int8")
    image = pack(parameter(4, 4, 3, 3) * 0.1, "int4")

    def one(make: Any, x: fx.Node, scale: fx.Node, zero: fx.Node) -> fx.Node:
        w = qdq.place_weight(make.gm, "shared", weight, torch.float32)
        x = qdq.quantize(make.gm, x, "static", scale, zero)
        y = make(aten.linear.default, x, w, parameter(16))
        return make(aten.linear.default, make(aten.gelu.default, y), parameter(16, 16))

    def other(make: Any, x: fx.Node) -> fx.Node:
        w = qdq.place_weight(make.gm, "shared", weight, torch.float32)
        x = qdq.quantize(make.gm, x, "rows")
        y = make(aten.linear.default, x, w)
        y = qdq.quantize(make.gm, make(aten.view.default, y, [rows // 16, 4, 4, 16]), "dynamic")
        w = qdq.place_weight(make.gm, "image", image, torch.float32)
        return make(aten.conv2d.default, y, w, None, [1, 1], [1, 1])

    x, scale, zero = randn(rows, 16), torch.tensor(0.03), torch.tensor(0, dtype=torch.int32)
    table = torch.tensor([0.02, 0.05])
    zeros = torch.tensor([3, -7], dtype=torch.int32)

    def root(make: Any, x: fx.Node) -> fx.Node:
        for step in (0, 1):
            row = make(aten.select.int, table, 0, step), make(aten.select.int, zeros, 0, step)
            (x,) = make.call("one", x, *row)
        (result,) = make.call("other", x)
        return result

    return program(root, x, one=body(one, x, scale, zero), other=body(other, x))
