"""What tests of real engines share."""

from pathlib import Path

import pytest

from diffopt.cli import load_model
from diffopt.core import Pipeline
from diffopt.engine.engine import build

MODEL = Path(__file__).parents[2] / "examples" / "models" / "fashion-sd"


@pytest.fixture(scope="session")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine of fashion-sd with three steps, for up to four requests at once."""
    path = tmp_path_factory.mktemp("serving") / "fashion.engine"
    call = load_model.TracedCall({}, 3, check=False)
    program = load_model.trace_model(str(MODEL), call)
    program = Pipeline.parse("unroll,hoist,batch(max=4)").run(program)
    build(program, "eager", path)
    return path
