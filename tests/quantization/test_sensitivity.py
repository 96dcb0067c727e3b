"""Which layers lose most by which format: measurements, `quantize(auto)` and the command."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import fx

from diffopt.analysis.scope import Scope, choose_scope
from diffopt.core import Pipeline, Record
from diffopt.core.equivalence import squared_relative_error
from diffopt.errors import DiffoptError
from diffopt.execution import trajectories
from diffopt.execution.calibration_inputs import requests
from diffopt.ir import qdq
from diffopt.ir.nodes import stored_tensor
from diffopt.ir.program import Program
from diffopt.progress import silent
from diffopt.quantization import format_search, quantize_body, sensitivity, weight_rounding
from diffopt.quantization.quantize_body import Format, WeightStore
from diffopt.quantization.simulate import Simulator
from tests import loops
from tests.command import Run
from tests.passes import build

TRIED = format_search.formats_to_try(("int8", "int4"), "static")


@pytest.fixture(scope="module")
def program() -> Program:
    return Pipeline.parse("unroll,hoist,simplify").run(loops.program(steps=6))


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DIFFOPT_CACHE", str(tmp_path / "cache"))


def prepared(
    program: Program, tried: Sequence[Format] = TRIED
) -> tuple[Simulator, dict[str, dict[fx.Node, list[Format]]], Scope, dict[str, Any]]:
    """Return a simulator, the formats of layers, and what quantizing the program takes."""
    scope, store = choose_scope(program, ("loop",)), WeightStore("mse")
    nodes = {n: [x.node for x in qdq.layers(program.components[n])] for n in scope.calls}
    nodes = {n: layers for n, layers in nodes.items() if layers}
    formats = format_search.layer_candidates(Simulator(program, scope, {}, store), nodes, tried)
    first = {n: {x: candidates[0] for x, candidates in f.items()} for n, f in formats.items()}
    inputs = requests(program, None, 2)
    job = quantize_body.Calibration(program, scope, first, inputs, silent)
    activations, _ = quantize_body.calibrate_ranges(job, "minmax", 0)
    return Simulator(program, scope, activations, store), formats, scope, dict(activations)


@pytest.mark.parametrize(
    ("number", "way"),
    [
        ("int8", "static"),
        ("int8", "rows"),
        ("int4", "dynamic"),
        ("int4", "none"),
        ("fp8", "static"),
    ],
)
def test_simulated_is_what_the_quantized_program_computes(
    program: Program, number: str, way: quantize_body.Activations
) -> None:
    quantized = program.clone()
    tried = format_search.formats_to_try((number,), way, 4)[:1]
    simulator, formats, scope, activations = prepared(quantized, tried)
    chosen = {n: {x: candidates[0] for x, candidates in f.items()} for n, f in formats.items()}
    arguments = requests(quantized, None, 1, seed=5)[0]
    exact = quantized.run(arguments)
    simulated = simulator.run(arguments, chosen)
    for name, layer_formats in chosen.items():
        args = name, layer_formats, scope.calls[name], activations.get(name), WeightStore("mse")
        quantize_body.quantize_body(quantized, *args)
    quantized.refresh()
    assert 1e-9 < squared_relative_error(simulated, exact) < 0.1
    for a, b in zip(simulated, quantized.run(arguments), strict=True):
        assert torch.equal(a, b)


def test_a_layer_that_loses_nothing_and_the_effects_of_steps(program: Program) -> None:
    altered = program.clone()
    body = altered.components["denoiser"]
    layer = qdq.layers(body)[0]
    weight = stored_tensor(body, layer.weight)
    assert weight is not None
    rounded = weight_rounding.dequantized(
        weight_rounding.quantize_weight(weight, "int8", None, "mse")
    )
    body.register_parameter("rounded", torch.nn.Parameter(rounded, requires_grad=False))
    layer.weight.target = "rounded"
    body.recompile()
    simulator, formats, _, _ = prepared(altered)
    inputs = requests(altered, None, 1)
    losses = sensitivity.measure(simulator, formats, inputs, {})["denoiser"]
    alone = TRIED.index(Format("int8", "none"))
    assert losses.nodes[0] is layer.node
    assert float(losses.errors[0, alone].max()) < 1e-11
    assert float(losses.errors[0, 0].min()) > 1e-9  # its input is quantized
    assert float(losses.errors[1:].min()) > 1e-9
    assert bool((losses.errors[:, 3] > losses.errors[:, 1])[1:].all()), "4 bits and 8 bits"

    chosen = {node: how[0] for node, how in formats["denoiser"].items()}
    exact = trajectories.run_root(altered, inputs[0])
    for at, step in enumerate(losses.steps):
        if at not in sensitivity._probes(len(losses.steps)):
            continue
        changes = []

        def visit(call: fx.Node, arguments: Any, step: int = step, changes: Any = changes) -> Any:
            if (call, step) not in simulator.scope.calls["denoiser"]:
                return None
            results = simulator.call("denoiser", chosen, step, arguments)
            changes.append(squared_relative_error(results, body(*arguments)))
            return results

        outputs = squared_relative_error(trajectories.run_root(altered, inputs[0], visit), exact)
        assert float(losses.output_sensitivity[at]) == pytest.approx(outputs / changes[0], rel=1e-6)


def test_the_parts_of_all_layers_are_the_whole(program: Program) -> None:
    simulator, formats, _, _ = prepared(program)
    inputs = requests(program, None, 2)
    sensitivities = sensitivity.measure(simulator, formats, inputs, {})
    for column in range(len(TRIED)):
        every = {n: {x: row[column] for x, row in f.items()} for n, f in formats.items()}
        whole = [
            squared_relative_error(simulator.run(i, every), list(program.run(i))) for i in inputs
        ]
        parts = sum(float(s.output_errors[:, column].sum()) for s in sensitivities.values())
        assert parts == pytest.approx(sum(whole) / len(whole), rel=1e-6)


def test_measurements_are_kept_on_disk(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator, formats, _, _ = prepared(program)
    inputs = requests(program, None, 1)
    first = sensitivity.measure(simulator, formats, inputs, {})

    def fail(self: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(sensitivity._Profiler, "measure", fail)
    again = sensitivity.measure(simulator, formats, inputs, {})
    assert torch.equal(again["denoiser"].output_errors, first["denoiser"].output_errors)
    with pytest.raises(AssertionError, match="measured again"):
        sensitivity.measure(simulator, formats, inputs, {"scale": "max"})


# quantize(auto)


def auto(program: Program, text: str) -> Record:
    quantized = Pipeline.parse(text).run(program)
    return Record.from_json(quantized.history[-1])


def test_auto_is_within_the_budget_and_saves_more_where_it_may(program: Program) -> None:
    uniform = {n: auto(program, f"quantize({n},ends=true)") for n in ("int8", "int4")}
    saved = []
    for budget in (0.002, 0.02, 0.2):
        record = auto(program, f"quantize(auto,ends=true,goal=size,budget={budget})")
        note = record.notes["auto"]
        assert 0 < note["measured error"] <= budget
        assert record.relative <= budget
        kept = note["layers"].get("as it was", 0)
        assert sum(note["layers"].values()) == sum(record.notes["layers"].values()) + kept
        saved.append(record.before.bytes - record.after.bytes)
    assert saved == sorted(saved)
    assert saved[-1] > uniform["int8"].before.bytes - uniform["int8"].after.bytes
    assert saved[0] < saved[-1]


@pytest.mark.parametrize(
    ("before", "option"),
    [
        ("", "smooth=true"),
        ("", "rank=1"),
        ("", "keep=first:1"),
        ("cache(auto,speedup=1.2,calls=1,trials=3,reach=2),", "samples=2"),
    ],
)
def test_auto_beside_what_else_there_is(program: Program, before: str, option: str) -> None:
    """What is chosen from is what the other options made, and the budget holds for all of it."""
    record = auto(program, f"{before}quantize(auto,ends=true,budget=0.05,{option})")
    note = record.notes["auto"]
    assert 0 < note["measured error"] <= 0.05
    assert record.relative <= 0.05
    assert sum(note["layers"].values()) > 0
    assert record.after.bytes < record.before.bytes


def test_speed_wants_quantized_inputs_and_size_does_not(program: Program) -> None:
    names = {
        goal: auto(program, f"quantize(auto,ends=true,goal={goal},budget=0.5)").notes["auto"][
            "layers"
        ]
        for goal in ("size", "speed", "both")
    }
    assert set(names["size"]) == {"int4, weights alone"}
    # What runs in front of the loop has its weights quantized alone.
    assert "int8, static" in names["speed"]
    assert "int4, static" in names["both"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quantize(auto,formats=int5)", "there is no format 'int5'; did you mean 'int8'?"),
        ("quantize(auto,samples=0,activations=none)", "auto measures what formats cost: ask for"),
        (
            "quantize(auto,budget=1e-9)",
            "no format of any layer is within budget=1e-09: the least error that one adds is ",
        ),
    ],
)
def test_errors(program: Program, text: str, message: str) -> None:
    with pytest.raises(DiffoptError) as error:
        auto(program, text)
    assert message in str(error.value)


# The command


@pytest.fixture(scope="module")
def file(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sensitivity") / "loop.program"
    program.save(path)
    return path


def test_the_command_prints_tables_and_draws(diffopt: Run, file: Path) -> None:
    done = diffopt("sensitivity", file, "--samples", 2, "-o", "heat.png")
    assert (done.code, done.err) == (0, "wrote heat.png\n")
    assert "int8, weights alone: all " in done.out
    told = json.loads(diffopt("sensitivity", file, "--samples", 2, "--json").out)
    assert list(told) == [format_search.format_label(column) for column in TRIED]
    for column in told.values():
        assert sum(layer["share"] for layer in column["layers"]) == pytest.approx(1)
        squares = sum(layer["error"] ** 2 for layer in column["layers"])
        assert squares**0.5 == pytest.approx(column["error"])
        assert all(len(layer["errors"]) == 6 for layer in column["layers"])
    shares = [layer["share"] for layer in told["int8, static"]["layers"]]
    top = told["int8, static"]["layers"][shares.index(max(shares))]
    first = next(line for line in done.out.splitlines() if line.startswith("│"))
    assert [word.strip() for word in first.split("│")[1:3]] == [
        top["layer"],
        f"{100 * max(shares):.1f} %",
    ]
    picture = Image.open("heat.png")
    assert picture.width >= 640
    assert len(picture.getcolors(1 << 20) or ()) > 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--formats", "int2"], "there is no format 'int2'; did you mean 'int8'?"),
        (["--formats", ","], "there is no format to try: write some of int8, int4, fp8"),
        (
            ["--activations", "wide"],
            "--activations wide: wants one of static, dynamic, rows, none",
        ),
        (["-o", "heat.pdf"], "the output's name must end in .png or .jpg or .jpeg or .webp, got"),
        (["-p", "nopass"], "there is no pass 'nopass'"),
        (["-p", "quantize(int8,ends=true)"], "there is no layer to quantize in "),
    ],
)
def test_the_commands_errors(diffopt: Run, file: Path, words: list[str], message: str) -> None:
    done = diffopt("sensitivity", file, *words)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"diffopt: error: {message}")
    assert done.err.count("\n") == 1 or "nopass" in message


def test_a_program_without_components(diffopt: Run) -> None:
    x = torch.zeros(2)
    build.program(lambda b, x: b(torch.ops.aten.relu.default, x), x).save(Path("relu.program"))
    done = diffopt("sensitivity", "relu.program")
    message = "the program calls no component, so there is no layer to quantize"
    assert (done.code, done.out, done.err) == (2, "", f"diffopt: error: {message}\n")
