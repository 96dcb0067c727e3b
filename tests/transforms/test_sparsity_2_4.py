"""2:4 sparse weights: masks, how they are found in programs, and which devices refuse them."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

from diffopt.engine import engine
from diffopt.errors import DiffoptError
from diffopt.ir import qdq
from diffopt.ir.program import Program
from diffopt.lowering import legality
from diffopt.lowering.hardware import hardware
from diffopt.lowering.target import parse_target
from diffopt.lowering.trt import builder, library
from diffopt.quantization import weight_rounding
from diffopt.targets.tensorrt import Tensorrt
from diffopt.transforms import sparsity_2_4
from tests.passes.build import Builder, body, parameter, program, randn

aten = torch.ops.aten


def pruned(weight: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(weight * sparsity_2_4.mask_2_4(weight), requires_grad=False)


def test_the_two_largest_of_four_stay() -> None:
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.0, 0.1, -0.3, 0.2]])
    mask = sparsity_2_4.mask_2_4(weight)
    assert mask.tolist() == [[False, True, True, False, False, False, True, True]]


def test_what_is_more_important_stays() -> None:
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0]])
    mask = sparsity_2_4.mask_2_4(weight, weight * torch.tensor([10.0, 1.0, 1.0, 1.0]))
    assert mask.tolist() == [[True, True, False, False]]


def test_convolutions_are_sparse_along_their_input_channels() -> None:
    weight = randn(6, 8, 3, 3)
    mask = sparsity_2_4.mask_2_4(weight)
    assert mask.shape == weight.shape
    fours = mask.unflatten(1, (2, 4))
    assert (fours.sum(2) == 2).all()


def test_a_mask_keeps_most() -> None:
    weight = randn(32, 64)
    least = weight.abs().unflatten(1, (16, 4)).sort(-1).values[..., :2].pow(2).sum()
    torch.testing.assert_close((weight - pruned(weight)).pow(2).sum(), least)


def test_three_inputs_do_not_fit() -> None:
    message = r"a weight of shape \[4, 6\] cannot be 2:4 sparse: it wants a multiple of 4 inputs"
    with pytest.raises(DiffoptError, match=f"^{message}$"):
        sparsity_2_4.mask_2_4(randn(4, 6))
    assert not sparsity_2_4.is_2_4(randn(4, 6))


@pytest.mark.parametrize("shape", [(32, 64), (40, 8, 3, 3), (8, 16, 5)])
def test_what_is_sparse(shape: tuple[int, ...]) -> None:
    weight = randn(*shape)
    assert not sparsity_2_4.is_2_4(weight)
    assert sparsity_2_4.is_2_4(pruned(weight))
    assert not sparsity_2_4.is_2_4(torch.zeros(shape)), "an empty layer is not pruned"
    last = pruned(weight).data
    last[-1, :3] = 1.0
    assert not sparsity_2_4.is_2_4(last), "the last row has three"
    assert not sparsity_2_4.is_2_4(torch.nn.functional.dropout(weight, 0.5))


def layer(weight: torch.nn.Parameter, *packed: object) -> Program:
    """Return a program of one component with one layer, quantized if a format is given."""

    def make(at: Builder, x: object) -> object:
        if not packed:
            return at(aten.linear.default, x, weight)
        quantized = weight_rounding.quantize_weight(weight, *packed)  # type: ignore[arg-type]
        node = qdq.place_weight(at.gm, "weight", quantized, weight.dtype)
        return at(aten.linear.default, x, node)

    x = randn(2, weight.shape[1])
    return program(lambda at, x: at.call("net", x)[0], x, net=body(make, x))


@pytest.mark.parametrize("packed", [(), ("int8",), ("int4",), ("int4", 16), ("fp8",)])
def test_layers_are_found_quantized_or_not(packed: tuple[object, ...]) -> None:
    dense, sparse = parameter(16, 32), pruned(parameter(16, 32))
    (match,) = sparsity_2_4.sparse_layers(layer(sparse, *packed).components["net"])
    assert match.node.name == "linear_default"
    assert not list(sparsity_2_4.sparse_layers(layer(dense, *packed).components["net"]))


def test_convolutions_in_groups_are_not_sparse() -> None:
    weight = pruned(parameter(8, 4, 3, 3))

    def make(at: Builder, x: object) -> object:
        return at(aten.conv2d.default, x, weight, None, [1, 1], [1, 1], [1, 1], 2)

    assert not list(sparsity_2_4.sparse_layers(body(make, randn(1, 8, 4, 4))))


def test_all_layers_of_bodies_that_share_weights() -> None:
    shared, x = parameter(16, 32), randn(2, 32)
    odd, tied = parameter(6, 30), parameter(16, 32, seed=1)

    def first(at: Builder, x: fx.Node) -> list[fx.Node]:
        half = at(aten.slice.Tensor, x, 1, 0, 30)
        linears = [at(aten.linear.default, x, w) for w in (shared, tied)]
        return [*linears, at(aten.linear.default, half, odd), at(aten.mul.Tensor, tied, 2.0)]

    parts = {
        "one": body(first, x),
        "two": body(lambda at, x: at(aten.linear.default, x, shared), x),
    }
    sampler = program(lambda at, x: [*at.call("one", x), *at.call("two", x)], x, **parts)
    skipped: list[str] = []
    sizes = sparsity_2_4.sparsify(
        sampler,
        ["one", "two"],
        lambda component, module: True,
        lambda where, why: skipped.append(f"{where}: {why}"),
    )
    sampler.refresh()
    sampler.verify()
    assert sizes == {"layers": 2, "parameters": 512}
    assert skipped == [
        "one.linear_default_2: it has no multiple of 4 inputs for each output",
        "one.linear_default_1: its weight is also used elsewhere",
    ]
    sparse = [next(sparsity_2_4.sparse_layers(sampler.components[n])).node.name for n in parts]
    assert sparse == ["linear_default"] * 2
    assert len(sampler.weights()) == 3, "the one is the other's"


LACKING = (
    "in net the weight of linear_default is 2:4 sparse, and cpu has no 2:4 sparse products: they"
    " need a GPU of compute capability 8.0; prune to another pattern, or take the target eager"
)


def test_devices_without_such_kernels_refuse(tmp_path: Path) -> None:
    sparse = layer(pruned(parameter(16, 32)))
    assert legality.unsupported(sparse, hardware("cpu")) == LACKING
    assert legality.unsupported(sparse, hardware("h100")) is None
    assert legality.unsupported(layer(parameter(16, 32)), hardware("cpu")) is None
    with pytest.raises(DiffoptError) as error:
        engine.build(sparse, "cpu", tmp_path / "out.engine")
    assert error.value.message == f"target cpu cannot take this program: {LACKING}"
    assert not list(tmp_path.iterdir())


def test_the_eager_target_computes_with_the_zeros(tmp_path: Path) -> None:
    sparse = layer(pruned(parameter(16, 32)))
    engine.build(sparse, "eager", tmp_path / "out.engine")
    assert (tmp_path / "out.engine").exists()


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx")
def test_tensorrt_may_take_sparse_kernels() -> None:
    target = parse_target("rtx4090:tensorrt")
    assert isinstance(target, Tensorrt)
    configs: list[bool] = []
    for weight in (parameter(16, 32), pruned(parameter(16, 32))):
        settings = target._settings(layer(weight).components["net"])
        chosen = target._library()
        flags = chosen.trt.BuilderFlag
        trt_builder = chosen.trt.Builder(library.logger(chosen.trt))
        network = trt_builder.create_network(0)
        configs.append(
            builder._config(trt_builder, network, chosen, settings, {}).get_flag(
                flags.SPARSE_WEIGHTS
            )
        )
    assert configs == [False, True]
