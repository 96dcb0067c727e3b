"""Two builds of the same program give the same file, in processes that order sets differently."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from diffopt.targets import cpu

ROOT = Path(__file__).parents[2]

# The target cpu gets one component, as each compiles long, with weights that are packed on loading.
CHILD = """
import sys, time

from diffopt.core import Pipeline
from diffopt.engine.engine import build
from tests import loops

time.perf_counter = float  # how long passes take is in the files, too: no time here
folder = sys.argv[1]
int8 = "quantize(int8,ends=true,samples=1)"
whole = Pipeline.parse(f"unroll,hoist,simplify,fuse,{int8}").run(loops.program(steps=2))
whole.save(f"{folder}/whole.program")
build(whole, "eager", f"{folder}/eager.engine")
build(whole, "onnxruntime", f"{folder}/onnxruntime.engine")
build(Pipeline.parse(int8).run(loops.program(steps=1)), "cpu", f"{folder}/cpu.engine")
"""


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return folders with the same files, each made in a process with its own cache."""
    folders = []
    for seed in ("1", "2"):
        folders.append(folder := tmp_path_factory.mktemp("build"))
        environment = {
            **os.environ,
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": str(ROOT),
            "DIFFOPT_CACHE": str(folder / "cache"),
        }
        command = [sys.executable, "-c", CHILD, str(folder)]
        subprocess.run(command, env=environment, check=True, capture_output=True)
    return folders


NAMES = ("whole.program", "eager.engine", "onnxruntime.engine", "cpu.engine")


@pytest.mark.parametrize("name", NAMES)
def test_two_builds_give_the_same_file(name: str, builds: list[Path]) -> None:
    one, other = (zipfile.ZipFile(folder / name) for folder in builds)
    assert one.namelist() == other.namelist()
    assert [n for n in one.namelist() if one.read(n) != other.read(n)] == []
    assert (builds[0] / name).read_bytes() == (builds[1] / name).read_bytes()
    if name == "cpu.engine" and not cpu._lack():
        assert "kernels/(setup).json" in one.namelist()
