"""Time pipelines in real sizes, eager and as engines, and write docs/real-sizes.json.

    python -m examples.real_sizes.models sd15 FOLDER/sd15
    python -m examples.real_sizes.bench FOLDER/sd15 --rounds 3

Each contender is a process that loads one thing; they take turns, round by round, so that a slow
minute of the machine affects all. Peak memory is a process's own. Engines are built here, from a
cold cache of kernels, and their build is timed in phases. Weights are random: differences are those
to the eager pipeline with as many bits, and say nothing of pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STEPS = 4
PROMPT = "a red cat"
PASSES = "unroll,hoist,simplify,fuse"
CACHED = {
    "unet": "unroll,hoist,cache(deepcache,interval=4),simplify,fuse",
    "transformer": "unroll,hoist,cache(fora,interval=4),simplify,fuse",
}
INT8 = "unroll,hoist,simplify,quantize(int8,activations=rows),fuse"


@dataclass(frozen=True)
class Contender:
    """One way to run a pipeline.

    Attributes:
        name: In the table.
        dtype: Of the weights.
        passes: Of an engine; "" for the pipeline itself.
        target: Of an engine, or how the pipeline runs: eager or compile.
        python: The interpreter, if it is another's package that needs one of its own.
    """

    name: str
    dtype: str
    passes: str
    target: str
    python: str = sys.executable


def contenders(folder: Path, optimum: str | None) -> list[Contender]:
    """Return all rows of a pipeline's table, the reference first."""
    cached = next(passes for part, passes in CACHED.items() if (folder / part).is_dir())
    rows = [Contender("diffusers, eager", "bf16", "", "eager")]
    if optimum is not None:
        rows.append(Contender("optimum-intel", "bf16", "", "optimum", optimum))
    return [
        *rows,
        Contender("engine, cpu", "bf16", PASSES, "cpu"),
        Contender("engine, openvino", "bf16", PASSES, "openvino"),
        Contender("engine, cpu, cached", "bf16", cached, "cpu"),
        Contender("engine, openvino, cached", "bf16", cached, "openvino"),
        Contender("engine, openvino, int8", "bf16", INT8, "openvino"),
        Contender("diffusers, torch.compile", "bf16", "", "compile"),
        Contender("diffusers, eager, fp32", "fp32", "", "eager"),
        Contender("engine, openvino, fp32", "fp32", PASSES, "openvino"),
        Contender("engine, onnxruntime, fp32", "fp32", PASSES, "onnxruntime"),
    ]


# The process of one contender


def serve(address: str) -> None:
    """Load the contender that the parent names, then answer each seed with a call's seconds."""
    connection = Client(address)
    contender, folder, engine = connection.recv()
    try:
        call, facts = _load(contender, folder, engine)
        connection.send(("ready", facts))
        while (seed := connection.recv()) is not None:
            started = time.perf_counter()
            images = call(seed)
            seconds = time.perf_counter() - started
            connection.send(("done", {"seconds": seconds, "peak": _peak(), "images": images}))
    except Exception as error:  # the others go on
        connection.send(("failed", f"{type(error).__name__}: {str(error).splitlines()[0]}"))


def _load(
    contender: Contender, folder: Path, engine: Path
) -> tuple[Callable[[int], Any], dict[str, Any]]:
    started = time.perf_counter()
    if contender.target == "optimum":
        call = _optimum(folder)
    elif contender.passes:
        call = _engine(engine)
    else:
        call = _pipeline(folder, contender)
    return call, {"load": time.perf_counter() - started, "after load": _peak()}


def _pipeline(folder: Path, contender: Contender) -> Callable[[int], Any]:
    import torch

    from diffopt.cli import load_model, timing

    pipe = load_model.load_model(str(folder), contender.dtype)
    if contender.target == "compile":
        timing.compile_pipeline(pipe, None)

    def call(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        arguments = load_model.call_arguments(pipe, {"output_type": "pt"}, steps=STEPS)
        arguments |= {"generator": generator, "prompt": PROMPT}
        return pipe(**arguments).images.float().numpy()

    return call


def _engine(path: Path) -> Callable[[int], Any]:
    import diffopt

    engine = diffopt.load(path)
    return lambda seed: engine(seed=seed)["images"].float().numpy()


def _optimum(folder: Path) -> Callable[[int], Any]:
    import torch
    from optimum.intel import OVDiffusionPipeline

    pipe = OVDiffusionPipeline.from_pretrained(
        folder, export=True, compile=True, ov_config={"INFERENCE_PRECISION_HINT": "bf16"}
    )

    def call(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        result = pipe(PROMPT, num_inference_steps=STEPS, generator=generator, output_type="np")
        return result.images.transpose(0, 3, 1, 2)

    return call


def _peak() -> float:
    """Return the largest resident set of this process so far, in GB; mapped files count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    row = next(line for line in lines if line.startswith("VmHWM"))
    return int(row.split()[1]) * 1024 / 1e9


# The parent process


def build(contender: Contender, folder: Path, output: Path) -> dict[str, Any]:
    """Build an engine as the command line does, and return its phases, memory and file size."""
    words = [str(Path(sys.executable).with_name("diffopt")), "optimize"]
    settings = ["--steps", str(STEPS), "--no-check", "--no-compare", "--json"]
    words += [str(folder), "--dtype", contender.dtype]
    words += ["--set", f"prompt={PROMPT}", "--set", "output_type=pt"]
    words += ["-p", contender.passes, "-t", contender.target, "-o", str(output), *settings]
    started = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    result = json.loads(done.stdout)
    return {
        **result["phases"],
        "wall": time.perf_counter() - started,
        "passes": {row["text"]: row["seconds"] for row in result["passes"]},
        "file": output.stat().st_size,
    }


class Runner:
    """A contender's process, as the parent sees it."""

    def __init__(self, contender: Contender, folder: Path, engine: Path) -> None:
        address = str(engine.with_suffix(".socket"))
        with Listener(address) as listener:
            # Not by multiprocessing: that would give another interpreter the packages of this one.
            command = [contender.python, "-m", "examples.real_sizes.bench", "--serve", address]
            self._process = subprocess.Popen(command, cwd=ROOT)
            self._connection = listener.accept()
        self._connection.send((contender, folder, engine))
        self.facts = self._receive()

    def run(self, seed: int) -> dict[str, Any]:
        """Return the seconds, the peak memory and the images of a call."""
        self._connection.send(seed)
        return self._receive()

    def stop(self) -> None:
        """End the process."""
        self._connection.send(None)
        self._process.wait()

    def _receive(self) -> dict[str, Any]:
        what, value = self._connection.recv()
        if what == "failed":
            raise RuntimeError(value)
        facts: dict[str, Any] = value
        return facts


def measure(
    rows: Sequence[Contender], folder: Path, rounds: int, engines: Path
) -> dict[str, dict[str, Any]]:
    """Build the engines, load all contenders, and let them take turns."""
    results: dict[str, dict[str, Any]] = {row.name: {} for row in rows}
    runners: dict[str, Runner] = {}
    for index, row in enumerate(rows):
        engine = engines / f"{index}.engine"
        try:
            if row.passes:
                results[row.name]["build"] = build(row, folder, engine)
                report(f"{row.name}: built in {results[row.name]['build']['wall']:.0f} s")
            runners[row.name] = Runner(row, folder, engine)
            results[row.name] |= runners[row.name].facts | {"seconds": []}
            runners[row.name].run(0)  # the warm-up
        except RuntimeError as error:
            results[row.name]["failed"] = str(error)
            runners.pop(row.name, None)
            report(f"{row.name}: {error}")
    images: dict[str, Any] = {}
    for number in range(rounds):
        for row in rows:
            if row.name in runners:
                answer = runners[row.name].run(1)
                results[row.name]["seconds"].append(answer["seconds"])
                results[row.name]["peak"] = answer["peak"]
                images[row.name] = answer["images"]
                report(f"round {number + 1}, {row.name}: {answer['seconds']:.1f} s")
    for row in rows:
        reference = next((r.name for r in rows if r.target == "eager" and r.dtype == row.dtype), "")
        if row.name in images and reference in images:
            results[row.name]["difference"] = _difference(images[row.name], images[reference])
    for runner in runners.values():
        runner.stop()
    return results


def _difference(images: Any, reference: Any) -> float:
    """Return the norm of the difference of images over the norm of the reference."""
    return float(((images - reference) ** 2).sum() ** 0.5 / (reference**2).sum() ** 0.5)


def report(text: str) -> None:
    """Say how far it is."""
    print(text, file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    import torch

    cpu = Path("/proc/cpuinfo").read_text().splitlines()
    name = next(line.partition(": ")[2] for line in cpu if line.startswith("model name"))
    flags = next(line for line in cpu if line.startswith("flags")).split()
    packages = {}
    for package in ("torch", "diffusers", "openvino", "onnxruntime"):
        packages[package] = __import__(package).__version__
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "has": [f for f in ("avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if f in flags],
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": packages,
        "load before": os.getloadavg()[0],
    }


def main() -> None:
    """Measure one pipeline, and write its rows into the file of results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="names of contenders")
    parser.add_argument("--optimum", help="a Python that has optimum-intel")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "real-sizes.json")
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    if options.folder is None:
        parser.error("name the folder of a pipeline, as examples.real_sizes.models writes it")
    rows = contenders(options.folder, options.optimum)
    if options.only:
        rows = [row for row in rows if row.name in options.only]
    known = json.loads(options.out.read_text()) if options.out.exists() else {}
    with tempfile.TemporaryDirectory(prefix="real-sizes-") as folder:
        os.environ["DIFFOPT_CACHE"] = str(Path(folder, "cache"))
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder, "inductor"))
        facts = machine()
        results = measure(rows, options.folder.resolve(), options.rounds, Path(folder))
    before = known.get(options.folder.name, {})
    known[options.folder.name] = {"machine": facts, "rows": before.get("rows", {}) | results}
    options.out.write_text(json.dumps(known, indent=1) + "\n")
    for name, row in results.items():
        if row.get("seconds"):
            median = statistics.median(row["seconds"])
            print(f"{name:28} {median:7.2f} s, peak {row['peak']:.1f} GB")


if __name__ == "__main__":
    main()
