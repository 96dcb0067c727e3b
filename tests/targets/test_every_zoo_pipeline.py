"""Every pipeline of the zoo on the lowerings through ONNX: six minutes, left out of the suite.

python -m pytest tests/targets/test_every_zoo_pipeline.py -m every
"""

from pathlib import Path

import pytest
import torch

from diffopt.core import Pipeline
from diffopt.engine.engine import build
from tests.zoo import CASES, traced

pytestmark = pytest.mark.every


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", CASES)
def test_engine_gives_what_the_program_gives(name: str, target: str, tmp_path: Path) -> None:
    program = Pipeline.parse("unroll,hoist,simplify,fuse").run(traced(name), compare=False)
    engine = build(program, target, tmp_path / "x.engine")
    inputs = program.sample_inputs()
    for result, expected in zip(engine.run(inputs), program.run(inputs), strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(result, expected, atol=1e-4 * scale, rtol=1e-4)
