"""`diffopt bench`: an engine's time and images against the original pipeline's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffopt import spec
from diffopt.capture.module_state import pipeline_digests
from diffopt.cli import load_model, timing
from diffopt.cli import output as show
from diffopt.cli.flags import BenchFlags
from diffopt.cli.image_files import as_tensors
from diffopt.cli.run import load_file, provenance, traced_arguments
from diffopt.errors import DiffoptError
from diffopt.host.outputs import first_output
from diffopt.host.plain_arguments import as_traced
from diffopt.ir.program import Program

MODES = {"eager": None, "compile": "default", "max-autotune": "max-autotune"}


def run(flags: BenchFlags, arguments: Mapping[str, Any]) -> None:
    """Measure, and print a table or JSON; every call makes `flags.batch` images."""
    file, against = flags.engine, flags.against.split(",")
    for name in against:
        if name not in MODES and not Path(name).is_file():
            raise DiffoptError(f"--against: '{name}' is no file{spec.suggest(name, MODES)}")
    if flags.threads is not None:
        torch.set_num_threads(flags.threads)
    engine = load_file(file)
    source = flags.model or provenance(engine)["source"]
    pipe = _pipeline(source, flags.dtype)
    _compare_weights(file, engine, source, pipe)
    batch = flags.batch or _list_length(engine)
    contenders = {"eager": _original(pipe, engine, arguments, batch)}
    for name in against:
        if name in MODES and name != "eager":
            compiled = _pipeline(source, flags.dtype)
            timing.compile_pipeline(compiled, MODES[name])
            contenders[name] = _original(compiled, engine, arguments, batch)
        elif name not in MODES:
            other = load_file(Path(name))
            if provenance(other)["source"] == source:
                _compare_weights(Path(name), other, source, pipe)
            contenders[name] = _engine(other, arguments, batch)
    contenders[str(file)] = _engine(engine, arguments, batch)
    with show.progress("benchmark") as progress:
        settings = {"rounds": flags.rounds, "warmup": flags.warmup, "seed": flags.seed}
        results = timing.measure(contenders, "eager", **settings, progress=progress)
    _print(results, torch.get_num_threads(), flags)


def _engine(engine: Any, arguments: Mapping[str, Any], batch: int) -> timing.Sampler:
    """Return the engine as a contender that makes `batch` images with these arguments."""
    count = _list_length(engine)
    call = {**as_traced(engine.host, arguments), **as_tensors(engine)}

    def sampler(seed: int) -> Tensor:
        calls = [engine.host.seeded(call, seed + k) for k in range(0, batch, count)]
        results = engine.serve(calls)
        return torch.cat([torch.as_tensor(first_output(result)) for result in results])

    return sampler


def _list_length(engine: Any) -> int:
    """Return the number of prompts, and so of images, of the traced call."""
    prompt = traced_arguments(engine).get("prompt")
    return len(prompt) if isinstance(prompt, list) else 1


def _pipeline(source: str, dtype: str) -> Any:
    if not source:
        raise DiffoptError("the engine does not say what it was made from; give --model")
    return load_model.load_model(source, dtype)


def _compare_weights(file: Path, engine: Any, source: str, pipe: Any) -> None:
    """Raise a `DiffoptError` if the model's weights have changed since the file was built."""
    built = provenance(engine).get("digests", {})
    components = getattr(pipe, "components", {})
    now = pipe.digests if isinstance(pipe, Program) else pipeline_digests(components)
    # A module that only one of them has, such as a safety checker turned off, changes no image.
    changed = [name for name in built.keys() & now.keys() if built[name] != now[name]]
    if changed:
        raise DiffoptError(
            f"{file} was built from other weights of {', '.join(sorted(changed))} than {source}"
            " has now; build it again, or give the --dtype that it was built with"
        )


def _original(pipe: Any, engine: Any, arguments: Mapping[str, Any], batch: int) -> timing.Sampler:
    """Return the original pipeline as a contender, with the arguments of the traced call."""
    call = {**traced_arguments(engine), **as_traced(engine.host, arguments), **as_tensors(engine)}
    for name in ("prompt", "negative_prompt", "class_labels"):
        value = call.get(name)
        if (
            batch > 1
            and value is not None
            and not (isinstance(value, list) and len(value) == batch)
        ):
            call[name] = (value if isinstance(value, list) else [value]) * batch

    def sampler(seed: int) -> Tensor:
        if isinstance(pipe, Program):
            return torch.as_tensor(first_output(pipe(**pipe.host.seeded(call, seed))))
        with torch.no_grad():
            result = pipe(**load_model.call_arguments(pipe, call, batch=batch, seed=seed))
        return torch.as_tensor(first_output(result))

    return sampler


def _print(results: Mapping[str, timing.Result], threads: int, flags: BenchFlags) -> None:
    base = results["eager"].median
    if flags.as_json:
        rows = {
            name: {**asdict(r), "median": r.median, "iqr": r.spread, "speedup": base / r.median}
            for name, r in results.items()
        }
        show.print_json({"threads": threads, "rounds": flags.rounds, "results": rows})
        return
    show.table(
        f"{flags.rounds} rounds, {threads} threads; images against eager",
        ["", "median ms", "IQR ms", "speedup", "first call s", "max difference", "PSNR dB"],
        [
            [
                name,
                f"{1000 * r.median:.1f}",
                f"{1000 * r.spread:.1f}",
                f"{base / r.median:.2f}×",
                f"{r.first:.1f}",
                f"{r.max_abs:.2g}",
                f"{r.psnr:.1f}",
            ]
            for name, r in results.items()
        ],
    )
