"""Layers that were factored into two, against torch's own decomposition and on pipelines."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from diffopt.core import Pipeline, Record
from diffopt.engine import engine
from diffopt.errors import DiffoptError
from diffopt.ir import qdq
from diffopt.ir.program import Program
from diffopt.pruning import low_rank_factors
from diffopt.quantization import quantize_body
from tests.passes.build import Builder, body, parameter, program, randn
from tests.zoo import traced

aten = torch.ops.aten


def steep(*shape: int, seed: int = 0, power: float = 1.0) -> torch.nn.Parameter:
    """Return a weight whose singular values fall as 1 / n, or faster."""
    flat = randn(shape[0], int(torch.tensor(shape[1:]).prod()), seed=seed)
    u, s, v = torch.linalg.svd(flat, full_matrices=False)
    s = 1 / torch.arange(1, len(s) + 1) ** power
    return torch.nn.Parameter((u * s @ v).reshape(shape), requires_grad=False)


def net(make: Any, *samples: Tensor) -> Program:
    """Return a program that calls one component."""
    inner = body(make, *samples)
    return program(lambda at, *x: at.call("net", *x)[0], *samples, net=inner)


def run(text: str, model: Program, **more: Any) -> tuple[Program, Record]:
    result = Pipeline.parse(text).run(model, **more)
    return result, Record.from_json(result.history[-1])


def only(program: Program) -> Tensor:
    return program.run(program.sample)[0]


def layers(program: Program) -> list[qdq.Layer]:
    return qdq.layers(program.components["net"])


LINEAR = (aten.linear.default, (40, 48), randn(2, 5, 48), ())
CONVS = {
    "conv1d": (aten.conv1d.default, (24, 32, 3), randn(2, 32, 11), ([2], [1], [1])),
    "conv2d": (aten.conv2d.default, (24, 16, 3, 5), randn(2, 16, 9, 8), ([2, 1], [1, 2], [1, 1])),
    "dilated": (aten.conv2d.default, (24, 16, 3, 3), randn(2, 16, 9, 8), ([1, 2], [2, 0], [2, 1])),
    "pixel": (aten.conv2d.default, (24, 32, 1, 1), randn(2, 32, 4, 4), ([1, 1], [0, 0], [1, 1])),
    "conv3d": (aten.conv3d.default, (16, 8, 3, 3, 3), randn(1, 8, 4, 5, 5), ([1] * 3, [1] * 3)),
}
KINDS = {"linear": LINEAR, **CONVS}


def one(kind: str, weight: Tensor) -> Program:
    target, _, x, more = KINDS[kind]
    bias = parameter(len(weight), seed=9)
    return net(lambda at, x: at(target, x, weight, bias, *more), x)


# The two layers


@pytest.mark.parametrize("form", ["channel", "spatial"])
@pytest.mark.parametrize("kind", KINDS)
def test_full_rank_is_the_layer(kind: str, form: low_rank_factors.Form) -> None:
    weight = parameter(*KINDS[kind][1])
    model = one(kind, weight)
    before = only(model)
    (layer,) = layers(model)
    if form not in low_rank_factors.forms(layer):
        assert form == "spatial"
        return
    spectrum = low_rank_factors.spectrum(weight, form)
    first, second = low_rank_factors.factorize(spectrum, len(spectrum.energy), torch.float32)
    low_rank_factors.place_factors(model.components["net"], layer, form, first, second)
    model.refresh()
    model.verify()
    assert len(layers(model)) == 2
    torch.testing.assert_close(only(model), before, rtol=1e-4, atol=1e-4)


def test_a_share_of_the_rank_is_torchs_nearest_matrix() -> None:
    weight = steep(40, 48)
    spectrum = low_rank_factors.spectrum(weight, "channel")
    first, second = low_rank_factors.factorize(spectrum, 7, torch.float32)
    u, s, v = torch.linalg.svd(weight)
    torch.testing.assert_close(second @ first, u[:, :7] * s[:7] @ v[:7], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(spectrum.energy.sqrt().float(), s, rtol=1e-4, atol=1e-5)
    assert spectrum.kept(7) == pytest.approx(float(s[:7].pow(2).sum() / s.pow(2).sum()), rel=1e-5)


@pytest.mark.parametrize("shape", [(40, 48), (48, 40)])
def test_the_least_rank_for_an_energy(shape: tuple[int, int]) -> None:
    spectrum = low_rank_factors.spectrum(steep(*shape), "channel")
    for share in (0.5, 0.9, 0.99):
        rank = spectrum.rank_for(share)
        assert spectrum.kept(rank) >= share > spectrum.kept(rank - 1)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_moments_make_the_outputs_nearest(shape: tuple[int, int]) -> None:
    weight = parameter(*shape)
    x = randn(500, shape[1], seed=3) * torch.logspace(0, -2, shape[1])
    exact = x @ weight.T
    errors = []
    for moments in (None, x.T @ x):
        spectrum = low_rank_factors.spectrum(weight, "channel", moments)
        first, second = low_rank_factors.factorize(spectrum, 6, torch.float32)
        errors.append(float((x @ first.T @ second.T - exact).norm()))
    best = torch.linalg.svdvals(exact)[6:].norm()
    assert errors[1] < 1.01 * float(best) < 0.8 * errors[0]


def test_moments_of_a_convolution_are_those_of_its_patches() -> None:
    model = one("dilated", parameter(*CONVS["dilated"][1]))
    (layer,) = layers(model)
    x = CONVS["dilated"][2]
    moments, rows = low_rank_factors.second_moments(layer, x)
    weight = model.components["net"].get_parameter("weight")
    exact = only(model) - parameter(24, seed=9)[:, None, None]
    assert rows == exact[:, 0].numel()
    energy = torch.trace(weight.flatten(1) @ moments @ weight.flatten(1).T)
    torch.testing.assert_close(energy, exact.pow(2).sum(), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("form", ["channel", "spatial"])
def test_costs_are_those_of_the_graph(form: low_rank_factors.Form) -> None:
    weight = steep(*CONVS["conv2d"][1])
    model = one("conv2d", weight)
    before = model.flops()
    (layer,) = layers(model)
    cost = low_rank_factors.cost(layer, form)
    result, record = run(f"low-rank(rank=5,form={form})", model)
    assert before == 2 * cost.whole_flops
    assert result.flops() == 2 * 5 * cost.flops
    saved = record.before.parameters - record.after.parameters
    assert saved == cost.whole_parameters - 5 * cost.parameters


# The pass


def test_text() -> None:
    result, record = run("low-rank(rank=8)", one("linear", steep(40, 48)))
    first, second = layers(result)
    assert [tuple(la.weight.meta["val"].shape) for la in (first, second)] == [(8, 48), (40, 8)]
    assert [str(la.weight.target) for la in (first, second)] == ["weight_down", "weight_up"]
    assert first.bias is None
    assert second.bias is not None
    assert record.notes["ranks"] == {"net.linear_default": "8 of 40, keeps 94.3%"}
    assert record.notes["parameters of these"] == {"before": 40 * 48, "after": 8 * 88}
    assert 1e-3 < record.relative < 0.5


@pytest.mark.parametrize(
    ("options", "rank"),
    [("rank=0.25", 16), ("rank=0.25,multiple=1", 10), ("energy=0.9,multiple=1", 5), ("", 8)],
)
def test_ranks(options: str, rank: int) -> None:
    result, _ = run(f"low-rank({options})", one("linear", steep(40, 48)))
    assert layers(result)[0].weight.meta["val"].shape[0] == rank


def test_the_form_of_a_convolution_is_the_one_that_keeps_most() -> None:
    spread = steep(32, 16, 3, 3, power=2.0)  # few directions over all inputs
    assert "channel" in str(run("low-rank(rank=0.2)", one("dilated", spread))[1].notes["ranks"])
    column, row = parameter(2, 16, 3, 1, seed=1), parameter(24, 2, 1, 3, seed=2)
    separable = torch.einsum("riab,orcd->oiad", column, row)
    weight = torch.nn.Parameter(separable, requires_grad=False)
    result, record = run("low-rank(rank=0.2,multiple=1)", one("dilated", weight))
    assert "spatial" in str(record.notes["ranks"])
    assert record.relative < 1e-4  # such a kernel is of rank 2
    kernels = [tuple(la.weight.meta["val"].shape[2:]) for la in layers(result)]
    assert kernels == [(3, 1), (1, 3)]


def test_a_weight_that_bodies_share_is_factored_once() -> None:
    weight, x = steep(40, 48), randn(2, 48)
    parts = {
        name: body(lambda at, x: at(aten.linear.default, x, weight), x) for name in ("one", "two")
    }

    def make(at: Builder, x: fx.Node) -> list[fx.Node]:
        return [at.call("one", x)[0], at.call("two", x)[0]]

    model = program(make, x, **parts)
    result, record = run("low-rank(rank=4,components=*)", model)
    assert record.after.parameters == 4 * 88
    downs = [result.components[name].weight_down for name in ("one", "two")]
    assert downs[0] is downs[1]


def reasons(record: Record) -> list[str]:
    return [text.partition(": ")[2] for text in record.skipped]


def test_what_saves_nothing_stays() -> None:
    _, record = run("low-rank(rank=22)", one("linear", parameter(40, 48)))
    assert not record.changed
    assert reasons(record) == ["rank 22 saves nothing: it has to be 21 or less"]
    assert record.notes["left alone"] == {"that would save nothing": 1}
    assert run("low-rank(rank=21)", one("linear", parameter(40, 48)))[1].changed


def test_groups_and_shared_weights_stay() -> None:
    weight = parameter(8, 4, 3, 3)

    def grouped(at: Builder, x: fx.Node) -> fx.Node:
        return at(aten.conv2d.default, x, weight, None, [1, 1], [1, 1], [1, 1], 2)

    _, record = run("low-rank(rank=1)", net(grouped, randn(1, 8, 4, 4)))
    assert reasons(record) == ["it is a convolution in groups"]
    tied = parameter(40, 48)

    def twice(at: Builder, x: fx.Node) -> list[fx.Node]:
        return [at(aten.linear.default, x, tied), at(aten.mul.Tensor, tied, 2.0)]

    _, record = run("low-rank(rank=1)", net(twice, randn(2, 48)))
    assert reasons(record) == ["its weight is also used elsewhere"]
    assert not record.changed


def test_patterns() -> None:
    def make(at: Builder, x: fx.Node) -> list[fx.Node]:
        return [at(aten.linear.default, x, steep(40, 48, seed=i)) for i in range(2)]

    model = net(make, randn(2, 48))
    assert list(run("low-rank(rank=4,layers=*_1)", model)[1].notes["ranks"]) == [
        "net.linear_default_1"
    ]
    assert list(run("low-rank(rank=4,skip=net.*_1)", model)[1].notes["ranks"]) == [
        "net.linear_default"
    ]


def test_a_weight_that_is_not_finite() -> None:
    weight = parameter(40, 48)
    with torch.no_grad():
        weight[3, 4] = torch.nan
    with pytest.raises(DiffoptError) as error:
        run("low-rank(rank=4)", one("linear", weight))
    assert error.value.message == (
        "the weight of net.linear_default has values that are not finite"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("low-rank(rank=4,energy=0.5)", "low-rank wants rank or energy, not both"),
        ("low-rank(rank=0)", "low-rank has rank=0; write a whole number, or a share below 1"),
        ("low-rank(rank=2.5)", "low-rank has rank=2.5; write a whole number, or a share below 1"),
        ("low-rank(energy=1.5)", "low-rank has energy=1.5; write a number from 0 to 1"),
        ("low-rank(multiple=0)", "low-rank wants multiple and samples to be 1 or more"),
        (
            "low-rank(layers=nothing)",
            "no layer of net matches 'nothing'; there are linear_default",
        ),
    ],
)
def test_bad_input(text: str, message: str) -> None:
    with pytest.raises(DiffoptError) as error:
        run(text, one("linear", parameter(40, 48)))
    assert error.value.message == message


# On pipelines, and beside other passes


@cache
def unrolled(name: str) -> Program:
    return Pipeline.parse("unroll,hoist,simplify").run(traced(name, num_inference_steps=4))


NAMES = ("sd", "dit")
BODY = {"sd": "unet", "dit": "transformer"}


@pytest.mark.parametrize("name", NAMES)
def test_all_layers_of_a_unet_and_of_a_transformer(name: str) -> None:
    _, record = run("low-rank(rank=0.25,multiple=1)", unrolled(name))
    assert set(reasons(record)) == {"one of the first or the last layers"}
    assert record.after.flops < record.before.flops
    assert record.after.parameters < record.before.parameters
    before = {
        quantize_body.module_path(la.node)
        for la in qdq.layers(unrolled(name).components[BODY[name]])
    }
    ranks = {path.partition(".")[2] for path in record.notes["ranks"]}
    assert len(before - ranks) == 2
    _, finer = run("low-rank(energy=0.95,multiple=1)", unrolled(name))
    assert finer.relative < record.relative


def test_with_data_the_outputs_are_nearer() -> None:
    text = "low-rank(rank=4,layers=transformer_blocks.*"
    _, plain = run(f"{text})", unrolled("dit"))
    _, calibrated = run(f"{text},data=true,samples=2)", unrolled("dit"))
    assert plain.after.flops == calibrated.after.flops
    assert calibrated.relative < 0.9 * plain.relative


def test_layers_that_saw_few_inputs_are_factored_without_data() -> None:
    model = one("linear", steep(40, 48))  # 10 inputs of 48 numbers
    plain, _ = run("low-rank(rank=4)", model)
    calibrated, _ = run("low-rank(rank=4,data=true,samples=1)", model)
    assert torch.equal(only(plain), only(calibrated))


@pytest.mark.parametrize("name", NAMES)
def test_beside_other_passes(name: str) -> None:
    early = "low-rank(rank=0.4,multiple=1)"
    text = f"{early},cache(fora,interval=2),fuse,quantize(int8,samples=1),cast(bf16)"
    result = Pipeline.parse(text).run(unrolled(name))
    records = [Record.from_json(row) for row in result.history[-5:]]
    assert [r.changed for r in records] == [True] * 5
    assert max(r.relative for r in records) < 0.2


def test_in_16_bits_and_behind_quantize() -> None:
    result, record = run("cast(bf16),low-rank(rank=4)", unrolled("dit"))
    assert record.changed
    kinds = {
        la.weight.meta["val"].dtype
        for la in qdq.layers(result.components["transformer"])
        if str(la.weight.target).endswith("_down")
    }
    assert kinds == {torch.bfloat16}
    _, record = run("quantize(int8,samples=1),low-rank(rank=4)", unrolled("dit"))
    assert "its weight is quantized: run low-rank before quantize" in reasons(record)


def test_an_engine(tmp_path: Path) -> None:
    def make(at: Builder, x: fx.Node) -> fx.Node:
        y = at(aten.conv2d.default, x, steep(16, 16, 3, 3), None, [1, 1], [1, 1])
        return at(aten.linear.default, at(aten.relu.default, y), steep(40, 48, seed=1))

    factored, record = run("low-rank(rank=4)", net(make, randn(2, 16, 8, 48)))
    assert len(record.notes["ranks"]) == 2
    engine.build(factored, "cpu(threads=1)", tmp_path / "out.engine")
    got = engine.load(tmp_path / "out.engine").run(factored.sample)
    torch.testing.assert_close(got[0], only(factored), rtol=1e-4, atol=1e-5)
