"""What runs a plan on the GPU: streams, copies, and the whole run as one CUDA graph."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from diffopt.errors import DiffoptError
from diffopt.lowering.cuda_runtime import CudaExecutor
from diffopt.lowering.executor import SlotExecutor
from tests.standin import replace_gpu


class Doubling:
    """Stands for a plan: doubles its input; notes whether a CUDA graph was being captured."""

    def __init__(self, said: list[str]) -> None:
        self.said = said
        self.capturing = False

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        self.said.append("captured" if self.capturing else "run")
        if self.capturing and not len(tensors[0]):
            raise RuntimeError("operation not permitted\nwhen capturing")
        self.result = tensors[0] * 2
        self.inputs = tensors
        return [self.result]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put the CPU in the GPU's place, and note what is asked of it."""
    return replace_gpu(monkeypatch)


def test_a_run_is_on_one_stream_of_its_own(said: list[str]) -> None:
    (result,) = CudaExecutor(cast(SlotExecutor, Doubling(said))).run([torch.ones(2)])
    assert result.tolist() == [2.0, 2.0]
    assert said == [
        "own waits for caller",
        "on own",
        "run",
        "caller waits for own",
        "kept for caller",
    ]


def test_a_watched_run_waits_for_the_gpu_where_somebody_looks(said: list[str]) -> None:
    class Stepwise(Doubling):
        def run(self, tensors: Sequence[Tensor], watch: Any = None) -> list[Tensor]:
            watch(SimpleNamespace())
            return super().run(tensors)

    executor = CudaExecutor(cast(SlotExecutor, Stepwise(said)), record=True)
    executor.run([torch.ones(2)], lambda pause: None)
    assert "own is done" not in said
    executor.run([torch.ones(2)], lambda pause: pause.wait())
    assert said.count("own is done") == 1
    assert "captured" not in said


@pytest.fixture
def recorded(said: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let a CUDA graph do again what the plan did while it was captured."""
    plans: list[Doubling] = []

    class Graph:
        def replay(self) -> None:
            said.append("replayed")
            self.result.copy_(self.inputs[0] * 2)

    @contextmanager
    def capture(graph: Any, stream: Any) -> Iterator[None]:
        assert stream.name == "own"
        (plan,) = plans
        plan.capturing = True
        yield
        plan.capturing = False
        graph.result, graph.inputs = plan.result, plan.inputs

    def doubling(self: CudaExecutor, plan: Any, record: bool = False) -> None:
        plans.append(plan)
        original(self, plan, record)

    original = CudaExecutor.__init__
    monkeypatch.setattr(CudaExecutor, "__init__", doubling)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return said


def test_the_second_run_of_a_shape_is_captured_and_later_ones_replay_it(
    recorded: list[str],
) -> None:
    plan = CudaExecutor(cast(SlotExecutor, Doubling(recorded)), record=True)
    kept = []
    for value, shape in enumerate([(2,), (2,), (3,), (2,), (3,), (2,)]):
        (result,) = plan.run([torch.full(shape, float(value))])
        kept.append((value, result))
    for value, result in kept:  # no result is overwritten by a later run
        assert set(result.tolist()) == {2.0 * value}
    steps = [word for word in recorded if word in ("run", "captured", "replayed")]
    assert steps == [
        "run",
        "captured",
        "replayed",
        "run",
        "replayed",
        "captured",
        "replayed",
        "replayed",
    ]


def test_what_cannot_be_captured_is_one_line(recorded: list[str]) -> None:
    plan = CudaExecutor(cast(SlotExecutor, Doubling(recorded)), record=True)
    plan.run([torch.zeros(0)])
    with pytest.raises(DiffoptError) as error:
        plan.run([torch.zeros(0)])
    assert str(error.value) == (
        "the run cannot be captured as a CUDA graph: operation not permitted; set cuda-graph=false"
    )
