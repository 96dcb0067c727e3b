"""Capture a program again with another number of steps or another scheduler."""

import inspect
from typing import Any

from diffopt.core import Context
from diffopt.errors import DiffoptError
from diffopt.ir.program import Program
from diffopt.spec import suggest


def resample(
    program: Program, ctx: Context, steps: int | None, scheduler: str | None, spacing: str | None
) -> None:
    """Replace a program by a new capture of its pipeline with another sampler.

    Raises:
        DiffoptError: The program has no pipeline, another pass has rewritten the program already,
            or the scheduler does not exist.
    """
    if program.retrace is None:
        raise DiffoptError(
            "unroll(steps=…, scheduler=…, spacing=…) samples the pipeline again, and a "
            "saved program has no "
            "pipeline: give the model itself, or trace it with these settings"
        )
    changed = [record["text"] for record in program.history if record["changed"]]
    if changed:
        raise DiffoptError(
            "unroll(steps=…) begins again from the pipeline and would undo "
            f"{','.join(changed)}: put it first"
        )
    pipeline = program.retrace.pipeline  # type: ignore[attr-defined]
    arguments: dict[str, Any] = {}
    if steps is not None:
        if steps < 1:
            raise DiffoptError(f"unroll(steps={steps}): wants at least 1 step")
        arguments[_steps_argument(pipeline)] = steps
    swapped = _scheduler(pipeline, scheduler, spacing) if scheduler or spacing else None
    ctx.progress("sampling the pipeline again")
    new = program.retrace(scheduler=swapped, **arguments)
    program.root, program.host, program.sample = new.root, new.host, new.sample
    program.guards, program.retrace = new.guards, new.retrace
    ctx.note("sampler", {"steps": steps, "scheduler": scheduler, "spacing": spacing})


def _steps_argument(pipeline: Any) -> str:
    """Return the name of the argument that sets the number of steps."""
    call = pipeline if inspect.isfunction(pipeline) else type(pipeline).__call__
    names = list(inspect.signature(call).parameters)
    for name in ["num_inference_steps", *(n for n in names if "steps" in n)]:
        if name in names:
            return name
    raise DiffoptError(
        f"unroll(steps=…): the pipeline takes no number of steps, only {', '.join(names)}"
    )


def _scheduler(pipeline: Any, name: str | None, spacing: str | None) -> Any:
    """Return the pipeline's scheduler as another class, or with another spacing."""
    current = pipeline.scheduler
    cls = type(current)
    if name is not None:
        import diffusers

        known = [n for n in dir(diffusers) if n.endswith("Scheduler")]
        full = name if name.endswith("Scheduler") else f"{name}Scheduler"
        if full not in known:
            raise DiffoptError(
                f"unroll(scheduler={name}): diffusers has no {full}{suggest(full, known)}"
            )
        cls = getattr(diffusers, full)
    options = {"timestep_spacing": spacing} if spacing else {}
    try:
        return cls.from_config(current.config, **options)
    except (ValueError, NotImplementedError) as error:
        raise DiffoptError(f"unroll(scheduler={name}, spacing={spacing}): {error}") from None
