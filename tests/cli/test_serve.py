"""`diffopt serve`: what it refuses, what it prints, and how it ends."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from diffopt import optional
from diffopt.capture.trace import trace_function
from diffopt.cli import serve
from diffopt.engine.engine import build
from diffopt.errors import DiffoptError
from tests.command import Run
from tests.serving.conftest import fashion  # noqa: F401
from tests.serving.fake_engine import wait_until


def test_the_configuration(diffopt: Run, fashion: Path) -> None:  # noqa: F811
    outcome = diffopt("serve", fashion, "--dry-run", "--max-batch", 2)
    assert outcome.code == 0
    told = json.loads(outcome.out)
    assert (told["host"], told["port"], told["token"]) == ("127.0.0.1", 8000, False)
    assert told["settings"]["max_queue"] == 64
    model = told["models"]["fashion"]
    assert model["endpoint"] == "/v1/images/generations"
    assert (model["size"], model["batch"], model["target"]) == ("32x32", [1, 2], "eager")
    assert "prompt" in model["arguments"]


def test_two_engines_of_one_name(diffopt: Run, tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.engine").touch()
    outcome = diffopt("serve", "x/a.engine", "y/a.engine")
    assert (outcome.code, outcome.err) == (
        2,
        "diffopt: error: x/a.engine and y/a.engine would both be called 'a'; rename one\n",
    )
    assert diffopt("serve", "z.engine").err == "diffopt: error: there is no file z.engine\n"
    (tmp_path / "a.program").touch()
    assert diffopt("serve", "a.program").err == (
        "diffopt: error: a.program: is no .engine file; `diffopt optimize` makes one\n"
    )


def test_an_engine_that_makes_no_pictures(diffopt: Run, tmp_path: Path) -> None:
    import torch

    program = trace_function(lambda x: x * 2, torch.ones(2))
    build(program, "eager", tmp_path / "a.engine")
    outcome = diffopt("serve", "a.engine", "--dry-run")
    assert (outcome.code, outcome.err) == (
        2,
        "diffopt: error: a.engine: makes no pictures, and so cannot be served\n",
    )


def test_a_missing_package(diffopt: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(optional, "is_installed", lambda module: module != "uvicorn")
    outcome = diffopt("serve", "a.engine")
    assert outcome.err == (
        "diffopt: error: uvicorn is not installed; install it with `pip install diffopt[serve]`\n"
    )


def test_nothing_else_imports_fastapi() -> None:
    code = "import sys, diffopt.cli.main, diffopt.cli.run, diffopt.cli.serve;"
    code += "assert 'fastapi' not in sys.modules and 'uvicorn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(serve.VARIABLE, raising=False)
    file = Path("token")
    assert serve.read_token(None) is None
    file.write_text("secret\n")
    assert serve.read_token(file) == "secret"
    problems = {
        b"": "token: the token must be one line of ASCII letters, and not empty",
        b"a\nb": "token: the token must be one line of ASCII letters, and not empty",
        b"\xff": "token: is no plain text",
    }
    for content, problem in problems.items():
        file.write_bytes(content)
        with pytest.raises(DiffoptError) as caught:
            serve.read_token(file)
        assert str(caught.value) == problem
    file.unlink()
    with pytest.raises(DiffoptError, match=r"^token: No such file or directory$"):
        serve.read_token(file)
    monkeypatch.setenv(serve.VARIABLE, "other")
    assert serve.read_token(None) == "other"
    with pytest.raises(DiffoptError) as caught:
        serve.read_token(file)
    assert str(caught.value) == (
        "there is a token in --token-file and in DIFFOPT_TOKEN: give one of the two"
    )


@contextmanager
def serving(
    *words: object, module: str = "diffopt.cli.main"
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Serve in another process; yields the address."""
    command = [sys.executable, "-m", module, *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if match := re.search(r"http://\S+", line):
                    break
            else:
                raise AssertionError("it ended before it served")
            yield match[0], process
        finally:
            process.kill()


def generate(address: str, **more: object) -> httpx.Response:
    body = {"prompt": "dress", **more}
    return httpx.post(f"{address}/v1/images/generations", json=body, timeout=60)


def test_killed_in_the_middle(fashion: Path) -> None:  # noqa: F811
    errors: list[Exception] = []

    def ask() -> None:
        try:
            while True:
                generate(address, n=8)
        except httpx.TransportError as error:
            errors.append(error)

    with serving("serve", fashion, "--port", 0) as (address, process):
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        assert generate(address, n=8).status_code == 200
        process.kill()
        for thread in threads:
            thread.join(10)
        assert len(errors) == 4
    port = address.rpartition(":")[2]
    with serving("serve", fashion, "--port", port) as (again, process):
        assert again == address
        assert generate(address, seed=1).json()["data"][0]["seed"] == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_a_signal_lets_what_was_accepted_finish() -> None:
    """Of an engine that takes two seconds for an image."""
    with serving(module="tests.serving.slow_server") as (address, process):
        answers: list[httpx.Response] = []
        threads = [
            threading.Thread(target=lambda: answers.append(generate(address))) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: httpx.get(f"{address}/health").json()["waiting"]["slow"] == 1)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{address}/health").status_code == 503)
        refused = generate(address)
        assert refused.status_code == 503
        assert refused.json()["error"]["message"] == "the server is shutting down"
        assert process.wait(15) == 0
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200, 200]


def test_a_second_signal_ends_it() -> None:
    with serving(module="tests.serving.slow_server") as (address, process):
        answers: list[httpx.Response] = []
        threads = [
            threading.Thread(target=lambda: answers.append(generate(address))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: httpx.get(f"{address}/health").json()["waiting"]["slow"] == 2)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{address}/health").status_code == 503)
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 0
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [503, 503, 503]
