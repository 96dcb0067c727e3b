"""`diffopt run`: an engine's images into a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffopt.cli import image_files
from diffopt.core import Progress
from diffopt.engine import engine
from diffopt.errors import DiffoptError
from diffopt.ir.program import Program


def load(path: Path, target: str | None = None) -> Any:
    """Return the engine or program in a file; both are called alike.

    `target` is what an engine is to run on instead of what it was built for.
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
    """Repeat what was traced as a list, one item an image, and is given once."""
    traced = traced_arguments(loaded)
    return {
        name: [value] * len(traced[name])
        if isinstance(traced.get(name), list) and not isinstance(value, list)
        else value
        for name, value in arguments.items()
    }


def make(
    loaded: Any, arguments: Mapping[str, Any], seed: int, number: int, progress: Progress
) -> list[Any]:
    """Return the results of as many calls as make `number` images, one seed after another."""
    low, high = loaded.batch or (1, 1)
    call = spread(loaded, arguments)
    results: list[Any] = []
    made = 0
    while made < number:
        progress(f"image {made + 1} of {number}", made / number)
        count = min(high, max(low, number - made))
        for result in loaded.serve([{**call, "seed": seed + made + k} for k in range(count)]):
            results.append(image_files.first_output(result))
        made = sum(map(len, results))
    return results


def run(
    file: Path,
    arguments: Mapping[str, Any],
    seed: int,
    number: int,
    output: Path,
    progress: Progress,
    target: str | None = None,
) -> str:
    """Make `number` images, one seed after another, and write them; return how many of what."""
    kind = image_files.output_type(
        output
    )  # before the engine is loaded: a wrong name costs nothing
    results = make(load(file, target), {**arguments, "output_type": kind}, seed, number, progress)
    written = image_files.save(results, output, number)
    return f"{written} {'image' if kind == 'pil' else 'item'}{'s' if written != 1 else ''}"
