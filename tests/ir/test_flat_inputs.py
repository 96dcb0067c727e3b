"""Inputs of a run are checked before a kernel sees them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffopt.core import Pipeline
from diffopt.engine.engine import Engine, build
from diffopt.errors import DiffoptError
from diffopt.ir.flat_inputs import FlatInputs
from diffopt.ir.program import Program
from tests import sampler

Run = Callable[[list[Tensor]], Any]


@pytest.fixture(scope="module")
def program() -> Program:
    return sampler.program()


@pytest.fixture(scope="module")
def runs(program: Program, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("flat")
    engines = {t: build(program, t, folder / f"{t}.engine") for t in ("eager", "cpu")}
    return {"program": program.run, **{name: engine.run for name, engine in engines.items()}}


WRONG: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "smaller": (lambda x: x[:1], "input noise must be float32[2,8], got float32[1,8]"),
    "empty": (lambda x: x[:0], "input noise must be float32[2,8], got float32[0,8]"),
    "larger": (lambda x: torch.cat([x, x]), "input noise must be float32[2,8], got float32[4,8]"),
    "rank": (lambda x: x[None], "input noise must be float32[2,8], got float32[1,2,8]"),
    "double": (lambda x: x.double(), "input noise must be float32[2,8], got float64[2,8]"),
    "half": (lambda x: x.half(), "input noise must be float32[2,8], got float16[2,8]"),
    "integers": (lambda x: x.int(), "input noise must be float32[2,8], got int32[2,8]"),
    "complex": (lambda x: x.to(torch.complex64), "must be float32[2,8], got complex64[2,8]"),
    "meta": (lambda x: x.to("meta"), "got one on meta, and inputs have to be on cpu"),
    "list": (lambda x: x.tolist(), "input noise must be float32[2,8], got list [["),
    "array": (lambda x: x.numpy(), "input noise must be float32[2,8], got ndarray array"),
    "none": (lambda x: None, "input noise must be float32[2,8], got NoneType None"),
    "sparse": (lambda x: x.to_sparse(), "got a tensor of layout torch.sparse_coo"),
}


@pytest.mark.parametrize("where", ["program", "eager", "cpu"])
@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_one_line(
    runs: dict[str, Run], program: Program, where: str, name: str
) -> None:
    change, message = WRONG[name]
    with pytest.raises(DiffoptError) as caught:
        runs[where]([change(program.sample[0]), *program.sample[1:]])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["program", "eager", "cpu"])
def test_the_number_of_inputs(runs: dict[str, Run], program: Program, where: str) -> None:
    for tensors in ([], [*program.sample, program.sample[0]]):
        with pytest.raises(DiffoptError) as caught:
            runs[where](tensors)
        assert str(caught.value) == f"{len(tensors)} inputs for 1 of the graph: noise"


PLACED: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t().contiguous().t(),
    "a part": lambda x: torch.stack([x, x], -1)[..., 0],
    "reversed": lambda x: torch.flip(torch.flip(x, [1]), [1]),
    "negative bit": lambda x: torch._neg_view(-x),
    "a parameter": lambda x: torch.nn.Parameter(x),
    "of a graph of gradients": lambda x: x.clone().requires_grad_() * 1,
    "behind others": lambda x: torch.cat([torch.zeros(3), x.flatten()])[3:].view(2, 8),
}


@pytest.mark.parametrize("where", ["program", "eager", "cpu"])
@pytest.mark.parametrize("name", PLACED)
def test_how_an_input_lies_in_memory_changes_nothing(
    runs: dict[str, Run], program: Program, where: str, name: str
) -> None:
    x = program.sample[0]
    (expected,) = runs[where]([x])
    (result,) = runs[where]([PLACED[name](x)])
    assert torch.equal(result, expected)
    assert not result.requires_grad


def test_requests_are_counted(tmp_path: Path) -> None:
    batched = Pipeline.parse("batch(min=1,max=4)").run(sampler.program())
    engine: Engine = build(batched, "eager", tmp_path / "x.engine")
    x = batched.sample_inputs(3)[0]
    for run in (batched.run, engine.run):
        assert run([x])[0].shape[0] == 3
        with pytest.raises(DiffoptError, match="the inputs are of 5 requests: a run serves 1 to 4"):
            run([torch.cat([x, x[:2]])])
        with pytest.raises(DiffoptError, match=r"must be float32\[\?,2,8\], got float32\[3,2,4\]"):
            run([x[..., :4]])


def test_an_input_of_another_size_is_placed_like_the_captured_one() -> None:
    gm = sampler.program().root
    value = torch.empty_strided((3, 4, 5), (20, 1, 4))
    node = next(iter(gm.graph.nodes))
    node.meta["val"] = value
    inputs = FlatInputs(gm, (1, 3), [], ["cpu"])
    (placed,) = inputs.checked([torch.randn(2, 4, 5)])
    assert placed.stride() == (20, 1, 4)
