"""Quantization of a small UNet and a small transformer, against hooks on the pipelines' modules."""

from functools import cache
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx

from diffopt.core import Pipeline, Record
from diffopt.errors import DiffoptError, ToleranceError
from diffopt.ir import call_tags, nodes, qdq
from diffopt.ir import graph as g
from diffopt.ir.printing import format_graph
from diffopt.ir.program import Program
from diffopt.quantization import layer_preparation, quantize_body
from diffopt.quantization.ranges import affine
from diffopt.quantization.tensor_memo import TensorMemo
from tests.passes import build
from tests.zoo import CASES, traced

aten = torch.ops.aten
STEPS = 6
NAMES = ("sd", "dit")
BODY = {"sd": "unet", "dit": "transformer"}


def arguments(name: str) -> dict[str, Any]:
    return {**CASES[name].inputs(0), "num_inference_steps": STEPS}


@cache
def unrolled(name: str, text: str = "unroll,hoist,simplify") -> Program:
    return Pipeline.parse(text).run(traced(name, num_inference_steps=STEPS))


def quantized(
    name: str, text: str, before: str = "unroll,hoist,simplify"
) -> tuple[Program, Record]:
    program = Pipeline.parse(text).run(unrolled(name, before))
    return program, Record.from_json(program.history[-1])


def layers(program: Program, component: str) -> dict[str, qdq.Layer]:
    """Return the layers of a component by module, with a number where a module has several."""
    by_path: dict[str, qdq.Layer] = {}
    for layer in qdq.layers(program.components[component]):
        name = quantize_body.module_path(layer.node)
        by_path[name if name not in by_path else f"{name}/{len(by_path)}"] = layer
    return by_path


def scale_of(program: Program, call: fx.Node, layer: qdq.Layer) -> tuple[float, int]:
    """Return the scale and zero point with which a call quantizes the input of a layer."""
    activation = qdq.activation(layer.x)
    assert activation is not None
    assert activation.zero is not None
    scalars = []
    for node in (activation.scale, activation.zero):
        row, _, index = nodes.args(node)
        body = program.components[str(call.target)]
        if row.op == "placeholder":
            at = nodes.args(call)[g.placeholders(body).index(row)]
            table, _, number = nodes.args(at)
            values = g.attribute(program.root, str(table.target))[number]
        else:
            values = g.attribute(body, str(row.target))
        scalars.append(values[index].item())
    return scalars[0], scalars[1]


# What is written


def test_text() -> None:
    w, b = build.parameter(4, 8), build.parameter(4, seed=1)
    layer = build.body(lambda at, x: at(aten.linear.default, x, w, b), build.randn(2, 8))

    def make(at: build.Builder, x: fx.Node) -> fx.Node:
        node = at.call("layer", x)[0]
        at.gm.graph.find_nodes(op="call_module")[0].meta["tag"] = call_tags.Tag("layer", 0, 0)
        return node

    program = build.program(make, build.randn(2, 8), layer=layer)
    done = Pipeline.parse("quantize(int8,ends=true)").run(program)
    assert_expected_inline(
        format_graph(done.components["layer"]),
        """\
%x: float32[2,8]
%1: int32[1] = input_zeros
%2: float32[1] = input_scales
%3: float32[4] = weight_1
%4: int8[4,8] = weight_int8
%5: float32[4] = weight_scales
%6: float32[4,8] = quantized_decomposed.dequantize_per_channel(%4, %5, None, 0, -127, 127, int8, out_dtype=float32)
%7: float32[] = aten.select.int(%2, 0, 0)
%8: int32[] = aten.select.int(%1, 0, 0)
%9: int8[2,8] = quantized_decomposed.quantize_per_tensor.tensor(%x, %7, %8, -128, 127, int8)
%10: float32[2,8] = quantized_decomposed.dequantize_per_tensor.tensor(%9, %7, %8, -128, 127, int8, out_dtype=float32)
%11: float32[2,4] = aten.linear(%10, %6, %3)
return %11""",  # noqa: E501,
    )


@pytest.mark.parametrize("name", NAMES)
def test_all_layers_but_the_ends_are_quantized(name: str) -> None:
    program, record = quantized(name, "quantize(int8)")
    by_path = layers(program, BODY[name])
    plain = {n for n, layer in by_path.items() if qdq.weight(layer.weight) is None}
    assert plain == {"sd": {"conv_in", "conv_out"}, "dit": {"pos_embed.proj", "proj_out_2"}}[name]
    for path in by_path.keys() - plain:
        assert qdq.weight(by_path[path].weight).number == "int8"  # type: ignore[union-attr]
        assert qdq.activation(by_path[path].x) is not None, path
    assert 1e-4 < record.relative < 0.05
    sizes = record.notes["weight bytes"]
    assert sizes["after"] < 0.35 * sizes["before"]  # rows of a few numbers, with a scale each
    assert {s.split(": ")[1] for s in record.skipped} == {"one of the first or the last layers"}


@pytest.mark.parametrize("name", NAMES)
def test_scales_are_those_of_the_values_that_modules_read_in_each_step(name: str) -> None:
    """Hooks on the pipeline's own modules see the same extremes, over both branches of guidance."""
    program, _ = quantized(name, f"quantize(int8,groups={STEPS},samples=1,split=false)")
    seen: dict[str, list[tuple[float, float]]] = {}
    pipe = CASES[name].build()
    net = getattr(pipe, BODY[name])
    for path, module in net.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):

            def hook(_: Any, inputs: tuple[Tensor, ...], path: str = path) -> None:
                low, high = inputs[0].aminmax()
                seen.setdefault(path, []).append((float(low), float(high)))

            module.register_forward_pre_hook(hook)
    pipe(**{**arguments(name), "generator": torch.Generator().manual_seed(0)})
    compared = 0
    for path, layer in layers(program, BODY[name]).items():
        if qdq.activation(layer.x) is None or len(seen.get(path, ())) != STEPS:
            continue
        compared += 1
        for step, call in enumerate(program.calls(BODY[name])):
            scale, zero = scale_of(program, call, layer)
            expected = affine(*seen[path][step])
            assert scale == pytest.approx(expected[0], rel=1e-3), (path, step)
            assert abs(zero - expected[1]) <= 1, (path, step)
    assert compared > 10


def test_steps_share_ranges_in_groups() -> None:
    one, record = quantized("sd", "quantize(int8,groups=1)")
    assert record.notes["groups of steps"]["unet"] == [STEPS]
    body = one.components["unet"]
    assert not any("input_scales" in n.name for n in g.placeholders(body))
    two, record = quantized("sd", "quantize(int8,groups=2)")
    assert len(record.notes["groups of steps"]["unet"]) == 2
    assert len({call.target for call in two.calls("unet")}) == 1
    (table,) = {
        nodes.args(call.args[-1])[0].target  # type: ignore[arg-type]
        for call in two.calls("unet")
    }
    assert len(g.attribute(two.root, str(table))) == 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("int8,activations=dynamic", 0.05),
        ("int8,activations=rows", 0.05),
        ("int8,activations=none", 0.02),
        ("int4", 0.4),
        ("int4,activations=none,group=16", 0.3),
        ("fp8", 0.1),
        ("fp8,activations=rows", 0.1),
    ],
)
def test_formats(name: str, text: str, error: float) -> None:
    program, record = quantized(name, f"quantize({text})")
    assert 1e-5 < record.relative < error
    number, _, rest = text.partition(",")
    quantized_layers = [
        layer for layer in layers(program, BODY[name]).values() if qdq.weight(layer.weight)
    ]
    for layer in quantized_layers:
        body = program.components[BODY[name]]
        reads = {n.target: nodes.stored_tensor(body, n) for n in g.ancestors([layer.weight])}
        types = {t.dtype for t in reads.values() if t is not None}
        stored_as = {"int8": torch.int8, "int4": torch.uint8, "fp8": qdq.FP8}[number]
        assert stored_as in types
        activation = qdq.activation(layer.x)
        assert (activation is None) == ("none" in rest)
        if activation is not None:
            assert activation.rows == ("rows" in rest and not layer.convolution)
            assert activation.number == ("fp8" if number == "fp8" else "int8")


def test_four_bits_by_group_reach_the_kernels_as_eight() -> None:
    program, _ = quantized("dit", "quantize(int4,group=8,skip=*ff*)")
    weights = [qdq.weight(la.weight) for la in layers(program, "transformer").values()]
    assert {w.number for w in weights if w} == {"int8"}
    assert {w.group for w in weights if w} == {None}
    program, _ = quantized("dit", "quantize(int4,group=8,activations=none)")
    weights = [qdq.weight(la.weight) for la in layers(program, "transformer").values()]
    assert {(w.number, w.group) for w in weights if w} == {("int4", 8)}


def test_weights_beside_the_loop_have_eight_bits_unless_they_are_named() -> None:
    """In front of the transformer's loop are products that `hoist` wrote as `mm`, and tables."""
    program, record = quantized("dit", "quantize(int4)")
    assert record.notes["tables"] > 0
    step_layers = layers(program, "transformer_steps").values()
    weights = [qdq.weight(layer.weight) for layer in step_layers]
    assert {w.number for w in weights if w} == {"int8"}
    assert len(weights) == record.notes["layers"]["transformer_steps"] > 0
    assert not any(qdq.activation(layer.x) for layer in step_layers)
    tables = program.components["transformer_once"].graph.find_nodes(
        op="call_function", target=aten.embedding.default
    )
    assert [qdq.weight(nodes.args(n)[0]).number for n in tables] == ["int8"] * len(tables)  # type: ignore[union-attr]
    text = "quantize(int4,group=8,activations=none,components=transformer_steps)"
    program, _ = quantized("dit", text)
    weights = [qdq.weight(la.weight) for la in layers(program, "transformer_steps").values()]
    assert {w.number for w in weights if w} == {"int4"}
    program, record = quantized("dit", "quantize(int4,group=8,components=transformer_once)")
    assert record.notes["tables"] == len(tables), "tables alone"
    assert "layers" not in record.notes
    embeddings = program.components["transformer_once"].graph.find_nodes(
        op="call_function", target=aten.embedding.default
    )
    assert {qdq.weight(nodes.args(n)[0]).number for n in embeddings} == {"int8"}  # type: ignore[union-attr]
    for option in ("tables=false", "skip=*emb*", "layers=*attn1*"):
        _, record = quantized("dit", f"quantize(int4,{option})")
        assert "tables" not in record.notes


def test_products_with_a_stored_matrix_are_layers() -> None:
    w, b, x = build.parameter(4, 8), build.parameter(4, seed=1), build.randn(2, 8)

    def make(at: build.Builder, x: fx.Node) -> list[fx.Node]:
        transposed = at(aten.t.default, w)
        half = at(aten.addmm.default, b, x, transposed, beta=0.5)
        return [at(aten.mm.default, x, transposed), at(aten.addmm.default, b, x, transposed), half]

    body = build.body(make, x)
    expected = body(x)
    layer_preparation.restore_linears(body)
    body.recompile()
    assert len(qdq.layers(body)) == 2  # not the one that takes half of the bias
    for one, other in zip(body(x), expected, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize(
    ("better", "plain"),
    [
        ("int4,group=0,rank=2", "int4,group=0"),
        ("int8,smooth=true", None),
        ("int4,group=0,activations=none,rounding=adaround,samples=4", None),
    ],
)
def test_what_makes_layers_easier_to_quantize(better: str, plain: str | None) -> None:
    _, record = quantized("dit", f"quantize({better})")
    (count,) = (
        record.notes[k]
        for k in ("branches", "layers smoothed", "rounding learned")
        if k in record.notes
    )
    assert count > 0
    assert 1e-5 < record.relative < 0.3
    if plain:
        assert record.relative < quantized("dit", f"quantize({plain})")[1].relative


def test_a_branch_that_no_weight_has_room_for_is_told() -> None:
    _, record = quantized("dit", "quantize(int4,group=8,rank=64,layers=*attn1*,samples=1)")
    assert "branches" not in record.notes
    told = "rank: a branch of rank 64 wants 256 inputs and outputs, which no weight has"
    assert told in record.skipped


def test_one_prompt_is_told_to_be_few(caplog: pytest.LogCaptureFixture) -> None:
    quantized("sd", "quantize(int8,layers=mid_block.*)")
    assert "calibrates with the prompt of the capture alone" in caplog.text
    caplog.clear()
    quantized("sd", "quantize(int8,layers=mid_block.*,activations=dynamic)")
    assert not caplog.text


# Steps


@pytest.mark.parametrize("text", ["first:1,last:2", "(0,4-5)"])
@pytest.mark.parametrize("name", NAMES)
def test_kept_steps_compute_what_they_did(name: str, text: str) -> None:
    program, record = quantized(name, f"quantize(int8,keep={text})")
    calls = [c for c in program.calls() if (t := call_tags.tag(c)) and t.component == BODY[name]]
    kept = [not any(qdq.activation(n) for n in _body(program, c).graph.nodes) for c in calls]
    assert kept == [True, False, False, False, True, True]
    assert record.relative < quantized(name, "quantize(int8)")[1].relative


def _body(program: Program, call: fx.Node) -> fx.GraphModule:
    return program.components[str(call.target)]


def test_a_body_all_of_whose_steps_are_kept() -> None:
    text = "unroll,hoist,cache(fora,interval=2,start=1),simplify"
    plain = unrolled("dit", text)
    names = [
        str(c.target)
        for c in plain.calls()
        if (t := call_tags.tag(c)) and t.component in BODY["dit"]
    ]
    full = names[0]
    assert full not in (names[2], names[4])  # these reuse all but the first and the last layers
    steps = ",".join(str(i) for i, name in enumerate(names) if name == full)
    program, record = quantized("dit", f"quantize(int8,keep=({steps}))", text)
    assert full not in record.notes["layers"]
    assert record.notes["layers"]["transformer_steps"] > 0
    assert not any(map(qdq.activation, program.components[full].graph.nodes))


# Concatenations


def test_operands_of_a_concatenation_have_layers_of_their_own() -> None:
    program, record = quantized("sd", "quantize(int8)")
    before = layers(unrolled("sd"), "unet").values()
    count = sum(nodes.is_call(layer.x, aten.cat.default) for layer in before)
    assert record.notes["layers split"] == count > 0
    split_layers = [
        n for n in layers(program, "unet") if n.startswith("up_") and "conv_shortcut" in n
    ]
    assert len(split_layers) == 2 * count
    for path in split_layers:
        x = qdq.activation(layers(program, "unet")[path].x)
        assert x is not None
        assert not nodes.is_call(x.source, aten.cat.default)
    assert "layers split" not in quantized("dit", "quantize(int8)")[1].notes


def test_splitting_is_exact() -> None:
    w, b = build.parameter(4, 5, 3, 3), build.parameter(4, seed=1)
    a, c = build.randn(2, 2, 6, 6), build.randn(2, 3, 6, 6, seed=1)

    def make(at: build.Builder, x: fx.Node, y: fx.Node) -> fx.Node:
        both = at(aten.cat.default, [x, y], 1)
        return at(aten.conv2d.default, both, w, b, [1, 1], [1, 1])

    body = build.body(make, a, c)
    expected = body(a, c)[0]
    assert layer_preparation.split_concats(body, TensorMemo()) == 1
    g.prune_unused(body)
    body.recompile()
    assert torch.allclose(body(a, c)[0], expected, atol=1e-5)
    assert [layer.weight.meta["val"].shape[1] for layer in qdq.layers(body)] == [2, 3]


def test_a_concatenation_along_another_axis_or_of_groups_stays() -> None:
    w = build.parameter(4, 2, 3, 3)
    a = build.randn(2, 2, 6, 6)

    def rows(at: build.Builder, x: fx.Node, y: fx.Node) -> fx.Node:
        return at(aten.conv2d.default, at(aten.cat.default, [x, y], 2), w, None, [1, 1])

    def groups(at: build.Builder, x: fx.Node, y: fx.Node) -> fx.Node:
        both = at(aten.cat.default, [x, y], 1)
        return at(aten.conv2d.default, both, w, None, [1, 1], [0, 0], [1, 1], 2)

    for make in (rows, groups):
        body = build.body(make, a, a)
        assert layer_preparation.split_concats(body, TensorMemo()) == 0


# In combination with other passes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "text",
    [
        "{q},unroll,hoist,simplify,fuse",
        "unroll,{q},hoist,simplify,fuse",
        "unroll,hoist,simplify,fuse,{q}",
        "unroll,hoist,cache({policy}),simplify,{q},simplify,fuse",
        "unroll,{q},hoist,cache({policy}),simplify,fuse",
    ],
)
def test_any_order(name: str, text: str) -> None:
    policy = {"sd": "deepcache,interval=2", "dit": "fora,interval=2"}[name]
    traced = unrolled(name, "")
    program = Pipeline.parse(text.format(q="quantize(int8,samples=2)", policy=policy)).run(traced)
    (record,) = [r for r in program.history if r["text"].startswith("quantize")]
    assert 1e-5 < record["relative"] < 0.06
    bodies = [b for b in program.components.values() if any(map(qdq.weight, b.graph.nodes))]
    assert bodies
    stored = [t for b in bodies for _, t in g.named_tensors(b) if t.dtype == torch.int8]
    # Bodies of one loop share what they store.
    assert len({id(t) for t in stored}) == len({t.untyped_storage().data_ptr() for t in stored})


def test_a_second_run_is_told_that_nothing_is_left() -> None:
    with pytest.raises(DiffoptError, match="quantized already"):
        quantized("dit", "quantize(int8,ends=true,samples=2),quantize(int8,ends=true)")


def test_components_outside_of_the_loop() -> None:
    program, record = quantized("sd", "quantize(int8,components=all)")
    assert {"text_encoder", "unet", "vae_decode"} <= set(record.notes["layers"])
    for name in ("text_encoder", "vae_decode"):
        component_layers = layers(program, name).values()
        assert all(qdq.weight(layer.weight) for layer in component_layers)
        assert not any(qdq.activation(layer.x) for layer in component_layers)
    program, _ = quantized("sd", "quantize(int8,components=vae_decode)")
    assert any(qdq.activation(layer.x) for layer in layers(program, "vae_decode").values())
    assert not any(qdq.activation(layer.x) for layer in layers(program, "unet").values())
    names = {}
    for words in ("all", "*"):
        text = f"quantize(int4,group=4,rank=1,activations=none,components={words})"
        program, record = quantized("sd", text)
        names[words] = [
            qdq.weight(layer.weight).number  # type: ignore[union-attr]
            for layer in layers(program, "text_encoder").values()
        ]
        names[words].append(record.notes["branches"])
    assert set(names["all"][:-1]) == {"int8"}
    assert set(names["*"][:-1]) == {"int4"}
    assert names["*"][-1] > names["all"][-1], "components that are named have branches as well"


# What is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quantize(int8,skip=nothing.*)", "no layer of .* matches 'nothing.*'; modules are"),
        ("quantize(int8,layers=(attn9))", "no layer of .* matches 'attn9'"),
        ("quantize(int8,components=uent)", "there is no component 'uent'; did you mean 'unet'"),
        ("quantize(int8,keep=0-5)", "keep=0-5 leaves no step to quantize"),
        ("quantize(int8,keep=6)", "keep=6: there are only the steps 0 to 5"),
    ],
)
def test_what_the_program_lacks(text: str, message: str) -> None:
    with pytest.raises(DiffoptError, match=message):
        quantized("sd", text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quantize(int8,samples=0)", "static scales are calibrated: ask for samples=1 or more"),
        ("quantize(int8,keep=early)", "keep=early: write first:2, last:2, 7 or 3-6"),
        (
            "quantize(int8,groups=-1)",
            "wants group, groups, rank, samples and budget to be 0 or more",
        ),
        ("quantize(fp8,group=16)", "fp8 weights have a scale for each output: leave group out"),
        ("quantize(int3)", "wants one of int8, int4, fp8"),
    ],
)
def test_what_cannot_be_meant(text: str, message: str) -> None:
    with pytest.raises(DiffoptError) as error:
        Pipeline.parse(text)
    assert message in str(error.value)


def test_values_that_are_not_finite_in_calibration() -> None:
    w = build.parameter(8, 8)

    def layer(at: build.Builder, x: fx.Node) -> fx.Node:
        return at(aten.linear.default, at(aten.log.default, x), w)

    def make(at: build.Builder, x: fx.Node) -> fx.Node:
        node = at.call("layer", x)[0]
        at.gm.graph.find_nodes(op="call_module")[0].meta["tag"] = call_tags.Tag("layer", 0, 0)
        return node

    body = build.body(layer, build.randn(2, 8))
    program = build.program(make, build.randn(2, 8), layer=body)
    with pytest.raises(DiffoptError, match=r"the input of layer\.linear.* is not finite at step 0"):
        Pipeline.parse("quantize(int8,ends=true)").run(program)


def test_a_budget_is_kept() -> None:
    with pytest.raises(ToleranceError, match="its budget is"):
        quantized("sd", "quantize(int4,budget=1e-4)")


def test_steps_in_text_round_trip() -> None:
    text = str(Pipeline.parse("quantize(int8,keep=first:2,last:2)"))
    assert text == "quantize(keep=(first:2,last:2))"
    assert Pipeline.parse(text) == Pipeline.parse("quantize(int8,keep=first:2,last:2)")
