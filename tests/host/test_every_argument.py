"""Each argument of a pipeline's call: a program does with it what the pipeline does, or refuses it.

The table in docs/engine.md is what these tests find.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diffopt
from diffopt.errors import DiffoptError
from tests.zoo import CASES

ROOT = Path(__file__).parents[2]


# Other values than those of the cases.
OTHERS: dict[str, Callable[[], Any]] = {
    "prompt": lambda: "a dog",
    "negative_prompt": lambda: "grey",
    "num_inference_steps": lambda: 7,
    "timesteps": lambda: [900, 500, 100],
    "sigmas": lambda: [0.9, 0.5, 0.1],
    "guidance_scale": lambda: 3.0,
    "guidance_rescale": lambda: 0.3,
    "controlnet_conditioning_scale": lambda: 0.4,
    "strength": lambda: 0.5,
    "eta": lambda: 0.5,
    "height": lambda: 32,
    "width": lambda: 32,
    "num_images_per_prompt": lambda: 2,
    "generator": lambda: torch.Generator().manual_seed(7),
    "return_dict": lambda: False,
    "clip_skip": lambda: 1,
    "cross_attention_kwargs": lambda: {"scale": 0.5},
    "max_sequence_length": lambda: 10,
    "skip_guidance_layers": lambda: [0],
}


def outcomes(name: str) -> dict[str, str]:
    """Return, for each argument of a pipeline, "honoured" or the line that refuses it."""
    case = CASES[name]
    pipe, arguments = case.build(), case.inputs(0)
    program = diffopt.trace(pipe, dynamic="auto", check=False, **arguments)
    result = {}
    others = {
        **OTHERS,
        **({"image": lambda: case.inputs(1)["image"]} if "image" in arguments else {}),
    }
    for argument in others.keys() & inspect.signature(pipe).parameters.keys():

        def call(argument: str = argument) -> dict[str, Any]:
            generator = torch.Generator().manual_seed(3)
            return {**arguments, "generator": generator, argument: others[argument]()}

        refusal = ""
        try:
            mine = program(**call())
        except DiffoptError as error:
            refusal = str(error)
        if refusal:
            assert "\n" not in refusal
            assert argument in refusal
            result[argument] = "refused"
            continue
        np.testing.assert_allclose(
            np.asarray(mine[0]), np.asarray(pipe(**call())[0]), atol=1e-5, err_msg=argument
        )
        result[argument] = "honoured"
    return result


HONOURED = {
    "sd": {"prompt", "guidance_scale", "generator"},
    "sd3": {"prompt", "guidance_scale", "generator"},
    "sd-img2img": {"prompt", "image", "guidance_scale", "generator"},
    "sd-controlnet": {
        *("prompt", "image", "guidance_scale", "generator", "controlnet_conditioning_scale"),
    },
}


@pytest.mark.parametrize("name", HONOURED)
def test_every_argument_is_honoured_or_refused(name: str) -> None:
    found = outcomes(name)
    assert {argument for argument, how in found.items() if how == "honoured"} == HONOURED[name]
    table = (ROOT / "docs" / "engine.md").read_text()
    for argument, how in found.items():
        rows = [row for row in table.splitlines() if row.startswith("|") and f"`{argument}`" in row]
        assert len(rows) == 1, argument
        assert ("refused" not in rows[0]) == (how == "honoured"), rows[0]


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_numbers_that_can_are_inputs_where_none_is_named(name: str) -> None:
    case = CASES[name]
    program = diffopt.trace(case.build(), dynamic="auto", check=True, **case.inputs(0))
    assert "guidance_scale" in program.host.inputs()
    assert program.check


def test_a_number_that_cannot_be_an_input_stays_and_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    case = CASES["sd-img2img"]
    program = diffopt.trace(case.build(), dynamic="auto", check=False, **case.inputs(0))
    assert "guidance_scale" in program.host.inputs()
    assert "strength" not in program.host.inputs()
    assert any(record.getMessage().startswith("strength stays ") for record in caplog.records)
