"""Low-rank branches beside quantized layers."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from diffopt.errors import DiffoptError
from diffopt.ir import graph as g
from diffopt.ir import qdq
from diffopt.quantization import smoothquant, svdquant, weight_rounding
from tests.passes.build import Builder, body, parameter, randn

aten = torch.ops.aten


def outliers(*shape: int) -> Tensor:
    """Return weights that are large for one input channel."""
    weight = randn(*shape, seed=3)
    weight[:, 5] *= 12
    return weight


def whole(down: Tensor, up: Tensor, packed: qdq.Packed) -> Tensor:
    branch = up.float() @ down.float().flatten(1)
    return branch.reshape(packed.shape) + weight_rounding.dequantized(packed)


@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("shape", [(48, 64), (40, 32, 3, 3)])
def test_outliers_go_into_the_branch(shape: tuple[int, ...], group: int | None) -> None:
    weight = outliers(*shape)
    plain = weight_rounding.dequantized(weight_rounding.quantize_weight(weight, "int4", group))
    down, up, packed = svdquant.decompose(weight, "int4", group, rank=12)
    assert down.shape == (12, *shape[1:])
    assert up.shape == (shape[0], 12)
    assert down.dtype == up.dtype == torch.float16
    error = float((whole(down, up, packed) - weight).norm())
    assert error < 0.6 * float((plain - weight).norm())


def test_the_first_branch_is_torchs() -> None:
    weight = outliers(48, 64)
    down, up, _ = svdquant.decompose(weight, "int4", rank=5, iterations=1, dtype=torch.float32)
    u, s, v = torch.svd(weight)
    torch.testing.assert_close(up @ down, u[:, :5] * s[:5] @ v[:, :5].T, rtol=1e-4, atol=1e-4)


def test_iterating_helps_and_never_hurts() -> None:
    weight = outliers(48, 64)
    errors = []
    for iterations in (1, 2, 100):
        down, up, packed = svdquant.decompose(weight, "int4", rank=8, iterations=iterations)
        errors.append(float((whole(down, up, packed) - weight).norm()))
    assert errors[0] > errors[1] >= errors[2]
    assert errors[2] < 0.97 * errors[0]


def test_large_weights_are_sampled_without_touching_the_generator() -> None:
    weight = outliers(520, 530)
    state = torch.random.get_rng_state()
    parts = svdquant.decompose(weight, "int4", rank=8, iterations=1, dtype=torch.float32)
    assert torch.equal(torch.random.get_rng_state(), state)
    u, s, v = torch.svd(weight)
    best = float((weight - u[:, :8] * s[:8] @ v[:, :8].T).norm())
    assert float((weight - parts[1] @ parts[0]).norm()) < 1.02 * best


def test_no_iterations_are_refused() -> None:
    with pytest.raises(DiffoptError, match=r"^0 iterations make no branch: allow at least 1$"):
        svdquant.decompose(randn(4, 4), "int4", iterations=0)


CONV = ([2, 2], [1, 1], [1, 1], 1)


@pytest.mark.parametrize(
    ("target", "shape", "x", "more"),
    [
        (aten.linear.default, (6, 8), randn(2, 5, 8), ()),
        (aten.conv2d.default, (6, 8, 3, 3), randn(2, 8, 7, 7), CONV),
        (aten.conv1d.default, (6, 8, 3), randn(2, 8, 7), ([2], [1], [1], 1)),
    ],
)
@pytest.mark.parametrize("is_read_quantized", [False, True])
def test_the_layer_returns_what_it_did(
    target: Any, shape: tuple[int, ...], x: Tensor, more: Any, is_read_quantized: bool
) -> None:
    weight, bias = parameter(*shape, seed=4), parameter(shape[0], seed=5)
    gm = body(lambda b, x: b(target, x, b.weight(weight, "w"), bias, *more), x)
    (before,) = gm(x)
    (layer,) = qdq.layers(gm)
    if is_read_quantized:
        with gm.graph.inserting_before(layer.node):
            layer.node.update_arg(0, qdq.quantize(gm, layer.x, "dynamic"))
        (layer,) = qdq.layers(gm)
    name = layer.node.name
    down, up, packed = svdquant.decompose(weight, "int4", rank=3)
    rest = svdquant.place_lowrank(gm, layer, down, up)
    g.prune_unused(gm)
    gm.graph.lint()
    gm.recompile()
    (after,) = gm(x)
    assert (rest.node.name, rest.node.target) == (name, target)
    assert g.outputs(gm)[0].meta["val"].shape == after.shape == before.shape
    # In half precision the branch is off by 2^-11 of itself, for which the rest makes up.
    limit = 0.2 if is_read_quantized else 1e-4
    torch.testing.assert_close(after, before, rtol=0, atol=limit)
    with gm.graph.inserting_before(rest.node):
        rest.node.update_arg(1, qdq.place_weight(gm, "w", packed, torch.float32))
    gm.recompile()
    expected = target(x, whole(down, up, packed), bias, *more)
    torch.testing.assert_close(gm(x)[0], expected, rtol=0, atol=limit)
    branch = [n for n in gm.graph.nodes if n.target is target and n is not rest.node]
    assert len(branch) == 2
    assert reads(branch[0]).op == "placeholder"  # not what was quantized


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_read_the_branch_of_a_16_bit_layer_as_it_is_stored(dtype: torch.dtype) -> None:
    weight = parameter(32, 48).to(dtype)
    gm = body(lambda make, x: [make(aten.linear.default, x, weight)], randn(2, 48).to(dtype))
    (layer,) = qdq.layers(gm)
    down, up, packed = svdquant.decompose(weight, "int4", rank=3)
    assert down.dtype == up.dtype == dtype
    error = (whole(down, up, packed) - weight.float()).norm()
    plain = (
        weight_rounding.dequantized(weight_rounding.quantize_weight(weight, "int4"))
        - weight.float()
    )
    assert float(error) < float(plain.norm()), "the rest makes up for the branch's rounding"
    svdquant.place_lowrank(gm, layer, down, up)
    assert [la.weight.op for la in qdq.layers(gm)] == ["get_attr"] * 3
    assert not gm.graph.find_nodes(op="call_function", target=aten._to_copy.default)


def reads(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0]


def test_groups_are_refused() -> None:
    weight = parameter(6, 2, 3, 3)
    gm = body(
        lambda b, x: b(aten.conv2d.default, x, weight, None, [1, 1], [0, 0], [1, 1], 2),
        randn(1, 4, 5, 5),
    )
    (layer,) = qdq.layers(gm)
    down, up, _ = svdquant.decompose(weight, "int4", rank=2)
    with pytest.raises(DiffoptError, match=r"^conv2d_default has no branch: it is a conv"):
        svdquant.place_lowrank(gm, layer, down, up)


@pytest.mark.parametrize("is_smoothed", [False, True])
def test_layers_that_read_one_another_get_branches_one_by_one(is_smoothed: bool) -> None:
    weights_of = [parameter(8, 8, seed=k) for k in range(3)]

    def make(b: Builder, x: fx.Node) -> fx.Node:
        for weight in weights_of:
            x = b(aten.linear.default, x, weight)
        return x

    x = randn(3, 8, seed=9)
    gm = body(make, x)
    (before,) = gm(x)
    for layer in qdq.layers(gm):
        last = smoothquant.smooth_layer(gm, layer, 2.0 ** randn(8)) if is_smoothed else layer
        weight = g.attribute(gm, str(last.weight.target))
        down, up, _ = svdquant.decompose(weight, "int4", rank=3)
        svdquant.place_lowrank(gm, last, down, up)
    gm.graph.lint()
    gm.recompile()
    torch.testing.assert_close(gm(x)[0], before, rtol=1e-4, atol=1e-4)
