"""Makes the programs of configurations, and measures their cost."""

import re
from typing import Any

from diffopt.core import Pipeline, Size
from diffopt.ir.program import Program
from examples.pruning import peers
from examples.pruning.configurations import THEIRS, UNROLLED, pipeline, split
from examples.study.study import CALIBRATION, Study
from examples.study.texts import name_of


def make(study: Study, config: str) -> tuple[Program, dict[str, Any]]:
    """Return the program of a configuration, its size, and the notes of its passes."""
    if config == UNROLLED:
        return Pipeline.parse("unroll").run(study.traced, verify=False), {}
    calls, traced = split(config), study.traced
    if calls and name_of(calls[0]) == THEIRS:
        traced = study.trace(peers.pruned(study, calls.pop(0)))
        whole = study.file(UNROLLED)
        calls = [call.replace("recover(", f"recover(reference={whole},") for call in calls]
    program = Pipeline.parse(pipeline(calls)).run(
        traced, verify=False, enforce=False, seed=CALIBRATION, prompts=study.prompts
    )
    # Without the path of the reference's file, which is specific to this machine.
    named = {
        re.sub(r",reference=[^,)]*", "", record["text"]): record
        for record in program.history[len(traced.history) :]
    }
    size = Size.of(program)
    return program, {
        "flops": size.flops,
        "parameters": size.parameters,
        "seconds": {text: record["seconds"] for text, record in named.items()},
        "notes": {
            text: {key: note for key, note in record["notes"].items() if key != "sensitivity"}
            for text, record in named.items()
            if record["notes"]
        },
    }
