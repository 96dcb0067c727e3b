"""Quantized values in graphs: written and found again, and what passes make of them."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from diffopt.analysis import weight_memory
from diffopt.analysis.denoiser_structure import analyze_denoiser
from diffopt.core import Pipeline, Record
from diffopt.execution.partial_evaluation import PartialEvaluator
from diffopt.ir import allowed_operators, qdq
from diffopt.ir import graph as g
from diffopt.ir.printing import format_graph
from diffopt.ir.program import Program
from diffopt.ir.sampling_loop import find_loop
from tests import loops
from tests.passes import build
from tests.passes.test_cache import unrolled
from tests.quantized import pack, quantized

aten = torch.ops.aten

WEIGHTS = {  # by the rank of the layer's input
    aten.linear.default: ((5, 8), (2, 3, 8)),
    aten.conv1d.default: ((5, 4, 3), (2, 4, 9)),
    aten.conv2d.default: ((5, 4, 3, 3), (2, 4, 6, 7)),
    aten.conv3d.default: ((5, 4, 2, 1, 3), (2, 4, 3, 4, 5)),
}
FORMATS: list[tuple[qdq.Number, int | None, float]] = [
    ("int8", None, 0.03),
    ("int8", 4, 0.03),
    ("int4", None, 0.2),
    ("int4", 4, 0.2),
    ("fp8", None, 0.06),
]
"""Numbers, groups, and how far the layer's result may be off."""


def relative(result: Tensor, expected: Tensor) -> float:
    return float((result.float() - expected.float()).norm() / expected.float().norm())


def layer(
    target: Any,
    number: qdq.Number,
    scaling: qdq.Scaling | None,
    group: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Program, Tensor]:
    """Return a program of one quantized layer, and the float layer's result."""
    shape, input_shape = WEIGHTS[target]
    weight, x = build.randn(*shape), build.randn(*input_shape, seed=1)
    low, high = (float(v) for v in x.aminmax())

    def make(new: build.Builder, value: fx.Node) -> fx.Node:
        gm = new.gm
        if dtype != torch.float32:
            value = new(aten._to_copy.default, value, dtype=dtype)
        kind: qdq.Number = "fp8" if number == "fp8" else "int8"
        constants: list[fx.Node] = []
        if scaling == "static":
            scale = (high - low) / 255 if kind == "int8" else max(-low, high) / qdq.FP8_MAX
            constants.append(g.get_attr(gm, "scale", torch.tensor(scale)))
        if scaling == "static" and kind == "int8":
            zero = torch.tensor(round(-128 - low / scale), dtype=torch.int32)
            constants.append(g.get_attr(gm, "zero", zero))
        if scaling is not None:
            value = qdq.quantize(gm, value, scaling, *constants, number=kind)
        placed = qdq.place_weight(gm, "w", pack(weight, number, group), dtype)
        return new(target, value, placed)

    return build.program(make, x), target(x, weight)


def combinations() -> Iterator[tuple[Any, ...]]:
    scalings: list[qdq.Scaling | None] = [None, "static", "dynamic", "rows"]
    types = [torch.float32, torch.bfloat16]
    for target, form, scaling, dtype in product(WEIGHTS, FORMATS, scalings, types):
        if scaling != "rows" or target is aten.linear.default:  # rows are tokens
            yield target, form, scaling, dtype


@pytest.mark.parametrize(("target", "form", "scaling", "dtype"), combinations(), ids=str)
def test_what_is_written_is_found(
    target: Any,
    form: tuple[qdq.Number, int | None, float],
    scaling: qdq.Scaling | None,
    dtype: torch.dtype,
) -> None:
    number, group, bound = form
    program, expected = layer(target, number, scaling, group, dtype)
    (linear,) = qdq.layers(program.root)
    weight, x = qdq.weight(linear.weight), qdq.activation(linear.x)
    assert linear.convolution == (target is not aten.linear.default)
    assert weight is not None
    assert (weight.number, weight.group) == (number, group)
    stored = pack(build.randn(*WEIGHTS[target][0]), number, group)
    assert torch.equal(
        fx.Interpreter(g.extract_subgraph(program.root, [], [weight.scales], "s")).run()[0],
        stored.scales,
    )
    (values,) = fx.Interpreter(g.extract_subgraph(program.root, [], [weight.values], "v")).run()
    assert values.numel() == expected.new_empty(WEIGHTS[target][0]).numel()
    assert (x is None) == (scaling is None)
    if x is not None:
        assert x.number == ("fp8" if number == "fp8" else "int8")
        assert x.rows == (scaling == "rows")
        assert x.source.meta["val"].dtype == dtype
        assert x.source.op == ("placeholder" if dtype == torch.float32 else "call_function")
        assert x.quantized.meta["val"].dtype == (qdq.FP8 if number == "fp8" else torch.int8)
    (result,) = program.run(program.sample)
    assert result.dtype == dtype
    assert 0 < relative(result, expected) < bound + 0.01 * (dtype == torch.bfloat16)


@pytest.mark.parametrize(("number", "group", "bound"), FORMATS)
def test_simplify_leaves_stored_numbers_alone(
    number: qdq.Number, group: int | None, bound: float
) -> None:
    for target, dtype in product(WEIGHTS, (torch.float32, torch.bfloat16)):
        program, _ = layer(target, number, "static", group, dtype)
        result = Pipeline.parse("simplify,fuse,simplify").run(program)
        (match,) = qdq.layers(result.root)
        assert qdq.weight(match.weight) is not None
        assert qdq.activation(match.x) is not None
        before, after = weight_memory.of_program(program), weight_memory.of_program(result)
        assert after.to_json() == before.to_json()


def test_scales_of_16_bit_stay_so() -> None:
    weight, x = build.randn(6, 8), build.randn(2, 8, seed=1)
    packed = pack(weight, "int4", 4)
    half = qdq.Packed.of("int4", qdq.unpack_int4(packed.values, [6, 8]), packed.scales.half(), 4)

    def make(new: build.Builder, value: fx.Node) -> fx.Node:
        return new(aten.linear.default, value, qdq.place_weight(new.gm, "w", half, torch.float32))

    result = Pipeline.parse("simplify").run(build.program(make, x))
    assert {t.dtype for t in result.weights().values()} == {torch.uint8, torch.float16}


def test_what_is_small_and_made_of_a_quantized_weight_is_folded() -> None:
    row = torch.ones(1, 8)

    def make(new: build.Builder, value: fx.Node) -> fx.Node:
        placed = qdq.place_weight(new.gm, "w", pack(build.randn(6, 8), "int8"), torch.float32)
        return new(aten.add.Tensor, value, new(aten.linear.default, row, placed))

    result = Pipeline.parse("simplify").run(build.program(make, build.randn(2, 6)))
    assert [tuple(t.shape) for t in result.weights().values()] == [(1, 6)]


def test_text() -> None:
    program, _ = layer(aten.linear.default, "int8", "static")
    assert format_graph(program.root) == (
        "%x: float32[2,3,8]\n"
        "%1: float32[] = scale\n"
        "%2: int32[] = zero\n"
        "%3: int8[2,3,8] = quantized_decomposed.quantize_per_tensor.tensor"
        "(%x, %1, %2, -128, 127, int8)\n"
        "%4: float32[2,3,8] = quantized_decomposed.dequantize_per_tensor.tensor"
        "(%3, %1, %2, -128, 127, int8, out_dtype=float32)\n"
        "%5: int8[5,8] = w_int8\n"
        "%6: float32[5] = w_scales\n"
        "%7: float32[5,8] = quantized_decomposed.dequantize_per_channel"
        "(%5, %6, None, 0, -127, 127, int8, out_dtype=float32)\n"
        "%8: float32[2,3,5] = aten.linear(%4, %7)\n"
        "return %8"
    )


@pytest.mark.parametrize("shape", [(1,), (3, 5), (5, 3, 3), (4, 4)])
def test_numbers_of_4_bits_come_back(shape: tuple[int, ...]) -> None:
    source = torch.Generator().manual_seed(0)
    values = torch.randint(-8, 8, shape, generator=source).to(torch.int8)
    packed = qdq.pack_int4(values)
    assert packed.numel() == (values.numel() + 1) // 2
    assert torch.equal(qdq.unpack_int4(packed, list(shape)), values)


def test_other_values_are_not_taken_for_quantized_ones() -> None:
    def make(new: build.Builder, value: fx.Node) -> fx.Node:
        wide = new(aten._to_copy.default, value, dtype=torch.float64)
        scaled = new(aten.mul.Tensor, wide, 0.5)
        back = new(aten._to_copy.default, scaled, dtype=torch.float32)
        return new(aten.linear.default, back, build.parameter(5, 8))

    gm = build.program(make, build.randn(2, 8)).root
    assert all(qdq.weight(n) is None and qdq.activation(n) is None for n in gm.graph.nodes)
    (linear,) = qdq.layers(gm)
    assert linear.weight.op == "get_attr"


@pytest.mark.parametrize("number", ["int8", "int4", "fp8"])
def test_saved_programs_come_back(number: qdq.Number, tmp_path: Path) -> None:
    program, _ = layer(aten.conv2d.default, number, "dynamic", dtype=torch.bfloat16)
    program.save(tmp_path / "a.program")
    loaded = Program.load(tmp_path / "a.program")
    loaded.verify()
    assert str(loaded) == str(program)
    assert {t.dtype for t in loaded.weights().values()} == {
        t.dtype for t in program.weights().values()
    }
    assert torch.equal(loaded.run(loaded.sample)[0], program.run(program.sample)[0])


@pytest.mark.parametrize(
    "name", ["quantized_decomposed.quantize_per_tensor.tensor", "diffopt.unpack_int4.default"]
)
def test_operators_are_found_in_a_process_that_has_not_used_them(name: str) -> None:
    import subprocess
    import sys

    code = (
        f"from diffopt.ir import allowed_operators; print(allowed_operators.find_target({name!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == name, done.stderr
    assert str(allowed_operators.find_target(name)) == name


# Passes


CASES: list[tuple[qdq.Number, qdq.Scaling | None]] = [
    *(("int8", scaling) for scaling in (None, "static", "dynamic", "rows")),
    *(("int4", scaling) for scaling in ("static", "rows")),
    *(("fp8", scaling) for scaling in ("static", "dynamic", "rows")),
]


def formats(program: Program) -> dict[str, int]:
    """Return how many weights are stored in each format."""
    return weight_memory.of_program(program).elements


def outputs(program: Program) -> Tensor:
    """Return what a program makes of the inputs at capture."""
    (result,) = program.sample_outputs(program.run(program.sample_inputs()))
    return result


@pytest.mark.parametrize(("number", "scaling"), CASES)
def test_passes_keep_what_a_quantized_loop_gives(
    number: qdq.Number, scaling: qdq.Scaling | None
) -> None:
    program = quantized(loops.program(), number, scaling, 4 if number == "int4" else None)
    expected = outputs(program)
    weights = formats(program)
    assert weights[number] == 16 * 8 + 5 * 64 + 4 * 8
    for text in ("simplify", "unroll", "unroll,hoist,simplify,fuse", "fuse,hoist,unroll,simplify"):
        result = Pipeline.parse(text).run(program)
        assert relative(outputs(result), expected) < 1e-6, text
        # Of the time embedding's two layers only a table is left, if `unroll` has run first.
        least = weights[number] - (4 * 8 + 64) * ("unroll" in text)
        assert least <= formats(result)[number] <= weights[number], text
        assert formats(result)[number] == least or text.startswith("fuse"), text
        bodies = [result.root, *result.components.values()]
        layers = [layer for gm in bodies for layer in qdq.layers(gm)]
        assert len(layers) >= 4
        assert all(qdq.weight(layer.weight) is not None for layer in layers)
        quantizes_inputs = [qdq.activation(layer.x) is not None for layer in layers]
        assert quantizes_inputs == [scaling is not None] * len(layers), text


@pytest.mark.parametrize(("number", "scaling"), CASES)
def test_a_batch_of_requests_gets_what_each_gets_alone(
    number: qdq.Number, scaling: qdq.Scaling | None
) -> None:
    program = Pipeline.parse("unroll,hoist").run(quantized(loops.program(), number, scaling))
    batched = Pipeline.parse("batch(max=3)").run(program)
    requests = [loops.arguments(seed) for seed in (4, 5)]
    results = batched.serve([loops.arguments(seed) for seed in (4, 5)])
    for result, request in zip(results, requests, strict=True):
        assert relative(result, program(**request)) < 1e-5


def test_fuse_says_why_it_leaves_quantized_layers_alone() -> None:
    program = quantized(loops.program(), "int8", "rows")
    record = Record.from_json(Pipeline.parse("fuse(steps=false)").run(program).history[-1])
    assert record.skipped == [
        "denoiser.linear_4: its weight is quantized: run fuse before quantize"
    ]
    assert "linears merged" not in record.notes


@pytest.fixture(scope="module", params=["sd", "dit"])
def pair(request: pytest.FixtureRequest) -> tuple[Program, Program]:
    """Return an unrolled pipeline, and with quantized layers."""
    program = unrolled(request.param)
    return program, quantized(program, "int8", "static")


def test_the_anatomy_of_a_quantized_body_is_the_same(pair: tuple[Program, Program]) -> None:
    structures = []
    for program in (
        *pair,
        quantized(pair[0], "fp8", "dynamic"),
        quantized(pair[0], "int4", "rows"),
    ):
        loop = find_loop(program)
        parts = analyze_denoiser(loop.body, loop.loop_variant)
        kinds = [branch.kind for branch in parts.branches]
        sizes = len(parts.streams), len(parts.blocks), len(parts.attentions)
        structures.append((kinds, sizes, [skip.index for skip in parts.skips]))
    assert len(structures[0][0]) > 3
    assert structures == [structures[0]] * len(structures)


def test_a_quantized_body_costs_what_it_did(pair: tuple[Program, Program]) -> None:
    assert pair[1].flops() == pair[0].flops() > 0


def test_values_of_a_quantized_body(pair: tuple[Program, Program]) -> None:
    loop = find_loop(pair[1])
    arguments = [torch.ones(n.meta["val"].shape) for n in g.placeholders(loop.body)]
    with torch.no_grad():
        evaluated = PartialEvaluator(loop.body).everything(arguments)
        for node, value in zip(g.outputs(loop.body), loop.body(*arguments), strict=True):
            assert torch.equal(evaluated[node], value)


@pytest.mark.parametrize("text", ["cache(fora)", "simplify,fuse,simplify", "cache(t-gate,gate=3)"])
def test_passes_on_quantized_pipelines(pair: tuple[Program, Program], text: str) -> None:
    program, _ = pair
    if "t-gate" in text and not any(
        branch.kind == "cross-attention" for branch in _branches(program)
    ):
        pytest.skip("t-gate is for cross-attention, which this has none of")
    changes = []
    for each in pair:
        result = Pipeline.parse(text).run(each, enforce=False)
        changes.append(relative(outputs(result), outputs(each)))
        assert formats(result).get("int8") == formats(each).get("int8")
        assert len(result.calls()) == len(Pipeline.parse(text).run(program).calls())
    assert changes[1] < 1e-5 if text.startswith("simplify") else 0 < changes[1] < 10 * changes[0]


def _branches(program: Program) -> Any:
    loop = find_loop(program)
    return analyze_denoiser(loop.body, loop.loop_variant).branches
