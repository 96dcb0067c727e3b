"""`diffopt run`: runs an engine and writes its images to a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffopt.cli import image_files
from diffopt.cli.flags import RunFlags
from diffopt.core import Progress
from diffopt.engine import engine
from diffopt.errors import DiffoptError
from diffopt.ir.program import Program


def load_file(path: Path, target: str | None = None) -> Any:
    """Return the engine or program of a file; both are called alike.

    An engine runs on `target` instead of the one that it was built for.
    """
    if not path.is_file():
        raise DiffoptError(f"there is no file {path}")
    if path.suffix != ".program":
        return engine.load(path, target=target)
    if target is not None:
        raise DiffoptError(f"--target {target}: {path} is a program, which runs without a target")
    return Program.load(path)


def traced_arguments(loaded: Any) -> dict[str, Any]:
    """Return the plain arguments of the call that an engine or program was traced with."""
    return dict(loaded.host.call)


def spread(loaded: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Repeat a single value for each image where the traced call had a list."""
    traced = traced_arguments(loaded)
    return {
        name: [value] * len(traced[name])
        if isinstance(traced.get(name), list) and not isinstance(value, list)
        else value
        for name, value in arguments.items()
    }


def sample(
    loaded: Any, arguments: Mapping[str, Any], seed: int, number: int, progress: Progress
) -> list[Any]:
    """Return the results of as many calls as sample `number` images, one seed after another."""
    low, high = loaded.batch or (1, 1)
    call = spread(loaded, arguments)
    results: list[Any] = []
    done = 0
    while done < number:
        progress(f"image {done + 1} of {number}", done / number)
        count = min(high, max(low, number - done))
        for result in loaded.serve([{**call, "seed": seed + done + k} for k in range(count)]):
            results.append(image_files.first_output(result))
        done = sum(map(len, results))
    return results


def run(flags: RunFlags, arguments: Mapping[str, Any], progress: Progress) -> str:
    """Sample images, one seed after another, and write them; return their number as text."""
    kind = image_files.output_type(flags.output)  # before loading: a wrong name costs nothing
    loaded = load_file(flags.engine, flags.target)
    arguments = {**arguments, "output_type": kind}
    results = sample(loaded, arguments, flags.seed, flags.number, progress)
    written = image_files.save(results, flags.output, flags.number)
    return f"{written} {'image' if kind == 'pil' else 'item'}{'s' if written != 1 else ''}"
