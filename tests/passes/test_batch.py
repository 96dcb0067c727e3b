"""One run serves several requests, and each gets what it would have got alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffopt.capture.trace import trace_function
from diffopt.core import Pipeline
from diffopt.errors import DiffoptError, VerifyError
from diffopt.ir import graph as g
from diffopt.ir.program import Program
from diffopt.transforms.request_dimension import Unbatchable
from tests import sampler
from tests.zoo import CASES, traced


def check(program: Program, low: int = 1, high: int = 3) -> Program:
    """Batch a program and compare it with itself, at every size, on requests that differ."""
    batched = Pipeline.parse(f"batch(min={low},max={high})").run(program)
    generator = torch.Generator().manual_seed(7)
    requests = [
        [
            t.flatten()[torch.randperm(t.numel(), generator=generator)].reshape(t.shape)
            for t in program.sample
        ]
        for _ in range(high)
    ]
    for count in range(low, high + 1):
        stacked = [torch.stack(tensors) for tensors in zip(*requests[:count], strict=True)]
        results = batched.run(stacked)
        for k in range(count):
            alone = program.run(requests[k])
            for result, expected in zip(results, alone, strict=True):
                torch.testing.assert_close(result[k], expected, atol=1e-5, rtol=1e-4)
    return batched


FLOATS = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
CONSTANT = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
INDEX = torch.tensor([[2, 0], [1, 1]])

OPERATORS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "mean of all": (lambda x: x - x.mean(), (FLOATS,)),
    "first dimension": (lambda x: x.cumsum(0) + x.flip(0) + x.softmax(0), (FLOATS,)),
    "every view": (lambda x: x.view(6, 4).t().reshape(-1).view(4, 2, 3)[1:, 0], (FLOATS,)),
    "select, chunk": (lambda x: x[1] * x.chunk(2)[0] + x.unbind(0)[1], (FLOATS,)),
    "constants join": (lambda x: torch.cat([CONSTANT.expand(2, 3, 4), x], 1), (FLOATS,)),
    "constants first": (lambda x: CONSTANT - x, (FLOATS,)),
    "other ranks": (lambda x, y: x * y + y, (FLOATS, torch.randn(4))),
    "scalars": (lambda x, s: x * s.sin() + s, (FLOATS, torch.tensor(0.3))),
    "stack": (lambda x: torch.stack([x, CONSTANT.expand(2, 3, 4)]), (FLOATS,)),
    "expand": (lambda x: x[:1].expand(5, -1, -1), (FLOATS,)),
    "where": (lambda x: torch.where(x > 0, x, CONSTANT), (FLOATS,)),
    "matmul": (lambda x: x @ x.transpose(1, 2) @ CONSTANT, (FLOATS,)),
    "matmul of a constant": (lambda x: CONSTANT.t() @ x[0], (FLOATS,)),
    "einsum": (lambda x: torch.einsum("bij,bkj->ik", x, x), (FLOATS,)),
    "rows by index": (lambda x, i: x[i, i], (FLOATS[:, :, :3].repeat(2, 1, 1), INDEX)),
    "embedding": (lambda i: F.embedding(i, CONSTANT), (INDEX,)),
    "slice written": (lambda x: _written(x), (FLOATS,)),
    "masked": (lambda x: _masked(x), (FLOATS,)),
    "convolution": (lambda x: F.conv2d(x, torch.ones(3, 4, 3, 3), padding=1), (IMAGES,)),
    "convolution, no batch": (lambda x: F.conv2d(x[0], torch.ones(3, 4, 3, 3)), (IMAGES,)),
    "convolution of a weight that comes in": (lambda x: F.conv2d(IMAGES, x), (IMAGES,)),
    "norms": (lambda x: F.layer_norm(F.group_norm(x, 2), (6,)), (IMAGES,)),
    "resize": (lambda x: F.interpolate(x, scale_factor=2, mode="nearest"), (IMAGES,)),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x), (IMAGES,)),
    "attention to a constant": (
        lambda x: F.scaled_dot_product_attention(x, IMAGES, IMAGES),
        (IMAGES,),
    ),
    "attention with a mask": (
        lambda x, m: F.scaled_dot_product_attention(x, x, x, m),
        (IMAGES, torch.randn(1, 1, 6, 6)),
    ),
    "attention with a constant mask": (
        lambda x: F.scaled_dot_product_attention(x, x, x, IMAGES[:, :1]),
        (IMAGES,),
    ),
    "frequencies": (lambda x: torch.fft.ifft(torch.fft.fft(x) * 2).real, (FLOATS,)),
    "no dependence": (lambda x: (CONSTANT * 2, x), (FLOATS,)),
    "several results": (lambda x: x.max(1), (FLOATS,)),
}


def _written(x: Tensor) -> Tensor:
    y = torch.zeros(2, 3, 4)
    y[:, 1:3] = x[:, :2]
    y[0, 0] = x[1, 1]
    return y * x


def _masked(x: Tensor) -> Tensor:
    y = x.clone()
    y[y > 0.5] = 0.25
    return y


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_serve_every_size(name: str) -> None:
    function, tensors = OPERATORS[name]
    check(trace_function(function, *tensors))


def test_a_weight_free_value_is_computed_once() -> None:
    batched = check(sampler.program())
    (outer,) = {n.meta["val"].dim() for n in batched.calls("unet")[0].args[1:]}  # type: ignore[union-attr]
    assert outer == 0  # the timestep has no dimension for requests


@pytest.mark.parametrize("name", ["sd", "dit", "stable-audio"])
def test_pipelines_after_the_other_passes(name: str) -> None:
    case = CASES[name]
    program = traced(name)
    batched = Pipeline.parse("unroll,hoist,simplify,fuse,batch(max=3)").run(program)
    assert (
        batched.components.keys()
        == Pipeline.parse("unroll,hoist,simplify,fuse").run(program).components.keys()
    )
    requests: list[dict[str, Any]] = []
    for seed in range(4):
        arguments = {k: v for k, v in case.inputs(seed).items() if k in program.host.inputs()}
        requests.append({**arguments, "generator": torch.Generator().manual_seed(seed)})
    results = batched.serve(requests)  # two runs of two
    for seed, result in enumerate(results):
        alone = program(**{**requests[seed], "generator": torch.Generator().manual_seed(seed)})
        for one, other in zip(_tensors(result), _tensors(alone), strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def _tensors(output: Any) -> list[Tensor]:
    return [t for t in output.values() if isinstance(t, Tensor)]


def test_a_batched_program_is_saved_and_loaded(tmp_path: Path) -> None:
    batched = Pipeline.parse("batch(max=3)").run(sampler.program())
    batched.save(tmp_path / "a.program")
    loaded = Program.load(tmp_path / "a.program")
    loaded.verify()
    assert loaded.batch == (1, 3)
    one, two = batched.serve([{"seed": 1}, {"seed": 2}]), loaded.serve([{"seed": 1}, {"seed": 2}])
    assert torch.equal(one[1]["images"], two[1]["images"])
    assert not torch.equal(one[0]["images"], one[1]["images"])
    assert torch.equal(loaded(seed=2)["images"], sampler.program()(seed=2)["images"])


def test_requests_are_cut_into_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    batched = Pipeline.parse("batch(min=2,max=3)").run(sampler.program())
    sizes = []
    run = batched.run

    def counting(tensors: Any) -> Any:
        sizes.append(len(tensors[0]))
        return run(tensors)

    monkeypatch.setattr(batched, "run", counting)
    assert len(batched.serve([{"seed": s} for s in range(7)])) == 7
    assert sizes == [2, 2, 3]
    with pytest.raises(DiffoptError, match=r"^got 1 requests; it was built for 2 to 3 at once$"):
        batched(seed=0)
    assert batched.serve([]) == []


def test_what_cannot_be_batched_is_named() -> None:
    program = trace_function(lambda x: torch.histc(x, 4), FLOATS)
    with pytest.raises(Unbatchable, match=r"^aten.histc \(.*\) cannot be batched: "):
        Pipeline.parse("batch").run(program)


def test_no_pass_can_follow() -> None:
    with pytest.raises(
        DiffoptError, match=r"^simplify cannot follow batch, which has to be the last pass"
    ):
        Pipeline.parse("batch,simplify").run(sampler.program())


def test_limits_are_checked() -> None:
    with pytest.raises(DiffoptError, match=r"^min=4, max=2: wants 1 <= min <= max"):
        Pipeline.parse("batch(min=4,max=2)")


def test_the_verifier_refuses_a_graph_that_fixes_the_size() -> None:
    batched = Pipeline.parse("batch(max=3)").run(trace_function(lambda x: x.view(6, 4), FLOATS))
    view = next(n for n in batched.root.graph.nodes if n.target is torch.ops.aten.reshape.default)
    view.args = (view.args[0], [3, 6, 4])
    with pytest.raises((VerifyError, RuntimeError, ValueError)):
        batched.verify()


def test_shapes_are_those_of_the_most_requests() -> None:
    batched = Pipeline.parse("batch(max=5)").run(sampler.program())
    assert [list(n.meta["val"].shape) for n in g.placeholders(batched.root)] == [[5, 2, 8]]
    assert [t.shape[0] for t in batched.sample_inputs()] == [5]
