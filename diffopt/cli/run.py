"""`diffopt run`: runs an engine and writes its images to a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffopt.cli import image_files
from diffopt.cli.flags import RunFlags
from diffopt.core import Progress
from diffopt.engine import engine, picture_record
from diffopt.engine.steps import OnStep, Step
from diffopt.errors import DiffoptError, first_line
from diffopt.host.outputs import first_output
from diffopt.host.plain_arguments import as_traced
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
    call = as_traced(loaded.host, arguments)
    results: list[Any] = []
    done = 0
    while done < number:
        progress(f"image {done + 1} of {number}", done / number)
        count = min(high, max(low, number - done))
        calls = [loaded.host.seeded(call, first + done + k) for k in range(count)]
        for result in _served(loaded, calls, _Steps(progress, done, count, number)):
            results.append(first_output(result))
        done = sum(map(len, results))
    return results


@dataclass(frozen=True)
class _Steps:
    """Shows how far a run is.

    Attributes:
        progress: Shows it.
        done: How many images there were before it.
        count: How many calls it serves.
        number: How many images are wanted.
    """

    progress: Progress
    done: int
    count: int
    number: int

    def __call__(self, step: Step) -> None:
        """Show a step that has been taken."""
        image = f"image {self.done + 1} of {self.number}, step {step.index} of {step.total}"
        part = min(self.count, self.number - self.done) * step.index / step.total
        self.progress(image, (self.done + part) / self.number)


def _served(loaded: Any, calls: Sequence[Mapping[str, Any]], on_step: OnStep) -> list[Any]:
    """Return the results of calls; what kernels refuse is one line."""
    try:
        if getattr(loaded, "steps", 0):
            return list(loaded.serve(calls, on_step=on_step))
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
    first = {"seed": seed or 0} if loaded.host.takes_seed() else {}
    told = picture_record.record(loaded, arguments | first, images=flags.number)
    written = image_files.save(results, flags.output, flags.number, told)
    return f"{written} {'image' if kind == 'pil' else 'item'}{'s' if written != 1 else ''}"
