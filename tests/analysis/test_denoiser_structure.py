"""What is found in denoisers' graphs, against what their configurations and modules say."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import diffopt
from diffopt.analysis.denoiser_structure import (
    Block,
    Branch,
    DenoiserStructure,
    Skip,
    analyze_denoiser,
)
from diffopt.caching import apply_plan
from diffopt.core import Pipeline
from diffopt.ir import graph as g
from diffopt.ir.flops import graph_flops, node_flops
from diffopt.ir.program import Program
from tests.passes.build import Builder, body, parameter, randn
from tests.zoo import CASES, session, traced
from tests.zoo.case import randomize

aten = torch.ops.aten

A, C, M = "attention", "cross-attention", "mlp"

# Deeper than in the zoo, so that a block follows another one of its sort.
DEEPER: dict[str, dict[str, Any]] = {
    "flux": {"num_layers": 2, "num_single_layers": 3},
    "flux2": {"num_layers": 2, "num_single_layers": 3},
    "hunyuan-dit": {"num_layers": 6},
    "sd3": {"num_layers": 3, "dual_attention_layers": (0,)},
}

# The blocks of transformers: for each the number of its streams and its branches.
TRANSFORMERS: dict[str, list[tuple[int, list[str]]]] = {
    "dit": [(1, [A, M])] * 2,
    "pixart": [(1, [A, C, M])] * 2,
    "sana": [(1, [A, C, M])] * 2,
    "wan": [(1, [A, C, M])] * 2,
    "ltx": [(1, [A, C, M])] * 2,
    "stable-audio": [(1, [A, C, M])] * 2,
    "hunyuan-dit": [(1, [A, C, M])] * 6,
    # The first block has a second attention to the image alone; the last returns no text.
    "sd3": [(2, [A, A, M, A, M]), (2, [A, M, A, M]), (1, [A, M])],
    "cogvideox": [(2, [A, A, M, M]), (2, [A, A, M])],
    "flux": [(2, [A, M, A, M])] * 2 + [(1, [A])] * 3,
    "flux2": [(2, [A, M, A, M])] * 2 + [(1, [A])] * 3,
    "aura-flow": [(2, [A, M, A, M])] * 2 + [(1, [A, M])],
}
UNETS = ("sd", "sdxl", "sd-controlnet", "kandinsky-decoder", "ddim")


@cache
def pipeline(name: str) -> Any:
    if name not in DEEPER:
        return session(name).pipeline
    pipe = CASES[name].build()
    net = type(pipe.transformer)(**{**pipe.transformer.config, **DEEPER[name]})
    randomize(net, 0)
    pipe.transformer = net
    return pipe


@cache
def program(name: str, passes: str) -> Program:
    first, _, last = passes.rpartition(",")
    if first:
        return Pipeline.parse(last).run(program(name, first), verify=False)
    if name in DEEPER:
        captured = diffopt.trace(pipeline(name), **CASES[name].inputs(0), check=False)
    else:
        captured = traced(name)
    return Pipeline.parse(passes).run(captured, verify=False)


def denoiser(name: str, passes: str) -> tuple[fx.GraphModule, list[fx.Node]]:
    """Return the loop's body and the arguments that depend on an earlier call."""
    loop = apply_plan.find_loop(program(name, passes))
    return loop.body, changing(loop.body, list(loop.calls.values()))


def changing(gm: fx.GraphModule, calls: list[fx.Node]) -> list[fx.Node]:
    late = g.descendants(calls)
    takes = enumerate(g.placeholders(gm))
    return [n for i, n in takes if any(call.args[i] in late for call in calls)]


@cache
def parts(name: str, passes: str) -> DenoiserStructure:
    return analyze_denoiser(*denoiser(name, passes))


def kinds(block: Block) -> tuple[int, list[str]]:
    return len(block.stream_in), [branch.kind for branch in block.branches]


def transformer_blocks(structure: DenoiserStructure) -> list[Block]:
    return [block for block in structure.blocks if any(b.attentions for b in block.branches)]


def is_layer(node: fx.Node) -> bool:
    return bool(re.search(r"aten\.(linear|conv\dd)\.", str(node.target)))


def layers(branch: Branch) -> list[str]:
    """Return the modules of the layers that are a branch's own."""
    nodes = g.descendants([branch.source]) & g.ancestors([branch.value])
    for inner in branch.inner:
        nodes -= g.descendants([inner.source]) & g.ancestors([inner.value])
    return [str(n.meta["module"]) for n in nodes - {branch.source} if is_layer(n)]


PASSES = ("unroll", "unroll,hoist")
both = pytest.mark.parametrize("passes", PASSES)


@both
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_blocks_of_transformers(name: str, passes: str) -> None:
    structure = parts(name, passes)
    assert [kinds(block) for block in transformer_blocks(structure)] == TRANSFORMERS[name]
    config = pipeline(name).transformer.config
    counts = [v for k, v in config.items() if re.fullmatch(r"num_\w*layers", k)]
    assert len(TRANSFORMERS[name]) == sum(counts)
    # Beside the blocks, only the convolutions of 1x1 before and after a transformer for audio.
    others = [
        kinds(block) for block in structure.blocks if block not in transformer_blocks(structure)
    ]
    assert others == ([(1, ["other"])] * 2 if name == "stable-audio" else [])


@both
@pytest.mark.parametrize("name", UNETS)
def test_blocks_of_unets(name: str, passes: str) -> None:
    structure = parts(name, passes)
    modules = Counter(type(m).__name__ for m in pipeline(name).unet.modules())
    count = Counter(branch.kind for branch in structure.branches)
    assert count["convolution"] == modules["ResnetBlock2D"] + modules["ResnetDownsample"]
    assert count[A] + count[C] == modules["Attention"]
    inner = modules["BasicTransformerBlock"]
    assert count[M] == inner
    assert count["other"] == modules["Transformer2DModel"]
    if inner:
        blocks = [kinds(block) for block in transformer_blocks(structure)]
        assert blocks == [(1, [A, C, M])] * inner


@both
@pytest.mark.parametrize("name", UNETS)
def test_skips_of_unets(name: str, passes: str) -> None:
    structure = parts(name, passes)
    resnets = [
        f"up_blocks.{i}.resnets.{j}"
        for i, block in enumerate(pipeline(name).unet.up_blocks)
        for j, _ in enumerate(block.resnets)
    ]
    assert [skip.index for skip in structure.skips] == list(range(len(resnets)))
    readers = [reader(skip) for skip in structure.skips]
    assert readers == [f"{resnet}.norm1" for resnet in reversed(resnets)]
    assert structure.middle is structure.skips[-1].deep
    shallow = [skip.shallow.meta.get("module") for skip in structure.skips]
    if name != "sd-controlnet":  # there the shallow values are sums with the control's
        assert shallow[0] == "conv_in"
        assert all(str(module).startswith("down_blocks") for module in shallow[1:])


def reader(skip: Skip) -> str:
    """Return the module of the norm that reads a concatenation."""
    return next(str(user.meta["module"]) for user in skip.node.users if "norm" in user.name)


@pytest.mark.parametrize("name", ["sd", "sdxl", "kandinsky-decoder", "ddim"])
def test_what_stays_when_a_skips_deep_value_is_given(name: str) -> None:
    gm, _ = denoiser(name, "unroll,hoist")
    structure = parts(name, "unroll,hoist")
    live = [live_without(gm, skip.deep) for skip in structure.skips]
    costs = [sum(node_flops(n) for n in nodes if n.op == "call_function") for nodes in live]
    assert costs == sorted(set(costs))
    assert 0 < costs[0] < costs[-1] < graph_flops(gm)
    outermost = {str(n.meta["module"]).rpartition(".")[0] for n in live[0] if is_layer(n)}
    resnet = f"up_blocks.{len(pipeline(name).unet.up_blocks) - 1}.resnets.1"
    assert outermost == {"", resnet}  # conv_in, conv_out, and the last resnet


def live_without(gm: fx.GraphModule, known: fx.Node) -> set[fx.Node]:
    """Return what the outputs need when a value is given."""
    live, stack = set[fx.Node](), list(g.outputs(gm))
    while stack:
        node = stack.pop()
        if node not in live and node is not known:
            live.add(node)
            stack.extend(node.all_input_nodes)
    return live


def test_skips_of_a_transformer() -> None:
    structure = parts("hunyuan-dit", "unroll,hoist")
    # Layers after the middle read the ones before it: the last the first.
    sides = [(s.shallow.meta["module"], s.deep.meta["module"]) for s in structure.skips]
    assert sides == [("blocks.0", "blocks.4"), ("blocks.1", "blocks.3")]
    assert structure.middle is structure.skips[1].deep


@both
@pytest.mark.parametrize("name", [*TRANSFORMERS, *UNETS])
def test_kinds_are_what_the_modules_are(name: str, passes: str) -> None:
    structure = parts(name, passes)
    for branch in structure.branches:
        modules = layers(branch)
        if branch.kind == M:
            assert modules
            assert all(re.search(r"\b(ff|ffn|ff_context|mlp)\b", m) for m in modules), modules
        elif branch.kind == "convolution":
            assert all(re.search(r"\b(resnets|downsamplers|upsamplers)\b", m) for m in modules)
        elif branch.kind == "other":
            assert all(re.search(r"proj_in|proj_out|process_conv", m) for m in modules), modules
        else:
            paths = [str(a.node.meta["module"]) for a in branch.attentions]
            assert paths
            assert all(re.search(r"\b(attn\d?|attentions)\b", path) for path in paths), paths
            # The second attention of a block reads the text; SD3's reads the image once more.
            crossed = name != "sd3" and any("attn2" in path for path in paths)
            assert (branch.kind == C) == crossed
    used = {a for branch in structure.branches for a in branch.attentions}
    assert used == set(structure.attentions)


@both
@pytest.mark.parametrize("name", [*TRANSFORMERS, *UNETS])
def test_a_stream_without_its_branches_stays_what_it_was(name: str, passes: str) -> None:
    gm, _ = denoiser(name, passes)
    structure = parts(name, passes)
    for value in ("value", "ungated"):
        zeros = {getattr(branch, value) for branch in structure.branches}
        seen = run(gm, zeros)
        for branch in structure.branches:
            assert torch.equal(seen[branch.stream_out], seen[branch.stream_in])
        for block in transformer_blocks(structure):
            for before, after in zip(block.stream_in, block.stream_out, strict=True):
                assert torch.equal(seen[before], seen[after])
                assert seen[before].any()
    # With the branches something is added.
    seen = run(gm, ())
    for branch in structure.branches:
        assert not torch.equal(seen[branch.stream_out], seen[branch.stream_in])


def run(gm: fx.GraphModule, zeros: Collection[fx.Node]) -> Mapping[fx.Node, Tensor]:
    """Run a body on random arguments with some of its values zero; return all values."""
    seen: dict[fx.Node, Tensor] = {}

    class Run(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            seen[n] = super().run_node(n)
            if n in zeros:
                seen[n] = torch.zeros_like(seen[n])
            return seen[n]

    values = [n.meta["val"] for n in g.placeholders(gm)]
    arguments = [
        randn(*v.shape, seed=i) if v.is_floating_point() else torch.ones(v.shape, dtype=v.dtype)
        for i, v in enumerate(values)
    ]
    Run(gm).run(*arguments)
    return seen


@both
@pytest.mark.parametrize("name", ["sd", "flux", "aura-flow"])
def test_names_are_not_read(name: str, passes: str) -> None:
    gm, takes = denoiser(name, passes)
    copy = g.clone(gm)
    places = {node: i for i, node in enumerate(gm.graph.nodes)}
    nodes = list(copy.graph.nodes)
    for index, node in enumerate(nodes):
        node.meta = {"val": node.meta.get("val")}
        node.name = f"node_{index}"
    bare = analyze_denoiser(copy, [nodes[places[node]] for node in takes])
    assert described(bare, copy) == described(parts(name, passes), gm)


def described(structure: DenoiserStructure, gm: fx.GraphModule) -> list[Any]:
    place = {node: i for i, node in enumerate(gm.graph.nodes)}
    branches = [
        (b.kind, *(place[n] for n in (b.value, b.ungated, b.stream_in, b.stream_out, b.source)))
        for b in structure.branches
    ]
    blocks = [
        (place[b.first], place[b.last], *map(place.get, b.stream_out)) for b in structure.blocks
    ]
    streams = [[place[n] for n in stream.values] for stream in structure.streams]
    return [branches, blocks, streams, [(place[s.deep], place[s.shallow]) for s in structure.skips]]


@pytest.mark.parametrize("name", ["sd", "sd-controlnet", "pixart", "aura-flow"])
def test_the_last_passes_hide_nothing(name: str) -> None:
    before = parts(name, "unroll,hoist")
    fused = program(name, "unroll,hoist,simplify,fuse")
    step = next(key for key in fused.components if key.endswith("_step"))
    gm = fused.components[step]
    takes = changing(gm, fused.calls(step))
    after = analyze_denoiser(gm, takes)
    if name == "sd-controlnet":  # its encoder and middle are in the step too
        assert len(transformer_blocks(after)) == len(transformer_blocks(before)) + 2
    else:
        assert list(map(kinds, transformer_blocks(after))) == list(
            map(kinds, transformer_blocks(before))
        )
    assert len(after.skips) == len(before.skips)
    # A solver that adds to the latents makes a residual of the whole denoiser.
    whole = [branch for branch in after.branches if branch.source in takes]
    assert {branch.kind for branch in whole} <= {"other"}


# Small graphs


def of(make: Callable[..., Any], *samples: Tensor, fixed: int = 0) -> DenoiserStructure:
    """Return the anatomy of a graph whose last `fixed` arguments do not change."""
    gm = body(make, *samples)
    takes = g.placeholders(gm)
    return analyze_denoiser(gm, takes[: len(takes) - fixed])


X = randn(1, 4, 8)
W = [parameter(8, 8, seed=i) for i in range(8)]


def mlp(b: Builder, x: fx.Node, i: int = 0) -> fx.Node:
    return b(aten.linear.default, b(aten.gelu.default, b(aten.linear.default, x, W[i])), W[i + 1])


def attend(b: Builder, x: fx.Node, y: fx.Node, i: int = 0) -> fx.Node:
    q, k, v = (b(aten.linear.default, n, W[i + j]) for j, n in enumerate((x, y, y)))
    scores = b(aten.softmax.int, b(aten.matmul.default, q, b(aten.transpose.int, k, 1, 2)), -1)
    return b(aten.matmul.default, scores, v)


def add(b: Builder, x: Any, y: Any) -> fx.Node:
    return b(aten.add.Tensor, x, y)


def test_branches_side_by_side() -> None:
    def make(b: Builder, x: fx.Node, y: fx.Node) -> fx.Node:
        x = b(aten.linear.default, x, W[6])
        first = add(b, x, attend(b, x, x))
        second = add(b, attend(b, x, y, 3), first)
        return add(b, second, mlp(b, x))

    structure = of(make, X, X, fixed=1)
    assert [kinds(block) for block in structure.blocks] == [(1, [A, C, M])]
    (stream,) = structure.streams
    assert len({branch.source for branch in stream.branches}) == 1
    assert stream.values == (stream.values[0], *(b.stream_out for b in stream.branches))


def test_one_branch_of_two_attentions() -> None:
    def make(b: Builder, x: fx.Node, y: fx.Node) -> fx.Node:
        return add(b, x, add(b, attend(b, x, y), attend(b, x, y, 3)))

    (branch,) = of(make, X, X, fixed=1).branches
    assert branch.kind == C
    assert len(branch.attentions) == 2


def test_the_inputs_of_an_attention_of_products() -> None:
    def make(b: Builder, x: fx.Node, y: fx.Node) -> fx.Node:
        return attend(b, x, y)

    (one,) = of(make, X, X, fixed=1).attentions
    assert one.cross
    targets = [str(n.target) for n in one.inputs]
    assert targets == ["aten.linear.default", "aten.transpose.int", "aten.linear.default"]
    (other,) = of(make, X, X).attentions
    assert not other.cross


def rotary(b: Builder, x: fx.Node, cos: fx.Node) -> fx.Node:
    halves = [b(aten.slice.Tensor, x, -1, 4 * i, 4 * i + 4) for i in (1, 0)]
    rotated = b(aten.cat.default, [b(aten.neg.default, halves[0]), halves[1]], -1)
    x = add(b, b(aten.mul.Tensor, x, cos), b(aten.mul.Tensor, rotated, cos))
    return b(aten.linear.default, x, W[0])


def own_gelu(b: Builder, x: fx.Node, cos: fx.Node) -> fx.Node:
    x = b(aten.linear.default, x, W[0])
    cube = b(aten.mul.Tensor, b(aten.pow.Tensor_Scalar, x, 3), 0.044715)
    return b(aten.mul.Tensor, x, b(aten.tanh.default, add(b, x, cube)))


def adapter(b: Builder, x: fx.Node, cos: fx.Node) -> fx.Node:
    low = b(aten.linear.default, b(aten.linear.default, x, W[1]), W[2])
    return add(b, b(aten.linear.default, x, W[0]), b(aten.mul.Tensor, low, 0.5))


def position(b: Builder, x: fx.Node, cos: fx.Node) -> fx.Node:
    return mlp(b, add(b, cos, b(aten.linear.default, x, W[3])))


def square(b: Builder, x: fx.Node, cos: fx.Node) -> fx.Node:
    return add(b, b(aten.mul.Tensor, x, x), mlp(b, x))


def inverse(b: Builder, x: fx.Node, cos: fx.Node) -> fx.Node:
    return add(b, b(aten.div.Tensor, cos, x), mlp(b, x))


@pytest.mark.parametrize("make", [rotary, own_gelu, adapter, position, square, inverse])
def test_additions_that_are_no_residuals(make: Callable[..., Any]) -> None:
    assert of(make, X, X, fixed=1).branches == ()


def test_a_projection_on_the_stream() -> None:
    def make(b: Builder, x: fx.Node) -> fx.Node:
        return add(b, mlp(b, x), b(aten.linear.default, x, W[4]))

    (branch,) = of(make, X).branches
    assert branch.kind == M
    assert branch.source.op == "placeholder"
    assert branch.stream_in.target is aten.linear.default


def test_a_concatenation_of_streams_is_no_skip() -> None:
    def make(b: Builder, x: fx.Node, c: fx.Node) -> fx.Node:
        for i in (0, 3):
            both = b(aten.cat.default, [c, x], 1)
            x, c = add(b, x, attend(b, x, both, i)), add(b, c, attend(b, c, both, i))
        return mlp(b, b(aten.cat.default, [c, x], 1))

    structure = of(make, X, X)
    assert structure.skips == ()
    assert structure.middle is None


def test_what_does_not_change_has_no_parts() -> None:
    def make(b: Builder, x: fx.Node) -> fx.Node:
        return add(b, x, mlp(b, x))

    structure = of(make, X, fixed=1)
    assert not any((structure.streams, structure.blocks, structure.branches, structure.attentions))


def test_a_scale_in_front_of_a_shift_is_no_gate() -> None:
    def make(b: Builder, x: fx.Node, scale: fx.Node) -> fx.Node:
        scaled = b(aten.mul.Tensor, scale, mlp(b, x))
        return add(b, x, add(b, scaled, scale))

    (branch,) = of(make, X, X, fixed=1).branches
    assert branch.ungated is branch.value


def test_a_gate() -> None:
    def make(b: Builder, x: fx.Node, scale: fx.Node) -> fx.Node:
        return add(b, x, b(aten.mul.Tensor, scale, mlp(b, x)))

    (branch,) = of(make, X, X, fixed=1).branches
    assert (branch.value.name, branch.ungated.name) == ("mul_tensor", "linear_default_1")
