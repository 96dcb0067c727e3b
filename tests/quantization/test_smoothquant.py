"""Moving the range of activations into weights."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from diffopt.errors import DiffoptError
from diffopt.ir import graph as g
from diffopt.ir import qdq
from diffopt.quantization import smoothquant, weight_rounding
from tests.passes.build import body, parameter, randn

aten = torch.ops.aten

LAYERS = [
    pytest.param(aten.linear.default, (6, 8), (2, 5, 8), (), id="linear"),
    pytest.param(aten.conv1d.default, (6, 8, 3), (2, 8, 7), ([2], [1], [1], 1), id="conv1d"),
    pytest.param(
        aten.conv2d.default, (6, 8, 3, 3), (2, 8, 7, 7), ([1, 1], [1, 1], [1, 1], 1), id="conv2d"
    ),
    pytest.param(
        aten.conv2d.default, (6, 4, 3, 3), (2, 8, 7, 7), ([1, 1], [1, 1], [1, 1], 2), id="groups"
    ),
]


def layer_of(
    target: Any, shape: tuple[int, ...], x: Tensor, more: Any
) -> tuple[fx.GraphModule, qdq.Layer]:
    weight, bias = parameter(*shape, seed=4).to(x.dtype), parameter(shape[0], seed=5).to(x.dtype)
    gm = body(lambda b, x: b(target, x, b.weight(weight, "w"), bias, *more), x)
    return gm, qdq.layers(gm)[0]


def with_outliers(x: Tensor, axis: int) -> Tensor:
    """Make one of eight channels large."""
    return x * torch.ones(8).index_fill(0, torch.tensor([3]), 30.0).reshape(-1, *[1] * axis)


@pytest.mark.parametrize(("target", "shape", "size", "more"), LAYERS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_the_layer_returns_what_it_did(
    target: Any, shape: Any, size: Any, more: Any, dtype: torch.dtype, rtol: float
) -> None:
    x = randn(*size).to(dtype)
    gm, layer = layer_of(target, shape, x, more)
    (before,) = gm(x)
    s = 2.0 ** randn(8, seed=7)
    smoothed = smoothquant.smooth_layer(gm, layer, s)
    g.prune_unused(gm)
    gm.graph.lint()
    gm.recompile()
    torch.testing.assert_close(gm(x)[0], before, rtol=rtol, atol=rtol)
    assert smoothed.node is layer.node
    assert (qdq.layers(gm)[0].x, qdq.layers(gm)[0].weight) == (smoothed.x, smoothed.weight)
    # What the layer reads now is smaller by s, channel by channel.
    axis = len(size) - 1 if target is aten.linear.default else 1
    (read,) = g.extract_subgraph(gm, g.placeholders(gm), [smoothed.x], "part")(x)
    ratio = (x / read).movedim(axis, 0).flatten(1)
    torch.testing.assert_close(ratio, s.to(dtype)[:, None].expand_as(ratio), rtol=1e-5, atol=0)


def test_scales_are_those_of_the_paper() -> None:
    x, w = torch.tensor([16.0, 1.0, 0.0, 4.0]), torch.tensor([4.0, 1.0, 3.0, 0.0])
    scales = smoothquant.smoothing_scales(x, w, 0.75)
    torch.testing.assert_close(scales, torch.tensor([16**0.75 / 4**0.25, 1.0, 1.0, 1.0]))
    assert smoothquant.smoothing_scales(
        torch.tensor([1e9]), torch.tensor([1e-9]), 0.5
    ).tolist() == [1e4]


@pytest.mark.parametrize(("target", "shape", "size", "more"), LAYERS)
def test_ranges_are_of_input_channels(target: Any, shape: Any, size: Any, more: Any) -> None:
    x = with_outliers(randn(*size), 0 if target is aten.linear.default else len(size) - 2)
    _, layer = layer_of(target, shape, x, more)
    ranges = smoothquant.input_range(layer, [x, x / 2])
    assert int(ranges.argmax()) == 3
    assert float(ranges.max()) == float(x.abs().max())
    weight = parameter(*shape, seed=4).detach().clone()
    # In two groups, channel 3 is the last of what the first half of the outputs reads.
    weight[: 6 // (more[-1] if more else 1), 3] = 100.0
    most = smoothquant.weight_range(layer, weight)
    assert most.shape == (8,)
    assert most.argmax() == 3
    assert (most == 100.0).sum() == 1


@pytest.mark.parametrize(("target", "shape", "size", "more"), LAYERS)
@pytest.mark.parametrize("scaling", ["static", "dynamic", "rows"])
def test_outliers_cost_less_by_as_much_as_was_found(
    target: Any, shape: Any, size: Any, more: Any, scaling: Any
) -> None:
    if scaling == "rows" and target is not aten.linear.default:
        pytest.skip("rows are those of a linear layer")
    samples = [
        with_outliers(randn(*size, seed=i), 0 if not more else len(size) - 2) for i in range(3)
    ]
    gm, layer = layer_of(target, shape, samples[0], more)
    plain = g.clone(gm)
    smoothing = smoothquant.search_scales(gm, layer, samples, scaling=scaling)
    assert smoothing.error < 0.5 * smoothing.plain
    assert smoothing.scales is not None
    assert int(smoothing.scales.argmax()) == 3
    smoothed = smoothquant.smooth_layer(gm, layer, smoothing.scales)
    quantize(gm, smoothed, scaling, samples, smoothing.scales)
    wrong = sum(float((gm(x)[0] - plain(x)[0]).square().sum()) for x in samples)
    bias = torch.zeros(shape[0])
    results = (target(x, parameter(*shape, seed=4), bias, *more) for x in samples)
    power = sum(float(y.square().sum()) for y in results)
    # Errors of weights and of activations are taken for independent.
    assert wrong / power == pytest.approx(smoothing.error, rel=0.2)


def test_a_weight_that_is_read_in_many_steps_takes_less() -> None:
    """What rounding the weight changes is the same in every step, and adds up."""
    samples = [with_outliers(randn(2, 5, 8, seed=i), 0) for i in range(3)]
    gm, layer = layer_of(aten.linear.default, (6, 8), samples[0], ())
    few, many = (
        smoothquant.search_scales(gm, layer, samples, scaling="static", repeats=n) for n in (1, 100)
    )
    assert 0 < many.alpha < few.alpha


def quantize(
    gm: fx.GraphModule, layer: qdq.Layer, scaling: Any, samples: list[Tensor], s: Tensor
) -> None:
    """Quantize a smoothed layer in its graph."""
    weight = g.attribute(gm, str(layer.weight.target))
    with gm.graph.inserting_before(layer.node):
        qparams = ()
        if scaling == "static":
            by = s.reshape(-1, *[1] * (weight.dim() - 2)) if layer.convolution else s
            both = torch.cat([(x / by).flatten() for x in samples])
            op = torch.ops.quantized_decomposed.choose_qparams.tensor
            scale, zero = op(both, -128, 127, qdq.EPS, torch.int8)
            qparams = (
                g.get_attr(gm, "scale", scale.float()),
                g.get_attr(gm, "zero", zero.to(torch.int32)),
            )
        layer.node.update_arg(0, qdq.quantize(gm, layer.x, scaling, *qparams))
        packed = weight_rounding.quantize_weight(weight, "int8")
        layer.node.update_arg(1, qdq.place_weight(gm, "w", packed, weight.dtype))
    gm.recompile()


def test_nothing_is_smoothed_where_that_does_not_help() -> None:
    x = randn(4, 8)
    gm, layer = layer_of(aten.linear.default, (6, 8), x, ())
    smoothing = smoothquant.search_scales(gm, layer, [x], grid=0)
    assert smoothing.scales is None
    assert smoothing.error == smoothing.plain
    zeros = smoothquant.search_scales(gm, layer, [torch.zeros(4, 8)], scaling="dynamic")
    assert zeros.scales is None


def test_what_is_refused() -> None:
    gm, layer = layer_of(aten.linear.default, (6, 8), randn(4, 8), ())
    with pytest.raises(DiffoptError) as caught:
        smoothquant.search_scales(gm, layer, [])
    assert str(caught.value) == ("linear_default has no samples to smooth with: calibrate on some")
