"""What `cast` computes in 16 bits, what it leaves in float32, and by how much results change."""

from dataclasses import dataclass

import pytest
import torch
from expecttest import assert_expected_inline

import diffopt
from diffopt.analysis import dtype_regions
from diffopt.core import Context, Pass, Pipeline, Record
from diffopt.errors import DiffoptError, ToleranceError
from diffopt.ir import graph as g
from diffopt.ir import qdq
from diffopt.ir.printing import format_graph
from diffopt.ir.program import Program
from tests.passes.build import body, parameter, program, randn
from tests.zoo import traced

aten = torch.ops.aten
qd = torch.ops.quantized_decomposed

X = randn(2, 8)
W = torch.nn.Parameter(parameter(8, 8) * 0.3, requires_grad=False)
V = torch.nn.Parameter(parameter(8, 8, seed=1) * 0.3, requires_grad=False)
BF16, F32 = torch.bfloat16, torch.float32


def one(make, *samples, **parts) -> Program:
    """Return a program that calls one component once."""
    samples = samples or (X,)
    net = body(make, *samples, name="net")
    return program(lambda b, *xs: b.call("net", *xs), *samples, net=net, **parts)


def run(built: Program, step: str = "cast(bf16,islands=none)", **options) -> tuple[Program, Record]:
    result = Pipeline.parse(step).run(built, **options)
    return result, Record.from_json(result.history[-1])


def targets(gm, target) -> list:
    return [n.meta["val"].dtype for n in gm.graph.find_nodes(op="call_function", target=target)]


def layer_types(built: Program) -> dict[str, set[torch.dtype]]:
    """Return, for each component, what types its layers read, but for their tensors of ints."""
    types: dict[str, set[torch.dtype]] = {}
    for name, gm in built.components.items():
        for node in dtype_regions.layers(gm):
            reads = (n.meta["val"].dtype for n in node.all_input_nodes)
            types.setdefault(name, set()).update(t for t in reads if t.is_floating_point)
    return types


# One body


def test_layers_and_an_island():
    def make(b, x):
        norm = b(aten.layer_norm.default, b(aten.linear.default, x, W), [8])
        return b(aten.linear.default, norm, W)

    result, record = run(one(make), "cast(bf16,islands=norms)")
    assert_expected_inline(
        format_graph(result.components["net"]),
        """\
%x: float32[2,8]
%1: bfloat16[2,8] = aten._to_copy(%x, dtype=bfloat16)
%2: bfloat16[8,8] = weight_1
%3: bfloat16[2,8] = aten.linear(%1, %2)
%4: float32[2,8] = aten._to_copy(%3, dtype=float32)
%5: float32[2,8] = aten.layer_norm(%4, [8])
%6: bfloat16[2,8] = aten._to_copy(%5, dtype=bfloat16)
%7: bfloat16[2,8] = aten.linear(%6, %2)
%8: float32[2,8] = aten._to_copy(%7, dtype=float32)
return %8""",
    )
    assert 0 < record.relative < 0.01  # 8 bits: 0.004 a rounding, and there are six in a row


def test_weights_are_converted_once_for_all_components():
    one_body = body(lambda b, x: b(aten.linear.default, x, W), X, name="a")
    other = body(lambda b, x: b(aten.relu.default, b(aten.linear.default, x, W)), X, name="b")
    built = program(lambda b, x: b.call("b", *b.call("a", x)), X, a=one_body, b=other)
    result, record = run(built)
    kept = [t for gm in result.components.values() for _, t in g.named_tensors(gm)]
    assert len(kept) == 2
    assert kept[0] is kept[1]
    assert isinstance(kept[0], torch.nn.Parameter)
    assert (record.before.bytes, record.after.bytes) == (256, 128)
    assert W.dtype == F32


def test_values_between_components_cross_in_the_low_type():
    first = body(lambda b, x: b(aten.linear.default, x, W), X, name="first")

    def rest(b, k, x):
        return b(aten.add.Tensor, b(aten.linear.default, x, W), b(aten.linear.default, k, V))

    second = body(rest, X, X, name="second")

    def root(b, x):
        (k,) = b.call("first", x)
        (y,) = b.call("second", k, x)
        return b.call("second", k, b(aten.mul.Tensor, y, 0.5))

    result, _ = run(program(root, X, first=first, second=second))
    assert [t.meta["val"].dtype for t in g.placeholders(result.components["second"])] == [BF16, F32]
    assert g.outputs(result.components["first"])[0].meta["val"].dtype == BF16
    assert g.outputs(result.components["second"])[0].meta["val"].dtype == F32
    assert targets(result.root, aten.mul.Tensor) == [F32]


def test_a_value_that_is_also_used_outside_of_components_does_not_cross():
    first = body(lambda b, x: b(aten.linear.default, x, W), X, name="first")
    second = body(lambda b, k: b(aten.linear.default, k, V), X, name="second")

    def root(b, x):
        (k,) = b.call("first", x)
        return [*b.call("second", k), b(aten.mul.Tensor, k, 2.0)]

    result, _ = run(program(root, X, first=first, second=second))
    assert g.placeholders(result.components["second"])[0].meta["val"].dtype == F32


def test_values_that_are_used_in_float32_do_not_cross():
    def make(b, x):
        return [b(aten.linear.default, x, W), b(aten.exp.default, x)]

    def rest(b, latents, head):
        noise = b(aten.linear.default, b(aten.sin.default, head), V)
        return b(aten.sub.Tensor, latents, noise)

    first, second = body(make, X, name="first"), body(rest, X, X, name="second")

    def root(b, x):
        return b.call("second", *b.call("first", x))

    result, _ = run(program(root, X, first=first, second=second))
    takes = g.placeholders(result.components["second"])
    assert [node.meta["val"].dtype for node in takes] == [F32, F32]


def test_arithmetic_on_results_stays_in_float32():
    """As where `fuse` has put the scheduler's step into the denoiser's body."""

    def step(b, latents):
        noise = b(aten.linear.default, b(aten.mul.Tensor, latents, 0.5), W)
        return b(aten.sub.Tensor, latents, b(aten.mul.Tensor, noise, 0.1))

    net = body(step, X, name="net")
    built = program(lambda b, x: b.call("net", *b.call("net", x)), X, net=net)
    result, record = run(built)
    net = result.components["net"]
    assert targets(net, aten.mul.Tensor) + targets(net, aten.sub.Tensor) == [F32] * 3
    assert targets(net, aten.linear.default) == [BF16]
    assert g.placeholders(net)[0].meta["val"].dtype == F32
    assert 0 < record.relative < 1e-3  # a tenth of one layer's


def test_positions_and_timesteps_keep_their_digits():
    def make(b, x, t):
        wide = b(aten._to_copy.default, t, dtype=F32)
        angles = b(aten.mul.Tensor, wide, b(aten.arange.start, 1, 9, dtype=F32))
        table = b(aten.sin.default, angles)
        return b(aten.linear.default, b(aten.mul.Tensor, b(aten.linear.default, x, W), table), V)

    result, record = run(one(make, X, torch.tensor([999])))
    net = result.components["net"]
    assert targets(net, aten.sin.default) == targets(net, aten.arange.start) == [F32]
    assert targets(net, aten.linear.default) == [BF16] * 2
    assert record.relative < 0.01


def test_float64_and_integers_stay():
    def make(b, x, ids):
        wide = b(aten._to_copy.default, b(aten.linear.default, x, W), dtype=torch.float64)
        back = b(aten._to_copy.default, b(aten.exp.default, wide), dtype=F32)
        row = b(aten.embedding.default, V, ids)
        return b(aten.linear.default, b(aten.add.Tensor, back, row), W)

    result, _ = run(one(make, X, torch.tensor([1, 2])))
    net = result.components["net"]
    assert targets(net, aten.exp.default) == [torch.float64]
    assert targets(net, aten.embedding.default) == [BF16]
    assert [t.dtype for _, t in g.named_tensors(net)] == [BF16, BF16]


def test_a_type_that_the_model_asks_for_stays():
    def make(b, x):
        scores = b(aten.linear.default, x, W)
        weights = b(aten.softmax.int, scores, -1, F32)
        zeros = b(aten.zeros_like.default, scores, dtype=F32)
        return b(aten.linear.default, b(aten.add.Tensor, weights, zeros), V)

    net = run(one(make))[0].components["net"]
    assert targets(net, aten.softmax.int) == [F32]
    assert targets(net, aten.zeros_like.default) == [BF16]
    assert targets(net, aten.linear.default) == [BF16] * 2


def test_a_constant_of_one_number_promotes_nothing_and_keeps_its_digits():
    scale = torch.tensor(0.3333333)

    def make(b, x):
        scaled = b(aten.mul.Tensor, b(aten.linear.default, x, W), scale)
        return b(aten.linear.default, scaled, V)

    net = run(one(make))[0].components["net"]
    assert targets(net, aten.mul.Tensor) == [BF16]
    assert {t.dim(): t.dtype for _, t in g.named_tensors(net)} == {0: F32, 2: BF16}


def test_casts_are_shared_and_views_of_weights_cost_nothing():
    def make(b, x):
        transposed = b(aten.transpose.int, b.weight(W), 0, 1)
        pairs = [b(aten.matmul.default, x, transposed), b(aten.linear.default, x, V)]
        return b(aten.add.Tensor, *pairs)

    net = run(one(make))[0].components["net"]
    assert targets(net, aten._to_copy.default) == [BF16, F32, F32]  # %x, and the last sum's
    assert targets(net, aten.transpose.int) == [BF16]


def test_masks_stay_finite():
    mask = torch.full((2, 2), torch.finfo(F32).min)  # whole rows: -inf would make them nan

    def make(b, x):
        q = b(aten.linear.default, x, W)
        scores = b(aten.matmul.default, q, b(aten.transpose.int, q, 0, 1))
        weights = b(aten.softmax.int, b(aten.add.Tensor, scores, mask), -1)
        return b(aten.matmul.default, weights, q)

    for dtype in ("bf16", "fp16"):
        result, record = run(one(make), f"cast({dtype},islands=none)")
        assert record.skipped == []
        assert bool(result.run([X])[0].isfinite().all())


@pytest.mark.parametrize(
    ("kind", "wide"),
    [
        ("none", []),
        ("time", ["silu", "linear_1"]),
        ("softmax", ["mul_1", "softmax"]),
        ("norms", ["layer_norm", "gelu"]),
        ("output", ["linear_3"]),
    ],
)
def test_kinds_of_islands(kind, wide):
    def make(b, x, t):
        time = b(aten.linear.default, b(aten.silu.default, b(aten.linear.default, t, V)), V)
        y = b(aten.mul.Tensor, b(aten.linear.default, x, W), time)
        scores = b(aten.mul.Tensor, b(aten.matmul.default, y, b(aten.transpose.int, y, 0, 1)), 0.5)
        y = b(aten.matmul.default, b(aten.softmax.int, scores, -1), y)
        y = b(aten.gelu.default, b(aten.layer_norm.default, y, [8]))
        return b(aten.mul.Tensor, b(aten.linear.default, y, W), 2.0)

    net = body(make, X, X[:1], name="net")
    times = randn(1, 8, seed=1), randn(1, 8, seed=2)

    def root(b, x):
        (y,) = b.call("net", x, times[0])
        return b.call("net", y, times[1])

    result, _ = run(program(root, X, net=net), f"cast(bf16,islands={kind})")
    new, names, counts = result.components["net"], [], {}
    for node in new.graph.nodes:
        if node.op != "call_function" or node.target is aten._to_copy.default:
            continue
        name = node.target.__name__.partition(".")[0]
        counts[name] = counts.get(name, -1) + 1
        if node.meta["val"].dtype == F32:
            names.append(f"{name}_{counts[name]}" if counts[name] else name)
    wide = ["linear", *wide] if kind == "time" else wide
    assert sorted(names) == sorted([*wide, "mul_2"])  # the last is on the result


# Quantized values


@pytest.mark.parametrize("number", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("scaling", ["static", "dynamic", "rows"])
def test_quantized_layers_stay_quantized(number, scaling):
    if number == "int4":
        values = (W / 0.15).round().clamp(-8, 7).to(torch.int8)
        packed = qdq.Packed.of("int4", values, torch.full((8, 2), 0.15), 4)
    elif number == "fp8":
        packed = qdq.Packed.of("fp8", W.to(qdq.FP8), torch.ones(8))
    else:
        packed = qdq.Packed.of("int8", (W * 100).round().to(torch.int8), torch.full((8,), 0.01))
    kind = "fp8" if number == "fp8" else "int8"

    def make(b, x):
        constants = []
        if scaling == "static":
            constants = [b.weight(torch.tensor([0.02]))]
            constants += [b.weight(torch.tensor([3], dtype=torch.int32))] if kind == "int8" else []
        y = b(aten.relu.default, b(aten.linear.default, x, V))
        small = qdq.quantize(b.gm, y, scaling, *constants, number=kind)
        weight = qdq.place_weight(b.gm, "w", packed, F32)
        return b(aten.linear.default, small, weight)

    result, record = run(one(make))
    net = result.components["net"]
    (layer,) = [layer for layer in qdq.layers(net) if qdq.weight(layer.weight) is not None]
    assert layer.x.meta["val"].dtype == layer.weight.meta["val"].dtype == BF16
    assert layer.node.meta["val"].dtype == BF16
    weight, activation = qdq.weight(layer.weight), qdq.activation(layer.x)
    assert weight.number == number
    assert weight.scales.meta["val"].dtype == activation.scale.meta["val"].dtype == F32
    assert activation.source.meta["val"].dtype == BF16
    stored = {t.dtype for _, t in g.named_tensors(net)} - {BF16, F32, torch.int32}
    assert stored == {packed.values.dtype}
    assert record.relative < 0.05  # where a rounding moves a value to the next of 255


# What is left alone


def test_what_has_nothing_to_cast_says_so():
    ints = body(lambda b, x: b(aten.add.Tensor, x, 1), torch.arange(3), name="ints")
    half = torch.nn.Parameter(W.to(BF16), requires_grad=False)
    low = body(lambda b, x: b(aten.linear.default, x, half), X.to(BF16), name="low")

    def root(b, i, x):
        return [*b.call("ints", i), *b.call("low", x)]

    _, record = run(program(root, torch.arange(3), X.to(BF16), ints=ints, low=low))
    assert not record.changed
    assert record.skipped == [
        "ints: has no layers, nothing would be faster",
        "low: computes in bfloat16 already",
    ]


def test_what_overflows_goes_to_its_island_or_stays():
    def make(b, x):
        large = b(aten.mul.Tensor, b(aten.linear.default, x, W), 3e2)
        root = b(
            aten.rsqrt.default, b(aten.mean.dim, b(aten.pow.Tensor_Scalar, large, 2), [-1], True)
        )
        return b(aten.linear.default, b(aten.mul.Tensor, large, root), V)

    result, record = run(one(make), "cast(fp16,share=1)")
    net = result.components["net"]
    assert record.notes["net"]["islands"] == ["norms"]
    assert targets(net, aten.pow.Tensor_Scalar) == [F32]
    assert targets(net, aten.linear.default) == [torch.float16] * 2
    assert bool(result.run([X])[0].isfinite().all())

    _, record = run(one(make), "cast(fp16,islands=none)")
    reason = "net: stays in float32, since pow_tensor_scalar overflows float16"
    assert (record.changed, record.skipped) == (False, [reason])
    _, record = run(one(make), "cast(bf16,islands=none)")
    assert record.skipped == []


def test_an_operator_without_a_kernel_stays_in_float32():
    def make(b, x):
        wave = b(aten.special_bessel_j0.default, b(aten.linear.default, x, W))
        return b(aten.linear.default, wave, V)

    result, record = run(one(make))
    net = result.components["net"]
    assert targets(net, aten.special_bessel_j0.default) == [F32]
    assert targets(net, aten.linear.default) == [BF16] * 2
    reason = "\"bessel_j0_cpu\" not implemented for 'BFloat16'"
    assert record.skipped == [f"net.special_bessel_j0_default: stays in float32: {reason}"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "cast(bf16,islands=auto,norms)",
            "cast has islands=auto,norms; write auto, none or kinds of islands, as in"
            " cast(bf16,islands=norms,output)",
        ),
        ("cast(calls=0)", "cast wants calls >= 1 and 0 < share <= 1"),
    ],
)
def test_bad_options(text, message):
    with pytest.raises(DiffoptError) as caught:
        Pipeline.parse(text)
    assert caught.value.message == message


# Pipelines


@pytest.fixture(scope="module", params=["sd", "dit"])
def pipeline(request) -> Program:
    return traced(request.param)


def test_all_layers_of_a_pipeline_compute_in_the_low_type(pipeline):
    result, record = run(pipeline)
    types = layer_types(result)
    assert set(types) == set(result.components)
    assert all(reads == {BF16} for reads in types.values()), types
    assert 1e-4 < record.relative < 0.03  # a few roundings of 0.004 in each of three steps
    assert record.after.bytes < 0.55 * record.before.bytes
    again = Record.from_json(run(result)[0].history[-1])
    assert not again.changed
    assert len(again.skipped) == len(result.components)


def test_islands_are_chosen_by_measuring(pipeline):
    result, record = run(pipeline, "cast(bf16)")
    plain = run(pipeline)[1]
    assert set(record.notes) == set(result.components)
    notes = record.notes.values()
    assert any(note["islands"] for note in notes)
    assert all(note["relative error"] <= note["without islands"] for note in notes)
    for name, note in record.notes.items():
        norms = [
            n.meta["val"].dtype
            for target in (aten.group_norm.default, aten.layer_norm.default)
            for n in result.components[name].graph.find_nodes(op="call_function", target=target)
            if n.meta["val"].dtype != F32
        ]
        assert not (norms and "norms" in note["islands"]), name
    assert record.relative < 1.2 * plain.relative


@pytest.mark.parametrize(
    "text",
    [
        "unroll,hoist,simplify,fuse,cast(bf16,islands=norms,calls=1)",
        "cast(bf16,islands=norms,calls=1),unroll,hoist,simplify,fuse",
        "unroll,cast(bf16,islands=norms,calls=1),hoist,cache(fora,interval=2),simplify,fuse",
        "unroll,hoist,cache(fora,interval=2),cast(bf16,islands=norms,calls=1),simplify,fuse",
    ],
)
def test_with_other_passes_in_any_order(pipeline, text):
    result = Pipeline.parse(text).run(pipeline)  # exact passes are checked as they run
    types = layer_types(result)
    assert all(reads == {BF16} for reads in types.values()), types
    drift = result.history[-1]["drift"]
    if "cache" not in text:
        assert 1e-4 < drift < 0.03
    once = [n for n in result.components if n.endswith("_once")]
    for call in (call for name in once for call in result.calls(name)):
        assert {user.meta["val"].dtype for user in call.users} == {BF16}


def test_an_engine_runs_it(pipeline, tmp_path):
    result, _ = run(pipeline, "cast(bf16,islands=none,calls=1)")
    diffopt.build(result, "eager", tmp_path / "low.engine")
    engine = diffopt.load(tmp_path / "low.engine")
    expected = result.run(result.sample)
    assert all(map(torch.equal, engine.program.run(result.sample), expected))


# Tolerance


@dataclass(frozen=True)
class Reorder(Pass):
    """Change results by half a rounding of bfloat16."""

    name = "reorder"
    rtol = 1e-6
    tolerance_reason = "a sum in another order"

    def run(self, program: Program, ctx: Context) -> None:
        gm = program.root
        (value,) = g.outputs(gm)
        with gm.graph.inserting_before(g.output_node(gm)):
            g.set_outputs(gm, [g.call(gm.graph, aten.mul.Tensor, value, 1 + 2**-8)])


def test_exact_passes_are_judged_by_the_type(monkeypatch):
    built = one(lambda b, x: b(aten.linear.default, x, W))
    low, _ = run(built)
    Pipeline((Reorder(),)).run(low)
    with pytest.raises(ToleranceError, match="allowed: atol 0, rtol 1e-06"):
        Pipeline((Reorder(),)).run(built)
    monkeypatch.setattr(Reorder, "rtol", 0.0)
    with pytest.raises(ToleranceError):
        Pipeline((Reorder(),)).run(low)  # one that promises the same bits has to keep them
