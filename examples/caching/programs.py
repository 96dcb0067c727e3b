"""Makes the programs of configurations, and measures their cost."""

from typing import Any

from diffopt.caching import step_map
from diffopt.core import Pipeline
from diffopt.ir.flops import graph_flops
from diffopt.ir.program import Program
from diffopt.ir.sampling_loop import find_loop
from examples.caching.configurations import kind, shown
from examples.study.study import CALIBRATION, REFERENCE, Study


def make(study: Study, config: str) -> tuple[Program, dict[str, Any]]:
    """Return the program of a configuration; its FLOPs, and the seconds to find it."""
    unrolled = Pipeline.parse("unroll,hoist").run(study.traced, verify=False)
    if kind(config) == REFERENCE:
        program = unrolled
    elif kind(config) == "fewer steps":
        program = Pipeline.parse(f"{config},hoist").run(study.traced, verify=False)
    else:
        program = Pipeline.parse(shown(config)).run(
            unrolled, verify=False, seed=CALIBRATION, prompts=study.prompts
        )
    cost = {
        "denoiser": _denoiser_flops(program, unrolled),
        "seconds": program.history[-1]["seconds"] if kind(config) in ("auto", "policy") else 0,
        "notes": program.history[-1]["notes"],
    }
    program = Pipeline.parse("simplify,fuse").run(program, verify=False)
    return program, {**cost, "program": program.flops()}


def _denoiser_flops(program: Program, unrolled: Program) -> int:
    """Return the FLOPs of all calls of the denoiser, cached ones included."""
    calls = step_map.loop_calls(program, find_loop(unrolled))
    return sum(graph_flops(program.components[str(call.target)]) for call in calls)


def relative_cost(study: Study, config: str) -> dict[str, Any]:
    """Return the cost of a configuration, with FLOPs relative to the reference's."""
    full, cost = study.cost(REFERENCE), study.cost(config)
    return {**cost, **{key: cost[key] / full[key] for key in ("denoiser", "program")}}
