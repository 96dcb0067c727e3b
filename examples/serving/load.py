"""Measures `diffopt serve` with 1, 8 and 64 clients: batches as they come against one at a time.

    python -m examples.serving.load

Builds fashion-sd for the CPU with `--batch 1..8`, starts a server for each way, and lets clients
ask for one image after another, each with its own prompt and seed. Writes docs/serving.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "models" / "fashion-sd"
CLIENTS = (1, 8, 64)
PROMPTS = ("ankle boot", "dress", "sneaker", "coat", "bag", "sandal", "shirt", "trouser")
WAYS = {"dynamic batches": (), "one at a time": ("--max-batch", "1")}
DIFFOPT = (sys.executable, "-m", "diffopt.cli.main")


@contextmanager
def server(engine: Path, *options: str) -> Iterator[str]:
    """Serve an engine in another process; yields its address."""
    command = [*DIFFOPT, "serve", str(engine), "--port", "0", "--max-queue", "256", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if match := re.search(r"http://\S+", line):
                    yield match[0]
                    break
            else:
                raise RuntimeError(f"{' '.join(command)} ended before it served")
        finally:
            process.terminate()


def measure(address: str, clients: int, seconds: float) -> dict[str, Any]:
    """Return what clients that ask for one image after another got in some seconds."""
    latencies: list[float] = []
    end = time.perf_counter() + seconds

    def client(number: int) -> None:
        with httpx.Client(base_url=address, timeout=120) as http:
            count = 0
            while not count or time.perf_counter() < end:
                prompt = PROMPTS[(number + count) % len(PROMPTS)]
                body = {"prompt": prompt, "seed": 1000 * number + count}
                began = time.perf_counter()
                http.post("/v1/images/generations", json=body).raise_for_status()
                latencies.append(time.perf_counter() - began)
                count += 1

    began = time.perf_counter()
    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = time.perf_counter() - began
    p50, p95, p99 = 1000 * np.percentile(latencies, (50, 95, 99))
    return {
        "clients": clients,
        "requests": len(latencies),
        "requests/s": len(latencies) / taken,
        "p50 ms": p50,
        "p95 ms": p95,
        "p99 ms": p99,
    }


def batch_sizes(address: str) -> dict[str, float]:
    """Return how many images and runs the server counts."""
    text = httpx.get(f"{address}/metrics").text
    rows = dict(re.findall(r"^diffopt_batch_size_(sum|count)\{.*\} (.+)$", text, re.MULTILINE))
    return {"images": float(rows["sum"]), "runs": float(rows["count"])}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    columns = ("way", "clients", "requests/s", "p50 ms", "p95 ms", "p99 ms", "images a run")
    lines = ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]
    for row in rows:
        cells = [str(row["way"]), str(row["clients"]), f"{row['requests/s']:.1f}"]
        cells += [f"{row[name]:.0f}" for name in columns[3:6]] + [f"{row['images a run']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Build, measure, print a table and write the numbers."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each measurement")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "serving.json")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        engine = Path(folder, "fashion.engine")
        build = ["optimize", str(MODEL), "--steps", str(options.steps), "--batch", "1..8"]
        build += ["--target", options.target, "--no-compare", "-o", str(engine)]
        subprocess.run([*DIFFOPT, *build], check=True)
        for way, more in WAYS.items():
            with server(engine, *more) as address:
                measure(address, 8, options.seconds / 10)  # warm
                for clients in CLIENTS:
                    before = batch_sizes(address)
                    row = measure(address, clients, options.seconds)
                    after = batch_sizes(address)
                    images, runs = (after[name] - before[name] for name in ("images", "runs"))
                    rows.append({"way": way, **row, "images a run": images / runs})
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    facts = {"target": options.target, "steps": options.steps, "machine": machine}
    options.output.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
