"""`diffopt bench`: an engine's time and images against the original pipeline's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffopt import spec
from diffopt.cli import load_model, timing
from diffopt.cli import output as show
from diffopt.cli.image_files import first_output
from diffopt.cli.run import load, spread, traced_arguments
from diffopt.errors import DiffoptError
from diffopt.ir.program import Program
from diffopt.storage.weight_digests import digests

MODES = {"eager": None, "compile": "default", "max-autotune": "max-autotune"}


def run(
    file: Path,
    against: Sequence[str],
    model: str,
    arguments: Mapping[str, Any],
    seed: int,
    rounds: int,
    warmup: int,
    threads: int | None,
    as_json: bool,
    batch: int | None = None,
) -> None:
    """Measure, and print a table or JSON; every call makes `batch` images."""
    for name in against:
        if name not in MODES and not Path(name).is_file():
            raise DiffoptError(f"--against: '{name}' is no file{spec.suggest(name, MODES)}")
    if threads is not None:
        torch.set_num_threads(threads)
    engine = load(file)
    source = model or _provenance(engine)["source"]
    pipe = _pipeline(source)
    _compare_weights(file, engine, source, pipe)
    batch = batch or _list_length(engine)
    contenders = {"eager": _original(pipe, engine, arguments, batch)}
    for name in against:
        if name in MODES and name != "eager":
            compiled = _pipeline(source)
            timing.compile_pipeline(compiled, MODES[name])
            contenders[name] = _original(compiled, engine, arguments, batch)
        elif name not in MODES:
            other = load(Path(name))
            if _provenance(other)["source"] == source:
                _compare_weights(Path(name), other, source, pipe)
            contenders[name] = _engine(other, arguments, batch)
    contenders[str(file)] = _engine(engine, arguments, batch)
    with show.progress("benchmark") as progress:
        results = timing.measure(
            contenders, "eager", rounds=rounds, warmup=warmup, seed=seed, progress=progress
        )
    _print(results, torch.get_num_threads(), rounds, as_json)


def _engine(engine: Any, arguments: Mapping[str, Any], batch: int) -> timing.Make:
    own = _list_length(engine)
    call = {**spread(engine, arguments), "output_type": "pt"}

    def make(seed: int) -> Tensor:
        results = engine.serve([{**call, "seed": seed + k} for k in range(0, batch, own)])
        return torch.cat([torch.as_tensor(first_output(result)) for result in results])

    return make


def _list_length(engine: Any) -> int:
    """Return how many images a call of the original made, each with a prompt of its own."""
    prompt = traced_arguments(engine).get("prompt")
    return len(prompt) if isinstance(prompt, list) else 1


def _provenance(engine: Any) -> Mapping[str, Any]:
    """Return what an engine, or a program, says that it was made from."""
    return vars(engine) if isinstance(engine, Program) else engine.manifest


def _pipeline(source: str) -> Any:
    if not source:
        raise DiffoptError("the engine does not say what it was made from; give --model")
    return load_model.load_model(source)


def _compare_weights(file: Path, engine: Any, source: str, pipe: Any) -> None:
    """Refuse to compare images that differ because the model's weights are not those of then."""
    then = _provenance(engine).get("digests", {})
    components = getattr(pipe, "components", {})
    now = pipe.digests if isinstance(pipe, Program) else digests(components)
    # A module that one of both lacks, such as a safety checker turned off, need not matter.
    changed = [name for name in then.keys() & now.keys() if then[name] != now[name]]
    if changed:
        raise DiffoptError(
            f"{file} was built from other weights of {', '.join(sorted(changed))} than {source}"
            " has now; build it again"
        )


def _original(pipe: Any, engine: Any, arguments: Mapping[str, Any], batch: int) -> timing.Make:
    """Return the original pipeline with the arguments that the engine was made with."""
    call = {**traced_arguments(engine), **spread(engine, arguments), "output_type": "pt"}
    for name in ("prompt", "negative_prompt", "class_labels"):
        value = call.get(name)
        if (
            batch > 1
            and value is not None
            and not (isinstance(value, list) and len(value) == batch)
        ):
            call[name] = (value if isinstance(value, list) else [value]) * batch

    def make(seed: int) -> Tensor:
        with torch.no_grad():
            result = pipe(**load_model.call_arguments(pipe, call, batch=batch, seed=seed))
        return torch.as_tensor(first_output(result))

    return make


def _print(results: Mapping[str, timing.Result], threads: int, rounds: int, as_json: bool) -> None:
    base = results["eager"].median
    if as_json:
        rows = {
            name: {**asdict(r), "median": r.median, "iqr": r.spread, "speedup": base / r.median}
            for name, r in results.items()
        }
        show.print_json({"threads": threads, "rounds": rounds, "results": rows})
        return
    show.table(
        f"{rounds} rounds, {threads} threads; images against eager",
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
