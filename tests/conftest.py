"""Settings that all tests share."""

import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from diffopt.cli import main
from tests.command import Outcome, Run

# Files that take more than ten seconds, the longest first: they compile kernels, capture many
# pipelines, train, or run what documents say. They are begun first, so that two processes end at
# the same time, and `make test-quick` leaves them out.
SLOW = (
    "capture/test_pipelines",
    *("test_docs", "targets/test_cpu", "targets/test_cpu_int8", "passes/test_quantize"),
    *("passes/test_lengths", "examples/test_gpu", "targets/test_cuda", "passes/test_prune"),
    *("analysis/test_denoiser_structure", "passes/test_cache", "engine/test_reproducible"),
    *("ir/test_qdq", "passes/test_recover", "caching/test_error_model", "passes/test_merge_tokens"),
    *("caching/test_apply_plan", "pruning/test_selection", "targets/test_torch_tensorrt"),
    *("targets/test_tensorrt", "examples/test_quantization", "zoo/test_zoo"),
    *("passes/test_low_rank", "passes/test_cast", "lowering/test_cuda_gemm"),
    *("examples/test_pruning", "lowering/test_onnx"),
    *(
        "engine/test_lora",
        "training/test_distill",
        "cli/test_bench",
        "cli/test_main",
        "transforms/test_drop_guidance",
    ),
    *("transforms/test_outline_steps", "targets/test_onnxruntime", "cli/test_compare"),
    *("serving/test_real_engine", "examples/test_serving", "cli/test_serve"),
    *("serving/test_hostile_requests", "serving/test_app"),
    *("ir/test_program", "ir/test_call_tags", "caching/test_prior_noise"),
)
ORDER = {name: place for place, name in enumerate(SLOW)}

# Files that capture the same pipelines of the zoo, which one process does once for them.
SHARED = ("capture/test_pipelines", "analysis/test_denoiser_structure", "pruning/test_selection")
SHARED += ("ir/test_call_tags", "passes/test_batch")


def pytest_configure(config: pytest.Config) -> None:
    gc.set_threshold(50_000, 20, 10)
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None:
        # One cache for a session and its workers, and not the user's.
        folder = tempfile.mkdtemp(prefix="diffopt-cache-")
        os.environ["DIFFOPT_CACHE"] = folder
        # The code that calls kernels takes most of a compilation here; kernels are as for users.
        os.environ["AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL"] = "O0"
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    elif hasattr(os, "sched_setaffinity"):
        # To each its share of the cores: what one does in parallel would only take turns with the
        # others. On one core kernels are compiled in the worker itself, and not in a process for
        # each, which imports torch first.
        cores = sorted(os.sched_getaffinity(0))
        number, count = int(worker.removeprefix("gw")), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        os.sched_setaffinity(0, cores[number % len(cores) :: count])


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the files of every pipeline, which take an hour, where `-m` has no `every`."""
    named = "every" in (config.option.markexpr or "")
    return True if collection_path.name.startswith("test_every_") and not named else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each file to one process, and those in `SHARED` to the same."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            is_shared = file.removeprefix("tests/").removesuffix(".py") in SHARED
            return "the zoo" if is_shared else file

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


def place_of(item: pytest.Item) -> str:
    """Return where a test's file is below this folder, as `SLOW` names it."""
    folder = Path(__file__).parent
    if folder not in item.path.parents:
        return ""
    return item.path.relative_to(folder).with_suffix("").as_posix()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {item: ORDER.get(place_of(item), len(SLOW)) for item in items}
    items.sort(key=places.__getitem__)
    for item in items:
        if places[item] < len(SLOW):
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Leave what is imported out of searches for garbage: it stays, and is half a million objects.

    With the fewer searches (see `pytest_configure`) this saves a sixth of the time of tests.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def diffopt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Run:
    """Run the command line in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["diffopt", *map(str, words)])
        with pytest.raises(SystemExit) as exit:
            main.main()
        captured = capsys.readouterr()
        return Outcome(exit.value.code or 0, captured.out, captured.err)

    return run
