"""Settings that all tests share."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from diffopt.cli import main
from tests.command import Outcome, Run

# Files with few tests that take long: begun first, so that two processes end at the same time.
LONG = (
    *("test_docs", "benchmark", "test_examples", "tests/targets", "test_zoo", "test_recover"),
    "tests/capture/test_pipelines",
)


def pytest_configure(config: pytest.Config) -> None:
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None:
        # One cache for a session and its workers, and not the user's.
        folder = tempfile.mkdtemp(prefix="diffopt-cache-")
        os.environ["DIFFOPT_CACHE"] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    elif hasattr(os, "sched_setaffinity"):
        # To each its share of the cores: what one does in parallel would only take turns with the
        # others. On one core kernels are compiled in the worker itself, and not in a process for
        # each, which imports torch first.
        cores = sorted(os.sched_getaffinity(0))
        number, count = int(worker.removeprefix("gw")), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        os.sched_setaffinity(0, cores[number % len(cores) :: count])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not any(part in str(item.path) for part in LONG))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


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
