"""What the lowerings through ONNX share: memory, sizes that may change, and what they refuse."""

import importlib.util
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from diffopt import optional
from diffopt.core import Pipeline
from diffopt.engine.engine import build, load
from diffopt.errors import DiffoptError
from diffopt.ir.program import Program
from tests.passes.build import body, randn
from tests.targets.test_onnxruntime import one_body

aten = torch.ops.aten

EXTRAS = {"onnxruntime": "onnx", "openvino": "openvino"}

pytestmark = [
    pytest.mark.usefixtures("session_cache"),
    pytest.mark.parametrize("target", EXTRAS),
]


def test_arguments_may_lie_in_memory_in_any_way(
    target: str, engines: Callable[[str], Path]
) -> None:
    opened = load(engines(target))
    noise = torch.randn(8, 2).t()
    assert not noise.is_contiguous()
    assert torch.equal(opened.run([noise])[0], opened.run([noise.contiguous()])[0])


def test_one_engine_serves_a_range_of_batch_sizes(
    target: str, captured: Program, tmp_path: Path
) -> None:
    built = build(Pipeline.parse("batch(max=3)").run(captured), target, tmp_path / "x")
    results = {n: built.serve([{"seed": seed} for seed in range(n)]) for n in (1, 3)}
    for seed, result in [*enumerate(results[1]), *enumerate(results[3])]:
        expected = captured(seed=seed)["images"]
        torch.testing.assert_close(result["images"], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("package", ["the target's own", "onnx-graphsurgeon"])
def test_a_missing_package(
    target: str,
    package: str,
    captured: Program,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find_spec = importlib.util.find_spec
    package = target if package == "the target's own" else package
    missing = package.replace("-", "_")
    monkeypatch.setattr(
        optional.importlib.util,
        "find_spec",
        lambda name: None if name == missing else find_spec(name),
    )
    with pytest.raises(DiffoptError) as caught:
        build(captured, target, tmp_path / "x")
    assert str(caught.value) == (
        f"target {target} cannot take this program: {package} is not installed; install it with"
        f" `pip install diffopt[{EXTRAS[target]}]`"
    )


def test_an_engine_where_the_package_is_missing_or_old(
    target: str, engines: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = engines(target)
    needed = optional.release(target)
    monkeypatch.setattr(optional, "release", lambda package: "1.9")
    with pytest.raises(DiffoptError) as caught:
        load(path)
    assert str(caught.value) == (
        f"{path}: its models need {target} {needed}, this is 1.9; build it again for this"
        ' machine, or load it with target="eager"'
    )
    monkeypatch.setattr(optional.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DiffoptError) as caught:
        load(path)
    assert str(caught.value) == (
        f"{target} is not installed; install it with `pip install diffopt[{EXTRAS[target]}]`"
    )


def test_an_operator_without_a_form_in_onnx(target: str, tmp_path: Path) -> None:
    def make(make: Any, x: fx.Node) -> fx.Node:
        orthogonal: fx.Node = make(operator.getitem, make(aten.linalg_qr.default, x), 0)
        return orthogonal

    x = randn(3, 3)
    with pytest.raises(DiffoptError) as caught:
        build(one_body(body(make, x), x), target, tmp_path / "x")
    assert str(caught.value) == "part: aten.linalg_qr has no form in ONNX; use another target"
