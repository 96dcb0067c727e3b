"""Capture a program again with another number of steps or another scheduler."""

import inspect
from collections import Counter
from collections.abc import Mapping
from typing import Any

from diffopt.core import Context
from diffopt.errors import DiffoptError, first_line
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
    try:
        new = program.retrace(scheduler=swapped, compare=True, **arguments)
    except (ValueError, TypeError, NotImplementedError) as error:  # the pipeline's own refusal
        raise DiffoptError(
            f"unroll: the pipeline refuses to be sampled like this: {first_line(error)}"
        ) from None
    _expect_steps(program, new, arguments)
    for field in ("root", "host", "sample", "guards", "retrace", "borrowed", "check"):
        setattr(program, field, getattr(new, field))
    ctx.note("sampler", {"steps": steps, "scheduler": scheduler, "spacing": spacing})


def _expect_steps(old: Program, new: Program, arguments: Mapping[str, Any]) -> None:
    """Raise a `DiffoptError` where another number of steps has changed no number of calls."""
    for name, steps in arguments.items():
        known = old.host.schema.get(name, old.host.defaults.get(name, {})).get("value")
        counts = [Counter(str(node.target) for node in program.calls()) for program in (old, new)]
        if known not in (None, steps) and counts[0] == counts[1]:
            raise DiffoptError(
                f"unroll(steps={steps}): the pipeline calls its models as often as in {known} steps"
                " (its own sigmas or timesteps set their number, perhaps): trace it with others"
            )


def _flow_options(current: Any, cls: Any) -> dict[str, Any]:
    """Return the options by which a scheduler class follows a flow, where the pipeline's does.

    Raises:
        DiffoptError: It cannot: its sigmas would be others than the model was trained for.
    """
    config = current.config
    if not _is_flow(type(current)) and not config.get("use_flow_sigmas", False):
        if not _is_flow(cls):
            return {}
        raise DiffoptError(
            f"unroll(scheduler={cls.__name__}): it follows a flow, and the pipeline's"
            f" {type(current).__name__} does not: the model was trained for other sigmas"
        )
    if _is_flow(cls):
        return {}
    if "use_flow_sigmas" not in inspect.signature(cls).parameters:
        raise DiffoptError(
            f"unroll(scheduler={cls.__name__}): the pipeline's {type(current).__name__} follows a"
            " flow, and this one cannot: the model was trained for other sigmas"
        )
    shift = config.get("flow_shift", config.get("shift", 1.0))
    return {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}


def _is_flow(cls: type) -> bool:
    """Tell whether a scheduler class mixes data and noise on a straight path (flow matching)."""
    return hasattr(cls, "scale_noise")


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
    options |= _flow_options(current, cls)
    try:
        return cls.from_config(current.config, **options)
    except (ValueError, NotImplementedError) as error:
        raise DiffoptError(f"unroll(scheduler={name}, spacing={spacing}): {error}") from None
