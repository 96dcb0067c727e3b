"""The measurement of a server under load, with an engine that compiles nothing."""

import json
import sys
from pathlib import Path

import pytest

from examples.serving import load


def test_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "serving.json"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ["--target", "eager", "--steps", "1", "--seconds", "0.5", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["load", *options])
    load.main()
    rows = json.loads(output.read_text())["rows"]
    assert [(row["way"], row["clients"]) for row in rows] == [
        (way, clients) for way in load.WAYS for clients in load.CLIENTS
    ]
    alone = [row["images a run"] for row in rows if row["way"] == "one at a time"]
    assert alone == [1.0, 1.0, 1.0]
    assert rows[2]["images a run"] > 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| way | clients | requests/s | p50 ms | p95 ms | p99 ms | images a run |"
    assert len(lines) == 8
