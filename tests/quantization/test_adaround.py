"""Learned rounding, and what it stands on: blocks of a body, gradients through rounding."""

import operator
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from diffopt.caching import apply_plan
from diffopt.core import Pipeline
from diffopt.errors import DiffoptError
from diffopt.execution import segments, straight_through, trajectories
from diffopt.ir import graph as g
from diffopt.ir import qdq
from diffopt.ir.nodes import stored_tensor
from diffopt.quantization import adaround, smoothquant, svdquant, weight_rounding
from tests.passes.build import Builder, body, parameter, randn
from tests.zoo import CASES, traced

aten = torch.ops.aten

CONV = ([1, 1], [1, 1], [1, 1], 1)


def convolutions(b: Builder, x: fx.Node) -> Any:
    """Two residual blocks, each of two convolutions."""
    for k in range(2):
        y = x
        for i in range(2):
            weight = parameter(8, 8, 3, 3, seed=2 * k + i)
            weight.data *= 0.2
            y = b(aten.conv2d.default, b(aten.silu.default, y), weight, parameter(8), *CONV)
        x = b(aten.add.Tensor, x, y)
    return x


def linears(b: Builder, x: fx.Node) -> Any:
    """Two residual blocks, each an mlp."""
    for k in range(2):
        y = b(aten.layer_norm.default, x, [16])
        up, down = parameter(32, 16, seed=2 * k), parameter(16, 32, seed=2 * k + 1)
        y = b(aten.gelu.default, b(aten.linear.default, y, up))
        x = b(aten.add.Tensor, x, b(aten.linear.default, y, down, parameter(16)))
    return x


def chain(b: Builder, x: fx.Node) -> Any:
    """Two layers and no residual."""
    y = b(aten.gelu.default, b(aten.linear.default, x, parameter(24, 16, seed=1)))
    return b(aten.linear.default, y, parameter(8, 24, seed=2))


SIZES = {convolutions: (2, 8, 6, 6), linears: (2, 10, 16), chain: (2, 10, 16)}


def samples(make: Any, count: int, seed: int = 0) -> list[list[Tensor]]:
    """Return inputs whose channels are correlated, as those of a denoiser are."""
    size = SIZES[make]
    axis = 1 if make is convolutions else -1
    mix = randn(size[axis], size[axis], seed=99)
    return [
        [(randn(*size, seed=seed + i).movedim(axis, -1) @ mix).movedim(-1, axis) * 0.3]
        for i in range(count)
    ]


def quantized(
    gm: fx.GraphModule,
    number: Any = "int4",
    group: int | None = None,
    scaling: Any = "none",
    wide: bool = False,
    but: Collection[str] = (),
) -> fx.GraphModule:
    """Return a copy with layers quantized to the nearest numbers, but for some."""
    copy = g.clone(gm)
    shared: dict[int, qdq.Packed] = {}
    for layer in qdq.layers(copy):
        if layer.node.name in but:
            continue
        weight = stored_tensor(copy, layer.weight)
        assert weight is not None
        fits = group if group and weight[0].numel() % group == 0 else None
        packed = weight_rounding.quantize_weight(weight, number, fits)
        if wide and fits:
            most = weight_rounding.dequantized(packed).flatten(1).abs().amax(1)
            packed = replace(packed, wide=most / 127)
        packed = shared.setdefault(id(weight), packed)
        with copy.graph.inserting_before(layer.node):
            if scaling != "none":
                layer.node.update_arg(0, read(copy, layer, scaling))
            name = str(layer.weight.target)
            layer.node.update_arg(1, qdq.place_weight(copy, name, packed, weight.dtype))
    copy.recompile()
    return copy


def read(gm: fx.GraphModule, layer: qdq.Layer, scaling: Any) -> fx.Node:
    """Insert what a layer reads, quantized."""
    qparams = ()
    if scaling == "static":
        constants = torch.tensor([0.05]), torch.tensor([3], dtype=torch.int32)
        qparams = tuple(g.get_attr(gm, "c", constant) for constant in constants)
    rows = scaling == "rows" and layer.convolution
    return qdq.quantize(gm, layer.x, "dynamic" if rows else scaling, *qparams)


def put(gm: fx.GraphModule, weights: dict[str, qdq.Packed]) -> fx.GraphModule:
    """Return a copy with these weights."""
    copy = g.clone(gm)
    for layer in qdq.layers(copy):
        packed = weights.get(layer.node.name)
        if packed is not None:
            with copy.graph.inserting_before(layer.node):
                dtype = layer.weight.meta["val"].dtype
                layer.node.update_arg(1, qdq.place_weight(copy, "new", packed, dtype))
    copy.recompile()
    return copy


def error(gm: fx.GraphModule, low: fx.GraphModule, calls: Sequence[Sequence[Tensor]]) -> float:
    count = len(g.placeholders(gm))
    with torch.no_grad():
        pairs = [(gm(*call[:count])[0], low(*call)[0]) for call in calls]
    wrong = sum(float((a - b).square().sum()) for a, b in pairs)
    return float((wrong / sum(float(a.square().sum()) for a, _ in pairs)) ** 0.5)


@pytest.mark.parametrize(
    ("make", "number", "group", "scaling"),
    [
        (convolutions, "int4", None, "none"),
        (convolutions, "int4", 24, "static"),
        (convolutions, "int4", None, "dynamic"),
        (linears, "int4", None, "none"),
        (linears, "int4", 8, "rows"),
        (linears, "int4", None, "dynamic"),
        (chain, "int4", 8, "none"),
        (chain, "int8", None, "none"),
    ],
)
def test_learned_rounding_is_ahead_of_the_nearest(
    make: Any, number: Any, group: int | None, scaling: Any
) -> None:
    gm = body(make, *samples(make, 1)[0])
    low = quantized(gm, number, group, scaling)
    learned = adaround.reconstruct(gm, low, samples(make, 24), steps=100)
    assert learned.keys() == {layer.node.name for layer in qdq.layers(low)}
    unseen = samples(make, 8, seed=1000)
    assert error(gm, put(low, learned), unseen) < 0.9 * error(gm, low, unseen)
    for layer in qdq.layers(low):
        # Each number is one of the two around the exact one; the scales stay.
        packed = learned[layer.node.name]
        exact = stored_tensor(gm, {n.node.name: n for n in qdq.layers(gm)}[layer.node.name].weight)
        off = (
            weight_rounding.dequantized(packed) - exact
        ).abs() / weight_rounding.broadcast_scales(packed)
        assert float(off.quantile(0.99)) <= 1.01
        assert packed.group in (None, group)
        assert packed.number == number


def test_weights_that_are_rounded_again() -> None:
    gm = body(linears, *samples(linears, 1)[0])
    low = quantized(gm, group=8, scaling="rows", wide=True)
    learned = adaround.reconstruct(gm, low, samples(linears, 24), steps=100)
    assert all(p.number == "int4" and p.wide is not None for p in learned.values())
    unseen = samples(linears, 8, seed=1000)
    assert error(gm, put(low, learned), unseen) < 0.9 * error(gm, low, unseen)


def test_what_smoothing_and_a_branch_leave_is_learned_too() -> None:
    gm = body(linears, *samples(linears, 1)[0])
    exact = g.clone(gm)
    for layer in qdq.layers(gm):
        smoothed = smoothquant.smooth_layer(
            gm, layer, 2.0 ** randn(layer.weight.meta["val"].shape[1])
        )
        weight = stored_tensor(gm, smoothed.weight)
        assert weight is not None
        down, up, _ = svdquant.decompose(weight, "int4", rank=4, dtype=torch.float32)
        svdquant.place_lowrank(gm, smoothed, down, up)
    branches = [n for n in qdq.layers(gm) if "rest" not in str(n.weight.target)]
    low = quantized(gm, but=[layer.node.name for layer in branches])
    learned = adaround.reconstruct(gm, low, samples(linears, 24), steps=60)
    assert len(learned) == len(branches) / 2
    unseen = samples(linears, 8, seed=1000)
    assert error(exact, put(low, learned), unseen) < 0.95 * error(exact, low, unseen)


def test_scales_of_each_step_are_arguments() -> None:
    gm = body(linears, *samples(linears, 1)[0])
    low = quantized(gm)
    (layer, *_) = qdq.layers(low)
    with low.graph.inserting_before(next(iter(low.graph.nodes)).next):
        scale, zero = (low.graph.placeholder(name) for name in ("scale", "zero"))
    rows = [
        [torch.tensor([0.02 * (1 + i % 3)]), torch.tensor([0], dtype=torch.int32)]
        for i in range(20)
    ]
    for node, value in zip((scale, zero), rows[0], strict=True):
        node.meta["val"] = g.fake(value)
    with low.graph.inserting_before(layer.node):
        layer.node.update_arg(0, qdq.quantize(low, layer.x, "static", scale, zero))
    low.recompile()
    calls = [[*a, *b] for a, b in zip(samples(linears, 20), rows, strict=True)]
    learned = adaround.reconstruct(gm, low, calls, steps=60)
    assert error(gm, put(low, learned), calls) < 0.9 * error(gm, low, calls)


def test_rounding_that_is_worse_on_held_out_samples_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gm = body(linears, *samples(linears, 1)[0])
    low = quantized(gm)
    monkeypatch.setattr(adaround, "_RATE", 100.0)  # one step as far as this is at random
    assert adaround.reconstruct(gm, low, samples(linears, 6), steps=1) == {}


def test_results_are_those_of_the_seed() -> None:
    gm = body(chain, *samples(chain, 1)[0])
    low = quantized(gm)
    runs = [adaround.reconstruct(gm, low, samples(chain, 6), steps=20, seed=s) for s in (1, 1, 2)]
    first, again, other = ([p.values for p in run.values()] for run in runs)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_weight_that_two_layers_share_is_learned_once() -> None:
    weight = parameter(16, 16, seed=5)

    def twice(b: Builder, x: fx.Node) -> Any:
        y = b(aten.tanh.default, b(aten.linear.default, x, weight))
        return b(aten.linear.default, y, weight)

    gm = body(twice, *samples(chain, 1)[0])
    low = quantized(gm)
    learned = adaround.reconstruct(gm, low, samples(chain, 12), steps=60)
    one, two = learned.values()
    assert torch.equal(one.values, two.values)


def test_layers_that_are_not_in_whole_numbers_are_left_alone() -> None:
    gm = body(chain, *samples(chain, 1)[0])
    assert adaround.reconstruct(gm, quantized(gm, "fp8"), samples(chain, 3), steps=2) == {}
    assert adaround.reconstruct(gm, g.clone(gm), samples(chain, 3), steps=2) == {}


def test_one_sample_is_refused() -> None:
    gm = body(chain, *samples(chain, 1)[0])
    with pytest.raises(DiffoptError) as caught:
        adaround.reconstruct(gm, quantized(gm), samples(chain, 1))
    assert str(caught.value) == (
        "rounding is learned from two samples or more, got 1: calibrate on more"
    )


def test_progress_is_told() -> None:
    gm = body(linears, *samples(linears, 1)[0])
    told: list[tuple[str, float | None]] = []
    adaround.reconstruct(
        gm, quantized(gm), samples(linears, 4), steps=2, progress=lambda *row: told.append(row)
    )
    assert [what for what, _ in told[::2]] == ["rounding: block 1 of 2", "rounding: block 2 of 2"]
    assert [fraction for _, fraction in told] == [0, 0.25, 0.5, 0.75]


# Blocks


def test_blocks_end_where_those_of_residual_streams_do() -> None:
    gm = body(convolutions, *samples(convolutions, 1)[0])
    low = quantized(gm, scaling="static")
    layers = [layer.node for layer in qdq.layers(low)]
    _, parts = adaround._cut_both(gm, low, layers)
    assert [[n.name for n in part.ends] for part in parts] == [["add_tensor"], ["add_tensor_1"]]
    assert [[n for n in part.nodes if n in layers] for part in parts] == [layers[:2], layers[2:]]


def test_without_residuals_each_layer_is_a_block() -> None:
    gm = body(chain, *samples(chain, 1)[0])
    low = quantized(gm)
    layers = [layer.node for layer in qdq.layers(low)]
    _, parts = adaround._cut_both(gm, low, layers)
    assert [part.ends for part in parts] == [[node] for node in layers]


def test_parts_compute_what_the_body_does_and_keep_what_is_read_later() -> None:
    def make(b: Builder, x: fx.Node) -> Any:
        early = b(aten.exp.default, x)
        halves = b(aten.split.Tensor, early, 8, -1)
        first = b(torch.ops.aten.mul.Tensor, b(operator.getitem, halves, 0), 2.0)
        second = b(aten.add.Tensor, first, b(operator.getitem, halves, 1))
        return b(aten.cat.default, [second, b(aten.mul.Tensor, x, 3.0)], -1)

    gm = body(make, randn(2, 16))
    named = {n.name: n for n in gm.graph.nodes}
    ends = [[named["mul_tensor"]], [named["add_tensor"]], g.outputs(gm)]
    parts = segments.cut(gm, ends)
    run = segments.Sample(gm, [randn(2, 16, seed=3)])
    results = [run.advance(part, part.constants()) for part in parts]
    assert torch.equal(results[-1][0], gm(randn(2, 16, seed=3))[0])
    assert [sorted(n.name for n in part.kept) for part in parts] == [
        ["exp_default", "mul_tensor", "x"],
        ["add_tensor", "x"],
        [],
    ]
    assert run.values == {}


def test_fewer_samples_are_used_where_memory_is_short() -> None:
    gm = body(linears, *samples(linears, 1)[0])
    low = quantized(gm)
    _, parts = adaround._cut_both(gm, low, [layer.node for layer in qdq.layers(low)])
    calls = samples(linears, 30)
    assert adaround._fitting(calls, parts, 100) == calls
    # Two values of 2 x 10 x 16 floats, before and after quantization.
    few = adaround._fitting(calls, parts, 10 * 4 * 320 * 4 / 2**20)
    assert few == calls[::3]


# Gradients


@pytest.mark.parametrize("scaling", ["static", "dynamic", "rows"])
def test_straight_through_values_are_those_of_the_operators(scaling: Any) -> None:
    x = randn(2, 10, 16, seed=8)
    gm = body(lambda b, x: b(aten.linear.default, x, parameter(8, 16, seed=1)), x)
    low = quantized(gm, scaling=scaling)
    (part,) = segments.cut(low, [g.outputs(low)])
    constants = part.constants()
    (weight,) = (layer.weight for layer in qdq.layers(low))
    for call in (x, 100 * x):
        values = part.run([call], constants, straight_through.estimate)
        torch.testing.assert_close(values[part.ends[0]], low(call)[0], rtol=1e-4, atol=1e-4)
        leaf = call.clone().requires_grad_()
        values = part.run([leaf], constants, straight_through.estimate)
        values[part.ends[0]].sum().backward()
        plain = constants[weight].sum(0).expand_as(x)
        inside = (call / 0.05 + 3).round().clamp(-128, 127) == (call / 0.05 + 3).round()
        if scaling == "static":  # no gradient where it is clipped
            plain = torch.where(inside, plain, 0.0)
            assert bool(inside.all()) == (call is x)
        torch.testing.assert_close(leaf.grad, plain, rtol=1e-4, atol=1e-4)


def test_fp8_lets_gradients_through() -> None:
    x = randn(4, 16).requires_grad_()
    gm = body(lambda b, x: b(aten.mul.Tensor, x, 1.0), x)
    (node,) = g.outputs(gm)
    with gm.graph.inserting_before(g.output_node(gm)):
        low = qdq.quantize(gm, node, "dynamic", number="fp8")
    g.set_outputs(gm, [low])
    (part,) = segments.cut(gm, [g.outputs(gm)])
    values = part.run([x], {}, straight_through.estimate)
    gm.recompile()
    torch.testing.assert_close(values[low], gm(x.detach())[0])
    values[low].sum().backward()
    assert x.grad is not None
    assert float(x.grad.mean()) == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize("make", [convolutions, linears])
def test_calls_that_cannot_be_stacked_are_learned_one_by_one(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gm = body(make, *samples(make, 1)[0])
    low = quantized(gm, scaling="dynamic")
    stacked = adaround.reconstruct(gm, low, samples(make, 10), steps=12)

    def refuse(*_: Any) -> Any:
        raise RuntimeError("no rule")

    monkeypatch.setattr(torch, "vmap", refuse)
    alone = adaround.reconstruct(gm, low, samples(make, 10), steps=12)
    assert stacked.keys() == alone.keys()
    assert stacked
    for name in stacked:
        same = weight_rounding.stored_numbers(stacked[name]) == weight_rounding.stored_numbers(
            alone[name]
        )
        assert float(same.float().mean()) > 0.99


# Denoisers


@cache
def denoiser(name: str) -> tuple[fx.GraphModule, list[list[Tensor]]]:
    """Return a denoiser and its calls over two trajectories."""
    exact = Pipeline.parse("unroll,hoist,simplify,fuse(steps=false)")
    program = exact.run(traced(name), verify=False)
    loop = apply_plan.find_loop(program)
    calls = []
    for seed in range(4):
        inputs = program.prepare(**CASES[name].inputs(seed))
        calls += [visit.arguments for visit in trajectories.steps(program, loop.calls, inputs)]
    return loop.body, calls


@pytest.mark.parametrize("name", ["sd", "pixart"])
def test_denoisers(name: str) -> None:
    gm, calls = denoiser(name)
    low = quantized(gm, scaling="dynamic")
    learned = adaround.reconstruct(gm, low, calls, steps=15)
    assert learned
    assert error(gm, put(low, learned), calls) < error(gm, low, calls)
