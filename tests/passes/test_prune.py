"""What `prune` removes, in which share, what it leaves alone and why; and what may follow it."""

import operator
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline

import diffopt
from diffopt.cli import output as show
from diffopt.core import Pipeline, Record
from diffopt.engine.engine import build
from diffopt.errors import DiffoptError
from diffopt.ir import graph as g
from diffopt.ir.flops import graph_flops
from diffopt.ir.nodes import args
from diffopt.ir.printing import format_graph
from diffopt.ir.program import Program
from diffopt.transforms import sparsity_2_4
from tests import loops
from tests.command import Run
from tests.passes.build import body, parameter, program, randn
from tests.zoo import traced

aten = torch.ops.aten

X = randn(2, 8)
UP, DOWN = parameter(16, 8), parameter(8, 16, seed=1)


def one(make, *samples) -> Program:
    """Return a program that calls one component once."""
    samples = samples or (X,)
    net = body(make, *samples, name="net")
    return program(lambda b, *xs: b.call("net", *xs), *samples, net=net)


def run(built: Program, step: str) -> tuple[Program, Record]:
    result = Pipeline.parse(step).run(built)
    return result, Record.from_json(result.history[-1])


def prune(built: Program, step: str) -> tuple[Program, Record]:
    return run(built, f"prune({step},components=net)")


def mlp(b, x):
    return b(aten.linear.default, b(aten.silu.default, b(aten.linear.default, x, UP)), DOWN)


# One group


def test_hidden_units() -> None:
    result, record = prune(one(mlp), "mlp,ratio=0.25")
    assert_expected_inline(
        format_graph(result.components["net"]),
        """\
%x: float32[2,8]
%1: float32[12,8] = weight
%2: float32[2,12] = aten.linear(%x, %1)
%3: float32[2,12] = aten.silu(%2)
%4: float32[8,12] = weight_1
%5: float32[2,8] = aten.linear(%3, %4)
return %5""",
    )
    assert record.notes["pruned"] == {"mlp": {"groups": 1, "units": 16, "removed": 4}}
    assert record.notes["parameters"] == {"before": 256, "after": 192}
    assert record.notes["flops"] == {"before": 1024, "after": 768}
    assert not record.exact
    assert record.relative > 0


def test_those_go_that_matter_least() -> None:
    result, _ = prune(one(mlp), "mlp,ratio=0.25")
    kept = (UP.abs().sum(1) + DOWN.abs().sum(0)).argsort(descending=True)[:12].sort().values
    up = g.attribute(result.components["net"], "weight")
    assert torch.equal(up, UP[kept])
    assert isinstance(up, torch.nn.Parameter)


def test_random_importance_depends_on_the_seed() -> None:
    built = one(mlp)

    def weight(seed: int) -> torch.Tensor:
        step = Pipeline.parse("prune(mlp,ratio=0.5,importance=random,components=net)")
        return g.attribute(step.run(built, seed=seed).components["net"], "weight")

    assert torch.equal(weight(0), weight(0))
    assert not torch.equal(weight(0), weight(1))


@pytest.mark.parametrize(
    ("hidden", "options", "left"),
    [
        (16, "ratio=0.3", 11),  # too few to be rounded
        (128, "ratio=0.3", 88),
        (128, "ratio=0.3,round_to=1", 90),
        (128, "ratio=0.3,round_to=16", 96),
        (128, "ratio=0.02,round_to=16", 128),
        (16, "ratio=0", 16),
    ],
)
def test_round_to(hidden: int, options: str, left: int) -> None:
    up, down = parameter(hidden, 8), parameter(8, hidden, seed=1)

    def make(b, x):
        return b(aten.linear.default, b(aten.silu.default, b(aten.linear.default, x, up)), down)

    result, _ = prune(one(make), f"mlp,{options.replace('round_to', 'round-to')}")
    assert len(g.attribute(result.components["net"], "weight")) == left


def test_a_group_norm_loses_whole_groups() -> None:
    inner, outer = parameter(8, 4, 3, 3), parameter(4, 8, 3, 3)

    def make(b, x):
        y = b(aten.conv2d.default, x, inner, None, [1, 1], [1, 1])
        y = b(aten.group_norm.default, y, 4, parameter(8), None, 1e-5)
        return b(aten.conv2d.default, y, outer, None, [1, 1], [1, 1])

    result, _ = prune(one(make, randn(1, 4, 4, 4)), "channels,ratio=0.25")
    (norm,) = result.components["net"].graph.find_nodes(
        op="call_function", target=aten.group_norm.default
    )
    assert norm.args[1] == 3
    assert norm.meta["val"].shape[1] == 6


def test_heads_keep_their_scale() -> None:
    """With one head the width of queries and keys can go, and the scale is that of before."""
    q, k, v = (parameter(8, 8, seed=i) for i in range(3))

    def make(b, x):
        parts = (b(aten.linear.default, x, w) for w in (q, k, v))
        heads = (b(aten.view.default, p, [1, 1, 2, 8]) for p in parts)
        return b(aten.scaled_dot_product_attention.default, *heads)

    result, record = prune(one(make), "channels,ratio=0.25")
    (node,) = result.components["net"].graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    )
    assert node.kwargs == {"scale": 8**-0.5}
    assert record.notes["pruned"] == {"channels": {"groups": 1, "units": 8, "removed": 2}}


def test_what_has_no_labels_is_picked_where_it_is_read() -> None:
    shift = randn(16, seed=3)[None]

    def make(b, x, y):
        hidden = b(aten.add.Tensor, b(aten.linear.default, x, UP), y)
        hidden = b(aten.mul.Tensor, hidden, b.weight(shift))
        return b(aten.linear.default, hidden, DOWN)

    result, _ = prune(one(make, X, randn(2, 16)), "all,ratio=0.25")
    calls = result.components["net"].graph.find_nodes(
        op="call_function", target=aten.index_select.default
    )
    assert [node.meta["val"].shape[1] for node in calls] == [12]
    tables = [t for _, t in g.named_tensors(result.components["net"]) if t.shape[0] == 1]
    assert [list(t.shape) for t in tables] == [[1, 12]]


# Several groups


def two(b, x):
    """Two blocks in a row, the second one with smaller weights, and a layer."""
    y = b(aten.add.Tensor, x, mlp(b, x))
    small = [torch.nn.Parameter(w / 10, requires_grad=False) for w in (UP, DOWN)]
    hidden = b(aten.silu.default, b(aten.linear.default, y, small[0]))
    y = b(aten.add.Tensor, y, b(aten.linear.default, hidden, small[1]))
    return b(aten.linear.default, y, parameter(8, 8, seed=4))


def hidden(result: Program) -> list[int]:
    gm = result.components["net"]
    return [n.meta["val"].shape[1] for n in gm.graph.find_nodes(op="call_function", target=SILU)]


SILU = aten.silu.default


def test_global_compares_units_relative_to_their_group() -> None:
    _, one_each = prune(one(two), "mlp,ratio=0.25")
    result, record = prune(one(two), "mlp,ratio=0.25,scope=global")
    assert one_each.notes["pruned"]["mlp"]["removed"] == 8
    assert record.notes["pruned"]["mlp"]["removed"] == 8
    assert hidden(result) == [12, 12]  # the same weights but for their size


def test_global_takes_from_the_group_with_more_useless_units() -> None:
    up = UP.detach().clone()
    up[:6] /= 100
    uneven = torch.nn.Parameter(up, requires_grad=False)

    def make(b, x):
        y = b(aten.linear.default, b(SILU, b(aten.linear.default, x, uneven)), DOWN)
        hidden = b(SILU, b(aten.linear.default, y, parameter(16, 8, seed=5)))
        return b(aten.linear.default, hidden, parameter(8, 16, seed=6))

    result, record = prune(one(make), "mlp,ratio=0.25,scope=global")
    assert record.notes["pruned"] == {"mlp": {"groups": 3, "units": 40, "removed": 10}}
    assert hidden(result)[0] < hidden(result)[1]


def test_ratios_and_skip_by_pattern() -> None:
    built = one(two)
    names = ["linear_default", "linear_default_2"]
    result, _ = prune(built, f"mlp,ratio=0.25,ratios={names[0]}:0.5,{names[1]}:0")
    assert hidden(result) == [8, 16]
    result, record = prune(built, f"mlp,ratio=0.25,skip=net.{names[0]}")
    assert hidden(result) == [16, 12]
    assert f"net.{names[0]}: layers and skip leave it alone" in record.skipped
    result, _ = prune(built, f"mlp,ratio=0.25,layers={names[0]}")
    assert hidden(result) == [12, 16]


def test_shared_weights_stay_shared() -> None:
    net, other = (body(mlp, X, name=n) for n in ("net", "other"))

    def root(b, x):
        return b.call("other", *b.call("net", x))

    built = program(root, X, net=net, other=other)
    result, _ = run(built, "prune(mlp,ratio=0.25,components=all)")
    assert len(result.weights()) == 2
    assert {tuple(t.shape) for t in result.weights().values()} == {(12, 8), (8, 12)}
    with pytest.raises(DiffoptError, match="there are no mlp to prune in net"):
        prune(built, "mlp")  # `other` would lose them as well


# Shares by measurement


def uneven(b, x):
    """Two blocks in a row: what the second one makes with large weights adds nothing."""
    y = b(aten.add.Tensor, x, mlp(b, x))
    large, nothing = (torch.nn.Parameter(w * k, requires_grad=False) for w, k in LARGE)
    hidden = b(SILU, b(aten.linear.default, y, large))
    y = b(aten.add.Tensor, y, b(aten.linear.default, hidden, nothing))
    return b(aten.linear.default, y, parameter(8, 8, seed=4))


LARGE = ((UP, 10), (DOWN, 0))


def test_auto_takes_what_adds_nothing_first() -> None:
    result, record = prune(one(uneven), "auto,flops=0.7")
    assert hidden(result) == [16, 4]
    assert record.relative < 1e-6
    assert record.notes["auto"] == {
        "flops": {"before": 2304, "after": 1536},
        "predicted error": 0,
        "measured error": 0,
    }
    rows = record.notes["groups"]
    assert rows[-1] == {
        "group": "net.linear_default_2",
        "kind": "mlp",
        "units": 16,
        "removed": 12,
        "flops saved": 768 / 2304,
        "error": 0,
    }
    assert [row["removed"] for row in rows] == [0, 0, 12]
    tried = [row["removed"] for row in record.notes["sensitivity"]]
    assert tried == [2, 4, 6, 8, 12, 1, 2, 3, 4, 6, 2, 4, 6, 8, 12]
    assert "net.linear_default: others cost less to remove" in record.skipped
    _, even = prune(one(uneven), "mlp,ratio=0.375")
    assert even.after.flops == record.after.flops
    assert even.relative > 0.1


def test_auto_reports_a_table(capsys) -> None:
    _, record = prune(one(uneven), "auto,flops=0.7")
    show.records_table([record], timing=False, stats=True)
    lines = capsys.readouterr().out.splitlines()
    at = next(k for k, line in enumerate(lines) if line.rstrip().endswith(": groups"))
    (row,) = [line for line in lines[at : at + 7] if "net.linear_default_2" in line]
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == ["net.linear_default_2", "mlp", "16", "12", "0.333", "0"]


def test_inspect_reports_it_too(diffopt: Run, tmp_path: Path) -> None:
    pruned, _ = prune(one(uneven), "auto,flops=0.7")
    pruned.save(tmp_path / "x.program")
    assert "sensitivity" not in diffopt("inspect", tmp_path / "x.program").out
    text = diffopt("inspect", tmp_path / "x.program", "--stats").out
    assert ": sensitivity" in text
    assert "'predicted error'" in text


def test_auto_takes_no_more_than_it_has_to() -> None:
    result, record = prune(one(uneven), "auto,flops=0.95")
    assert hidden(result) == [16, 14]
    assert record.after.flops <= 0.95 * record.before.flops


def test_auto_takes_no_more_of_a_group_than_it_may() -> None:
    result, record = prune(one(uneven), "auto,flops=0.7,most=0.5")
    assert all(row["removed"] <= row["units"] / 2 for row in record.notes["sensitivity"])
    assert hidden(result)[-1] >= 8
    with pytest.raises(DiffoptError, match=r"with up to 0.25 of each .*ask for that"):
        prune(one(uneven), "auto,flops=0.5,most=0.25")


@pytest.mark.parametrize("what", ["dims,ratio=0.25", "(auto,dims),flops=0.8"])
def test_what_is_in_heads(what: str) -> None:
    """All heads stay, each with fewer dimensions, and attention keeps its scale."""
    before = traced("dit")
    pruned, record = run(before, f"prune({what})")
    pruned_args, original_args = (
        [args(n) for gm in program.components.values() for n in attentions(gm)]
        for program in (pruned, before)
    )
    assert record.notes["pruned"]["dims"]["removed"] > 0
    assert "heads" not in record.notes["pruned"]
    shapes = [[x.meta["val"].shape for x in row[:3]] for row in pruned_args]
    assert any(
        q[-1] < x[0].meta["val"].shape[-1]
        for (q, _, _), x in zip(shapes, original_args, strict=True)
    )
    for (q, k, v), row in zip(shapes, original_args, strict=True):
        assert q[-1] == k[-1]
        assert (q[1], k[1], v[1]) == tuple(x.meta["val"].shape[1] for x in row[:3])


def attentions(gm: torch.fx.GraphModule) -> list[torch.fx.Node]:
    target = aten.scaled_dot_product_attention.default
    return gm.graph.find_nodes(op="call_function", target=target)


def test_auto_leaves_alone_what_is_skipped() -> None:
    result, _ = prune(one(uneven), "auto,flops=0.8,skip=linear_default_2")
    assert hidden(result)[0] < 16
    assert hidden(result)[1] == 16


@pytest.mark.parametrize(
    ("name", "denoiser", "options"),
    [
        ("sd", "unet", "layers=(*mid_block*,*up_blocks.1*,*time_emb*)"),
        ("dit", "transformer", "importance=taylor"),
    ],
)
def test_auto_of_the_zoo(name: str, denoiser: str, options: str) -> None:
    built = traced(name)
    result, record = run(built, f"prune(auto,flops=0.8,{options})")
    before, after = (
        len(p.calls(denoiser)) * graph_flops(p.components[denoiser]) for p in (built, result)
    )
    assert 0.7 * before < after <= 0.8 * before
    note = record.notes["auto"]
    assert note["flops"] == {"before": before, "after": after}
    assert 0 < note["predicted error"] < 3 * note["measured error"]
    rows = record.notes["groups"]
    assert sum(row["error"] ** 2 for row in rows) == pytest.approx(note["predicted error"] ** 2)
    assert sum(row["removed"] for row in rows) == sum(
        kind["removed"] for kind in record.notes["pruned"].values()
    )
    assert all(bool(t.isfinite().all()) for t in result.run(result.sample))


# Left alone


def test_results_of_a_component_stay() -> None:
    _, record = prune(one(mlp), "mlp,ratio=0.25")
    assert record.skipped == ["net.linear_default_1: a result of its component"]
    assert record.notes["left alone"] == {"a result of its component": 1}


def test_an_operator_without_a_rule_keeps_what_it_reads() -> None:
    def make(b, x):
        first = b(aten.linear.default, x, parameter(8, 8, seed=2))
        return mlp(b, b(operator.getitem, b(aten.sort.default, first), 0))

    net = one(make)
    _, record = prune(net, "all,ratio=0.25")
    assert "net.linear_default: aten.sort has no rule" in record.skipped


# Blocks


def test_blocks_that_matter_least_go() -> None:
    result, record = prune(one(two), "blocks,ratio=0.5")
    assert len(hidden(result)) == 1
    assert record.notes["blocks"] == {"of": 2, "removed": ["net.add_tensor_1"]}
    expected = X + torch.nn.functional.silu(X @ UP.T) @ DOWN.T
    torch.testing.assert_close(result.run([X])[0], expected @ parameter(8, 8, seed=4).T)


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_blocks_of_the_zoo(name: str) -> None:
    result, record = run(traced(name), "prune(blocks,ratio=0.5)")
    assert len(record.notes["blocks"]["removed"]) == record.notes["blocks"]["of"] // 2
    assert record.after.flops < 0.85 * record.before.flops
    assert all(bool(t.isfinite().all()) for t in result.run(result.sample))


# Wrong


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("prune(ratio=1)", "prune has ratio=1; write a share from 0 to below 1"),
        ("prune(ratio=-0.1)", "prune has ratio=-0.1; write a share from 0 to below 1"),
        ("prune(what=())", "prune wants channels, heads, mlp, blocks or 2:4: name at least one"),
        ("prune(round-to=0)", "prune wants round-to and samples to be 1 or more"),
        (
            "prune(ratios=*.ff.*)",
            "prune has ratios=*.ff.*; write a pattern and a share from 0 to below 1, as *.ff.*:0.5",
        ),
        (
            "prune(ratios=*.ff.*:2)",
            "prune has ratios=*.ff.*:2; write a pattern and a share from 0 to below 1, as "
            "*.ff.*:0.5",
        ),
        (
            "prune((dims,heads))",
            "prune(dims) lets heads stay, and takes of all of them alike: leave heads and all out,"
            " as in prune((channels,mlp,dims))",
        ),
        ("prune(mlp,flops=0.5)", "prune has flops=0.5 without auto: write prune(auto,flops=0.7)"),
        ("prune(mlp,most=0.5)", "prune has most=0.5 without auto: write prune(auto,flops=0.7)"),
        (
            "prune(auto,flops=0.5,most=0.1)",
            "prune has most=0.1; write the largest share that a group may lose, from 0.125 to"
            " below 1",
        ),
        (
            "prune((auto,blocks),flops=0.5)",
            "prune(auto) takes channels, heads and mlp by itself: write auto alone, or (auto,dims)",
        ),
        (
            "prune(auto)",
            "prune(auto) wants the part of the FLOPs to leave: write prune(auto,flops=0.7)",
        ),
        (
            "prune(auto,flops=1)",
            "prune has flops=1; write the part to leave, between 0 and 1",
        ),
        (
            "prune(auto,flops=0.5,ratio=0.2)",
            "prune(auto) chooses the shares itself: leave ratio, ratios and scope out",
        ),
        (
            "prune(blocks,ratios=net:0.5)",
            "prune(blocks) knows no ratios: these are of channels, heads, dims and mlp",
        ),
        (
            "prune((blocks,2:4),scope=global)",
            "prune(blocks and 2:4) knows no scope: these are of channels, heads, dims and mlp",
        ),
        ("prune(2:4,ratio=0.6)", "prune(2:4) knows no ratio: two of four weights go, always"),
        (
            "prune(mlp,budget=-1)",
            "prune has budget=-1; write the largest relative error, as 0.02",
        ),
    ],
)
def test_wrong_options(step: str, message: str) -> None:
    with pytest.raises(DiffoptError) as caught:
        Pipeline.parse(step)
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "mlp,ratio=0.98",
            "net.linear_default would vanish: 0.98 of its 16 units is all of them; ask for less, "
            "or skip it",
        ),
        ("heads", "there are no heads to prune in net (a result of its component)"),
        ("mlp,skip=*", "there are no mlp to prune in net (layers and skip leave it alone)"),
        (
            "mlp,skip=linear_defalt",
            "no layer of net matches 'linear_defalt'; did you mean 'linear_default'?",
        ),
        (
            "mlp,ratios=linear_defalt:0.5",
            "no layer of net matches 'linear_defalt'; did you mean 'linear_default'?",
        ),
        ("blocks,ratio=0.9", "there are no residual blocks to prune in net"),
        (
            "auto,flops=0.2",
            "flops=0.2 cannot be reached in net: with up to 0.75 of each group gone, 0.25 of their"
            " FLOPs are left; ask for that or more",
        ),
    ],
)
def test_nothing_that_can_be_done(options: str, message: str) -> None:
    with pytest.raises(DiffoptError) as caught:
        prune(one(mlp), options)
    assert str(caught.value) == message


def test_all_blocks() -> None:
    with pytest.raises(DiffoptError, match="of 2 blocks is all of them; ask for less"):
        prune(one(two), "blocks,ratio=0.9")


def test_quantized_programs_are_refused() -> None:
    quantized = Pipeline.parse("quantize(int8,activations=dynamic)").run(loops.program())
    with pytest.raises(DiffoptError) as caught:
        run(quantized, "prune(all)")
    assert str(caught.value) == (
        "prune finds quantized values in denoiser: write prune before quantize"
    )


def test_almost_all_of_a_large_group() -> None:
    """Where a group is rounded, that decides how many are left."""
    wide = parameter(64, 8), parameter(8, 64, seed=1)

    def make(b, x):
        return b(aten.linear.default, b(aten.linear.default, x, wide[0]), wide[1])

    result, _ = prune(one(make), "mlp,ratio=0.995")
    assert [list(t.shape) for t in result.weights().values()] == [[8, 8], [8, 8]]


def test_a_slice_keeps_one_of_its_units() -> None:
    small = parameter(16, 8)
    with torch.no_grad():
        small[:2] *= 0.01

    def make(b, x):
        x = b(aten.linear.default, x, small)
        first = b(aten.mean.dim, b(aten.slice.Tensor, x, 1, 0, 2), [1], True)
        return b(aten.linear.default, b(aten.mul.Tensor, x, first), DOWN)

    result, record = prune(one(make), "mlp,ratio=0.5")
    assert record.notes["pruned"]["mlp"] == {"groups": 1, "units": 16, "removed": 8}
    (got,) = result.run(result.sample_inputs())
    assert bool(got.isfinite().all())


def test_a_slice_of_two_groups_that_would_vanish() -> None:
    """Each keeps some; what is read of both is removed."""
    pair = [parameter(8, 8, seed=i) for i in range(2)]
    with torch.no_grad():
        pair[0][7] *= 0
        pair[1][0] *= 0

    def make(b, x):
        both = b(aten.cat.default, [b(aten.linear.default, x, w) for w in pair], 1)
        between = b(aten.mean.dim, b(aten.slice.Tensor, both, 1, 7, 9), [1], True)
        return b(aten.linear.default, b(aten.mul.Tensor, both, between), DOWN)

    with pytest.raises(DiffoptError) as caught:
        prune(one(make), "mlp,ratio=0.125")
    assert str(caught.value) == (
        "nothing would be left of slice_tensor, which reads some of the channels of several"
        " layers: ask for less, or skip one of these"
    )


def test_a_layer_of_another_component_goes_with_it() -> None:
    net = body(mlp, X, name="net")
    other = body(mlp, X, name="other")
    built = program(lambda b, x: b.call("net", *b.call("other", x)), X, net=net, other=other)
    with pytest.raises(DiffoptError) as caught:
        prune(built, "mlp")
    assert str(caught.value) == (
        "there are no mlp to prune in net (a layer of another component goes with it)"
    )


def test_a_weight_that_is_computed_says_so() -> None:
    def make(b, x):
        twice = b(aten.mul.Tensor, b.weight(parameter(8, 8, seed=2)), 2)
        return mlp(b, b(aten.linear.default, x, twice))

    _, record = prune(one(make), "all,ratio=0.25")
    assert "net.linear_default: its weight is computed" in record.skipped


@pytest.mark.parametrize("kind", ["type", "shape"])
def test_blocks_whose_stream_is_no_sum(kind: str) -> None:
    def make(b, x):
        if kind == "type":
            x = b(aten._to_copy.default, x, dtype=torch.bfloat16)
        wide = b(aten.unsqueeze.default, b(aten._to_copy.default, x, dtype=torch.float32), 0)
        branch = b(aten.linear.default, b(aten.linear.default, wide, UP), DOWN)
        if kind == "shape":
            branch = b(aten.expand.default, branch, [3, 2, 8])
        stream = x if kind == "shape" else b(aten.unsqueeze.default, x, 0)
        return b(aten.silu.default, b(aten.add.Tensor, stream, branch))

    with pytest.raises(DiffoptError) as caught:
        prune(one(make), "blocks,ratio=0.5")
    assert str(caught.value) == (
        "there are no residual blocks to prune in net"
        " (its stream has another shape or type than the sum)"
    )


# With others

ORDERS = [
    "prune(all),unroll,hoist,simplify,fuse",
    "unroll,prune(all),hoist,fuse,cast(bf16)",
    "unroll,hoist,simplify,fuse,prune(mlp)",
    "unroll,prune((dims,mlp)),hoist,simplify,fuse",
    "prune(all),unroll,hoist,cache(fora),fuse",
    "prune((blocks,all)),unroll,hoist,quantize(int8,activations=dynamic)",
    "unroll,low-rank(rank=0.5),prune(mlp),merge-tokens(ratio=0.25),hoist,simplify,fuse",
    "unroll,prune(all),recover(steps=2,samples=2),hoist,cache(fora),simplify,fuse,quantize(int8)",
]


@pytest.mark.parametrize("name", ["sd", "dit"])
@pytest.mark.parametrize("text", ORDERS)
def test_with_other_passes(name: str, text: str) -> None:
    """Every pass is checked by itself as it runs; what they make together has finite results."""
    built = traced(name)
    result = Pipeline.parse(text).run(built)
    assert all(bool(t.isfinite().all()) for t in result.run(result.sample))
    (pruned,) = [r for row in result.history if (r := Record.from_json(row)).text[:5] == "prune"]
    assert pruned.after.flops < pruned.before.flops
    assert pruned.after.parameters < pruned.before.parameters


def test_a_saved_program_is_the_same(tmp_path) -> None:
    result, _ = run(traced("sd"), "prune(all)")
    result.save(tmp_path / "x.program")
    loaded = Program.load(tmp_path / "x.program")
    assert all(map(torch.equal, loaded.run(loaded.sample), result.run(result.sample)))


def layers_of_all_kinds(b, x):
    """Convolve pixels around a norm, then attend and transform in a stream of tokens."""
    y = b(aten.conv2d.default, x, parameter(16, 4, 3, 3), None, [1, 1], [1, 1])
    y = b(aten.silu.default, b(aten.group_norm.default, y, 4, parameter(16), None, 1e-5))
    y = b(aten.conv2d.default, y, parameter(8, 16, 3, 3), None, [1, 1], [1, 1])
    stream = b(aten.transpose.int, b(aten.flatten.using_ints, y, 2), 1, 2)
    parts = (b(aten.linear.default, stream, parameter(8, 8, seed=i)) for i in range(3))
    heads = (b(aten.view.default, part, [1, 16, 4, 2]) for part in parts)
    heads = (b(aten.transpose.int, part, 1, 2) for part in heads)
    y = b(aten.transpose.int, b(aten.scaled_dot_product_attention.default, *heads), 1, 2)
    y = b(aten.linear.default, b(aten.reshape.default, y, [1, 16, 8]), parameter(8, 8, seed=3))
    stream = b(aten.add.Tensor, stream, y)
    return b(aten.add.Tensor, stream, mlp(b, stream))


def test_engines_agree(tmp_path) -> None:
    result, record = prune(one(layers_of_all_kinds, randn(1, 4, 4, 4)), "all,ratio=0.5")
    assert {kind: row["groups"] for kind, row in record.notes["pruned"].items()} == {
        "channels": 1,
        "heads": 1,
        "mlp": 1,
    }
    engine = build(result, "cpu", tmp_path / "x.engine")
    for got, expected in zip(engine.run(result.sample), result.run(result.sample), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


# 2:4


def test_2_4_sparse_weights() -> None:
    result, record = prune(one(mlp), "2:4")
    tensors = dict(g.named_tensors(result.components["net"]))
    assert all(map(sparsity_2_4.is_2_4, tensors.values()))
    assert record.notes["2:4"] == {"layers": 2, "parameters": 256}
    up = next(t for t in tensors.values() if t.shape == UP.shape)
    assert torch.equal(up, UP * sparsity_2_4.mask_2_4(UP))


def test_2_4_after_smaller_weights() -> None:
    result, _ = prune(one(mlp), "(mlp,2:4),ratio=0.25")
    tensors = [tensor for _, tensor in g.named_tensors(result.components["net"])]
    assert sorted(map(list, (t.shape for t in tensors))) == [[8, 12], [12, 8]]
    assert all(map(sparsity_2_4.is_2_4, tensors))


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_2_4_of_whole_pipelines(name: str, tmp_path: Path) -> None:
    result, record = run(traced(name), "prune(2:4)")
    assert record.notes["2:4"]["layers"] > 5
    assert record.notes["parameters"]["before"] == record.notes["parameters"]["after"]
    assert "it is the first or the last of the denoiser" in str(record.skipped)
    with pytest.raises(DiffoptError, match="is 2:4 sparse, and cpu has no 2:4 sparse products"):
        diffopt.write(result, "cpu", tmp_path / "x.engine")


def test_2_4_of_nothing() -> None:
    def make(b, x):
        return b(aten.linear.default, x, parameter(8, 6))

    with pytest.raises(DiffoptError, match="there are no layers to make 2:4 sparse in net"):
        prune(one(make, randn(2, 6)), "2:4")
    with pytest.raises(DiffoptError, match="no layer of net matches 'nothing'"):
        prune(one(mlp), "2:4,skip=nothing")
