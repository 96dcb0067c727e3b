"""How stored tensors change with the pipeline's weights."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from diffopt import trace
from diffopt.core import Context, Pass, Pipeline
from diffopt.ir import weight_origins as origins
from diffopt.ir.program import Program
from tests.zoo import traced

W = origins.Weight("net.w", (4, 3))
V = origins.Weight("net.v", (2, 3))


def back(origin: origins.Origin) -> origins.Origin:
    """Return an origin that was written as JSON and read again."""
    tensors: dict[str, Tensor] = {}

    def key_of(tensor: Tensor) -> str:
        tensors[str(len(tensors))] = tensor
        return str(len(tensors) - 1)

    return origins.from_json(origins.to_json(origin, key_of), tensors)


rows, columns, vector = torch.rand(4, 1), torch.rand(1, 3), torch.rand(3)
CASES: list[tuple[origins.Origin, Callable[[Tensor, Tensor], Tensor]]] = [
    (W, lambda w, v: w),
    (origins.scaled(origins.scaled(W, rows), columns), lambda w, v: w * rows * columns),
    (origins.product(W, vector), lambda w, v: w @ vector),
    (origins.joined([V, W]), lambda w, v: torch.cat([v, w])),
    (origins.total([W, origins.Constant((4, 3)), W]), lambda w, v: 2 * w),
    (
        origins.joined([origins.product(V, vector), origins.Constant((5,))]),
        lambda w, v: torch.cat([v @ vector, torch.zeros(5)]),
    ),
]


@pytest.mark.parametrize(("origin", "expected"), CASES)
def test_a_change_goes_the_way_of_the_weight(
    origin: origins.Origin, expected: Callable[[Tensor, Tensor], Tensor]
) -> None:
    w, v = torch.rand(4, 3), torch.rand(2, 3)
    for each in (origin, back(origin)):
        change = origins.change(each, {"net.w": w, "net.v": v})
        assert change is not None
        torch.testing.assert_close(change, expected(w, v))
        assert origins.shape_of(each) == tuple(change.shape)
        assert origins.change(each, {}) is None


def test_a_change_of_one_part_leaves_the_others() -> None:
    change = origins.change(origins.joined([V, W]), {"net.w": torch.ones(4, 3)})
    assert change is not None
    assert change.sum(1).tolist() == [0, 0, 3, 3, 3, 3]


def test_a_convolution_is_summed_over_its_pixels() -> None:
    weight = origins.Weight("net.c", (4, 3, 2, 2))
    c = torch.rand(4, 3, 2, 2)
    change = origins.change(origins.product(weight, vector), {"net.c": c})
    torch.testing.assert_close(change, c.sum((2, 3)) @ vector)


def test_what_does_not_fit_together_is_an_error() -> None:
    leaf = {"weight": ["net.w", [4, 3]]}
    tensors = {"long": torch.ones(5), "larger": torch.ones(2, 4, 3)}
    for data in (
        {"scaled": [leaf, "long"]},
        {"scaled": [leaf, "larger"]},
        {"product": [leaf, "long"]},
        {"product": [{"weight": ["net.b", [4]]}, "long"]},
        {"sum": [leaf, {"constant": [4]}]},
        {"joined": [leaf, {"constant": [4, 2]}]},
        {"joined": [{"constant": []}]},
        {"sum": []},
    ):
        with pytest.raises(ValueError, match=r"shape|factor|vector|parts"):
            origins.from_json(data, tensors)


def test_names_of_what_is_unknown() -> None:
    known, computed = torch.ones(4, 3), torch.ones(2)
    origins.record(known, W)
    origins.record_computed(computed, [known, torch.ones(1)])
    assert origins.unknown_names(origins.origin_of(computed)) == {"net.w"}
    assert origins.change(origins.origin_of(computed), {"net.w": known}) is None
    constant = torch.ones(2)
    assert not origins.is_recorded(constant)
    origins.record_computed(constant, [torch.ones(1)])
    assert origins.is_recorded(constant)
    assert origins.origin_of(constant) == origins.Constant((2,))


# What passes close


def closed(passes: str) -> dict[str, str]:
    return Pipeline.parse(passes).run(traced("sd"), compare=False).closed


@pytest.mark.parametrize("passes", ["hoist,fuse", "cast(bf16,islands=none)", "batch(max=2)"])
def test_exact_passes_leave_all_layers_open(passes: str) -> None:
    assert traced("sd").closed == {}
    assert not [name for name in closed(passes) if ".norm" not in name and "_norm" not in name]


class Scaled:
    """A pipeline that reads a weight itself, besides what its network does."""

    def __init__(self) -> None:
        self.components = {"net": nn.Linear(3, 3)}

    def __call__(self, x: Tensor) -> Tensor:
        net = self.components["net"]
        y: Tensor = net(x) * net.weight.abs().max() + net.bias.detach()
        return y


def test_a_weight_of_which_the_pipeline_computes_a_constant_is_closed() -> None:
    with torch.no_grad():
        program = trace(Scaled(), x=torch.rand(2, 3))
    assert program.closed == {"net.weight": "the capture", "net.bias": "the capture"}


def test_what_depends_on_the_timestep_alone_is_closed() -> None:
    names = closed("unroll,hoist,simplify,fuse")
    layers = {name for name in names if name.endswith(".weight") and ".norm" not in name}
    assert {name.split(".")[1] for name in layers if "unet" in name} >= {"time_embedding"}
    assert all("time_emb" in name for name in layers if name.startswith("unet.")), layers
    assert {names[name] for name in layers if "time_emb" in name} == {"unroll"}


class Replace(Pass):
    """Replace weights by others, and say nothing."""

    exact = False

    def run(self, program: Program, ctx: Context) -> None:
        for gm in program.components.values():
            for name, tensor in list(gm._parameters.items()):
                if tensor is not None and name.endswith("to_q_weight"):
                    gm._parameters[name] = nn.Parameter(tensor.detach() * 2, requires_grad=False)


def test_a_pass_that_says_nothing_closes_what_it_replaces() -> None:
    program = Pipeline((Replace(),)).run(traced("sd"), compare=False)
    assert program.closed
    assert all(name.endswith("to_q.weight") for name in program.closed)
    assert set(program.closed.values()) == {Replace.name}


def test_origins_are_in_the_file(tmp_path: object) -> None:
    program = Pipeline.parse("hoist,simplify,fuse").run(traced("sd"), compare=False)
    data, tensors, assets = program.to_members()
    again = Program.from_members(data, tensors, assets)
    assert again.to_members()[0]["origins"] == data["origins"]
    unsaid = replace(program, pipeline_weights=[])
    assert "origins" not in unsaid.to_members()[0]
