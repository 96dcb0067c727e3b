"""`diffopt bench`: an engine's time and images against the original pipeline's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffopt import bench, models, spec
from diffopt import cli_show as show
from diffopt.cli_run import load, spread, traced_arguments
from diffopt.errors import DiffoptError
from diffopt.images import first_output

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
) -> None:
    """Measure, and print a table or JSON."""
    for name in against:
        if name not in MODES and not Path(name).is_file():
            raise DiffoptError(f"--against: '{name}' is no file{spec.suggest(name, MODES)}")
    if threads is not None:
        torch.set_num_threads(threads)
    engine = load(file)
    source = model or getattr(engine, "manifest", vars(engine))["source"]
    contenders = {"eager": _original(source, engine, arguments, None)}
    for name in against:
        if name in MODES and name != "eager":
            contenders[name] = _original(source, engine, arguments, MODES[name])
        elif name not in MODES:
            contenders[name] = _engine(load(Path(name)), arguments)
    contenders[str(file)] = _engine(engine, arguments)
    with show.progress("benchmark") as report:
        results = bench.measure(
            contenders, "eager", rounds=rounds, warmup=warmup, seed=seed, report=report
        )
    _print(results, torch.get_num_threads(), rounds, as_json)


def _engine(engine: Any, arguments: Mapping[str, Any]) -> bench.Make:
    def make(seed: int) -> Tensor:
        result = engine(**spread(engine, arguments), seed=seed, output_type="pt")
        return torch.as_tensor(first_output(result))

    return make


def _original(
    source: str, engine: Any, arguments: Mapping[str, Any], mode: str | None
) -> bench.Make:
    """Return the original pipeline with the arguments that the engine was made with."""
    if not source:
        raise DiffoptError("the engine does not say what it was made from; give --model")
    pipe = models.load_model(source)
    traced = traced_arguments(engine)
    batch = len(traced["prompt"]) if isinstance(traced.get("prompt"), list) else 1
    if mode is not None:
        bench.compile_pipeline(pipe, mode)

    def make(seed: int) -> Tensor:
        call = {**traced, **spread(engine, arguments), "output_type": "pt"}
        with torch.no_grad():
            result = pipe(**models.call_arguments(pipe, call, batch=batch, seed=seed))
        return torch.as_tensor(first_output(result))

    return make


def _print(results: Mapping[str, bench.Result], threads: int, rounds: int, as_json: bool) -> None:
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
