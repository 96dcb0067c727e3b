"""What the tests of targets share."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from unittest import mock

import pytest

from diffopt.engine.engine import build
from diffopt.ir.program import Program
from diffopt.lowering import aoti
from tests.sampler import program


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def session_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what is compiled from what users have, for the tests of a session to share."""
    monkeypatch.setenv("DIFFOPT_CACHE", str(cache))


@pytest.fixture(scope="module")
def captured() -> Program:
    return program()


def run_jobs_here(
    jobs: Mapping[str, tuple[str, str]], processes: int, folder: str
) -> Iterator[tuple[str, float]]:
    """Run jobs of `aoti.compile_bodies` in this process, which has imported the compiler."""
    for name, paths in jobs.items():
        aoti.run_job(*paths)
        yield name, 0.0


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that builds the sampler for a target, each text once."""
    paths: dict[str, Path] = {}

    def make(text: str) -> Path:
        if text not in paths:
            paths[text] = tmp_path_factory.mktemp("engines") / "x.engine"
            # Two components at once, as on a machine with several cores; in processes for `cpu`.
            run_jobs = aoti._run_jobs if text == "cpu" else run_jobs_here
            with (
                mock.patch.object(os, "sched_getaffinity", return_value={0, 1}),
                mock.patch.object(aoti, "_run_jobs", run_jobs),
            ):
                build(program(), text, paths[text])
        return paths[text]

    return make
