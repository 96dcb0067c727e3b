"""`diffopt run`: runs an engine and writes its images to a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diffopt.cli import image_files
from diffopt.cli.flags import RunFlags
from diffopt.core import Progress
from diffopt.engine import engine
from diffopt.errors import DiffoptError, first_line
from diffopt.ir.program import Program


def load_file(
    path: Path, target: str | None = None, trusted_keys: Sequence[str] | None = None
) -> Any:
    """Return the engine or program of a file; both are called alike.

    An engine runs on `target` instead of the one that it was built for, and must be signed by one
    of the keys, if there are any.
    """
    if not path.is_file():
        raise DiffoptError(f"there is no file {path}")
    if path.suffix != ".program":
        return engine.load(path, target=target, trusted_keys=trusted_keys)
    if target is not None:
        raise DiffoptError(f"--target {target}: {path} is a program, which runs without a target")
    return Program.load(path, trusted_keys=trusted_keys)


def load_loras(loaded: Any, texts: Sequence[str]) -> None:
    """Add LoRAs, each `FILE` or `FILE:SCALE`, to what `load_file` returned."""
    if texts and not isinstance(loaded, engine.Engine):
        raise DiffoptError(f"--lora {texts[0]}: a program takes no LoRA; build an engine of it")
    for number, text in enumerate(texts):
        loaded.load_lora(*_lora(text), str(number))


def _lora(text: str) -> tuple[str, float]:
    """Return the path and the scale of a LoRA; a colon may be the path's own."""
    path, colon, scale = text.rpartition(":")
    try:
        return (path, float(scale)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0


def traced_arguments(loaded: Any) -> dict[str, Any]:
    """Return the plain arguments of the call that an engine or program was traced with."""
    return dict(loaded.host.call)


def provenance(loaded: Any) -> Mapping[str, Any]:
    """Return a table with the source and the weight digests of an engine or a program."""
    return vars(loaded) if isinstance(loaded, Program) else loaded.manifest


def spread(loaded: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments as the traced call had them: a tensor for numbers, a list for one value.

    The command line has no tensors, and a single value stands for each image.
    """
    return {
        name: _as_traced(value, loaded.host.schema.get(name, {}))
        for name, value in arguments.items()
    }


def _as_traced(value: Any, traced: Mapping[str, Any]) -> Any:
    if "list" in traced and not isinstance(value, list):
        return [value] * len(traced["list"])
    if "tensor" in traced and isinstance(value, (int, float, list)):
        return torch.tensor(value, dtype=getattr(torch, traced["tensor"][0]))
    return value


def sample(
    loaded: Any, arguments: Mapping[str, Any], seed: int | None, number: int, progress: Progress
) -> list[Any]:
    """Return the results of as many calls as sample `number` images, one seed after another.

    From 0 on where `seed` is None, and without one where the program takes none.
    """
    low, high = loaded.batch or (1, 1)
    if seed is not None:
        if type(seed) is not int:
            raise DiffoptError(f"seed={seed!r}: must be a whole number")
        arguments = {**arguments, "seed": seed}  # which a program that takes none refuses
    elif number > 1 and not loaded.host.takes_seed():
        raise DiffoptError(
            f"-n {number}: the program draws no random numbers of a seed, and every image would be"
            " the same; leave -n out"
        )
    first = seed or 0
    call = spread(loaded, arguments)
    results: list[Any] = []
    done = 0
    while done < number:
        progress(f"image {done + 1} of {number}", done / number)
        count = min(high, max(low, number - done))
        calls = [loaded.host.seeded(call, first + done + k) for k in range(count)]
        for result in _served(loaded, calls):
            results.append(image_files.first_output(result))
        done = sum(map(len, results))
    return results


def _served(loaded: Any, calls: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the results of calls; what kernels refuse is one line."""
    try:
        return list(loaded.serve(calls))
    except (IndexError, RuntimeError) as error:
        raise DiffoptError(f"the run fails on these arguments: {first_line(error)}") from error


def run(flags: RunFlags, arguments: Mapping[str, Any], seed: int | None, progress: Progress) -> str:
    """Sample images, one seed after another, and write them; return their number as text."""
    kind = image_files.output_type(flags.output)  # before loading: a wrong name costs nothing
    loaded = load_file(flags.engine, flags.target, flags.trusted_key)
    load_loras(loaded, flags.lora or ())
    arguments = {**arguments, **image_files.as_tensors(loaded)}
    if kind == "pil":
        arguments["output_type"] = kind
    results = sample(loaded, arguments, seed, flags.number, progress)
    written = image_files.save(results, flags.output, flags.number)
    return f"{written} {'image' if kind == 'pil' else 'item'}{'s' if written != 1 else ''}"
