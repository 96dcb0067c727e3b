"""`diffopt sensitivity`: which layer, in which format and at which step, costs how much."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from PIL import Image
from torch import Tensor

from diffopt.analysis.scope import choose_scope
from diffopt.cli import heatmap, image_files
from diffopt.cli import output as show
from diffopt.cli.flags import SensitivityFlags
from diffopt.core import Pipeline, Progress
from diffopt.errors import DiffoptError
from diffopt.execution.calibration_inputs import requests
from diffopt.ir import qdq
from diffopt.ir.program import Program
from diffopt.quantization import format_search, layer_preparation, quantize_body, sensitivity
from diffopt.quantization.format_search import WeightChoice, format_label
from diffopt.quantization.quantize_body import Format
from diffopt.quantization.simulate import Simulator
from diffopt.quantization.tensor_memo import TensorMemo

ROWS = 48
"""The most layers of a picture: those with the largest error."""

# Relative errors of the outputs, half a power of ten each, from invisible to plain.
_LEVELS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
_COLOURS = (
    *("#f2f2f2", "#fff3c4", "#ffe08a", "#fdbb5a", "#f58b3c"),
    *("#dd5a2b", "#b32222", "#67000d"),
)


@dataclass(frozen=True)
class Report:
    """The error and the bytes of each layer in each format.

    Attributes:
        columns: The formats.
        items: The layers, with their errors and sizes.
    """

    columns: Sequence[Format]
    items: Sequence[WeightChoice]

    def shares(self, column: int) -> Tensor:
        """Return the part of each layer in the sum of the squared errors in a format."""
        parts = torch.stack([item.errors[column].sum() for item in self.items])
        return parts / parts.sum().clamp_min(1e-30)


@dataclass(frozen=True)
class Job:
    """The flags, parsed before the program is traced, so that a typing error costs nothing."""

    columns: Sequence[Format]
    pipeline: Pipeline

    @classmethod
    def parse(cls, flags: SensitivityFlags) -> Job:
        """Parse the formats and the passes; a wrong one is a `DiffoptError`."""
        choices = get_args(quantize_body.Activations)
        if flags.activations not in choices:
            wanted = ", ".join(choices)
            raise DiffoptError(f"--activations {flags.activations}: wants one of {wanted}")
        passes = flags.passes
        if passes is None:
            passes = "" if flags.model.endswith(".program") else "unroll,hoist,simplify"
        numbers = [text.strip() for text in flags.formats.split(",") if text.strip()]
        activations = cast(quantize_body.Activations, flags.activations)
        pipeline = Pipeline.parse(passes) if passes else Pipeline()
        return cls(format_search.formats_to_try(numbers, activations), pipeline)


def measure(
    program: Program,
    job: Job,
    prompts: Sequence[str],
    samples: int,
    seed: int,
    progress: Progress,
) -> Report:
    """Measure the error of the outputs where each layer of the loop alone is quantized.

    Args:
        program: The program, before the passes of `job`.
        job: The formats to measure, and the passes to run first.
        prompts: Prompts to calibrate with; without any, the one seen at capture.
        samples: The number of requests to calibrate with.
        seed: Seed of the first of them.
        progress: Called with what is being done and the fraction done, if known.
    """
    program = job.pipeline.run(program, seed=seed, prompts=prompts, progress=progress)
    scope = choose_scope(program, ("loop",))
    if not scope.calls:
        raise DiffoptError("the program calls no component, so there is no layer to quantize")
    memo, store = TensorMemo(), quantize_body.WeightStore("mse")
    for name in scope.loop:
        layer_preparation.split_concats(program.components[name], memo)
    bodies = {name: qdq.layers(program.components[name]) for name in scope.calls}
    nodes = {
        name: [layer.node for layer in layers if layer.weight.op == "get_attr"]
        for name, layers in bodies.items()
    }
    nodes = {name: layers for name, layers in nodes.items() if layers}
    if not nodes:
        raise DiffoptError(
            f"there is no layer to quantize in {', '.join(scope.calls)}: its layers are quantized"
            " already, or their weights are computed"
        )
    inputs = requests(program, prompts, samples, seed)
    plain = format_search.layer_candidates(Simulator(program, scope, {}, store), nodes, job.columns)
    first = {name: {n: kinds[0] for n, kinds in rows.items()} for name, rows in plain.items()}
    calibration = quantize_body.Calibration(program, scope, first, inputs, progress)
    range_of, _ = quantize_body.calibrate_ranges(calibration, "minmax", 0)
    simulator = Simulator(program, scope, range_of, store)
    settings = {"scale": store.scale}
    measured = sensitivity.measure(
        simulator, plain, inputs[: format_search.SENSITIVITY_REQUESTS], settings, progress
    )
    return Report(job.columns, format_search.weight_choices(simulator, plain, measured, store))


def print_report(report: Report, as_json: bool) -> None:
    """Print a table of the layers for each format, largest error first."""
    if as_json:
        show.print_json({format_label(c): _json(report, i) for i, c in enumerate(report.columns)})
        return
    for index, column in enumerate(report.columns):
        shares = report.shares(index)
        order = shares.argsort(descending=True).tolist()
        rows = [_row(report.items[at], index, float(shares[at])) for at in order]
        words = ["layer", "share", "error", "worst step", "bytes", "saved"]
        show.table(f"{format_label(column)}: {_total(report, index)}", words, rows)


def _row(item: WeightChoice, column: int, share: float) -> list[str]:
    errors = item.errors[column]
    name = item.label if len(item.layers) == 1 else f"{item.label} ({len(item.layers)} calls)"
    saved = item.sizes[0] - item.sizes[column + 1]
    numbers = [f"{100 * share:.1f} %", f"{float(errors.sum()) ** 0.5:.2g}"]
    numbers += [str(int(errors.argmax())), show.count(item.sizes[0]), show.count(saved)]
    return [name, *numbers]


def _total(report: Report, column: int) -> str:
    error = sum(float(item.errors[column].sum()) for item in report.items) ** 0.5
    before = sum(item.sizes[0] for item in report.items)
    after = sum(item.sizes[column + 1] for item in report.items)
    return (
        f"all {len(report.items)} layers add an error of {error:.2g} and take {show.count(after)}B"
        f" in place of {show.count(before)}B"
    )


def _json(report: Report, column: int) -> dict[str, Any]:
    shares = report.shares(column)
    return {
        "error": sum(float(item.errors[column].sum()) for item in report.items) ** 0.5,
        "bytes": {
            "before": sum(item.sizes[0] for item in report.items),
            "after": sum(item.sizes[column + 1] for item in report.items),
        },
        "layers": [
            {
                "layer": item.label,
                "share": float(shares[at]),
                "error": float(item.errors[column].sum()) ** 0.5,
                "worst step": int(item.errors[column].argmax()),
                "errors": item.errors[column].sqrt().tolist(),
                "bytes": {"before": item.sizes[0], "after": item.sizes[column + 1]},
            }
            for at, item in enumerate(report.items)
        ],
    }


def save_picture(report: Report, output: Path) -> None:
    """Draw the error that each layer adds at each step, for each format, into a file."""
    pictures = [_picture(report, column) for column in range(len(report.columns))]
    image_files.save_picture(heatmap.stacked(pictures), output)
    show.stderr().print(f"wrote {output}")


def _picture(report: Report, column: int) -> Image.Image:
    most = report.shares(column).argsort(descending=True)[:ROWS]
    rows = {}
    for at in sorted(most.tolist()):
        item = report.items[at]
        name = item.label
        for number in itertools.count(2):  # a module may have several layers
            if name not in rows:
                break
            name = f"{item.label} ({number})"
        rows[name] = [_colour(float(error)) for error in item.errors[column].sqrt()]
    bounds = [f"below {_LEVELS[0]:g}", *(f"{level:g}" for level in _LEVELS)]
    legend = dict(zip(bounds, _COLOURS, strict=True))
    less = len(report.items) - len(rows)
    notes = [_total(report, column), "colour: relative error of the outputs, at least"]
    notes += [f"{less} layers that cost less are left out"] if less else []
    return heatmap.cells(format_label(report.columns[column]), notes, legend, rows)


def _colour(error: float) -> str:
    return _COLOURS[sum(error >= level for level in _LEVELS)]
