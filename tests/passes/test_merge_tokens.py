"""Tokens that are merged in front of attention, against a merge that is written as loops."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from diffopt.core import Pipeline, Record
from diffopt.core.equivalence import difference
from diffopt.engine import engine
from diffopt.errors import DiffoptError
from diffopt.ir.program import Program
from diffopt.transforms import token_merging
from tests.passes.build import Builder, body, parameter, program, randn
from tests.zoo import traced

aten = torch.ops.aten

HEADS, WIDTH = 2, 8
WEIGHTS = [parameter(WIDTH, WIDTH, seed=10 + i) for i in range(4)]


def heads(at: Builder, x: fx.Node, weight: Tensor) -> fx.Node:
    y = at(aten.linear.default, x, weight)
    batch, count, width = y.meta["val"].shape
    y = at(aten.view.default, y, [batch, count, HEADS, width // HEADS])
    return at(aten.transpose.int, y, 1, 2)


def project(at: Builder, y: fx.Node) -> fx.Node:
    batch, _, count, _ = y.meta["val"].shape
    y = at(aten.transpose.int, y, 1, 2)
    y = at(aten.reshape.default, y, [batch, count, WIDTH])
    return at(aten.linear.default, y, WEIGHTS[3], parameter(WIDTH, seed=20))


def attention(at: Builder, x: fx.Node, *more: Any) -> fx.Node:
    """Attend to oneself; `more` are further arguments of the operator."""
    q, k, v = (heads(at, x, weight) for weight in WEIGHTS[:3])
    return project(at, at(aten.scaled_dot_product_attention.default, q, k, v, *more))


def net(make: Any, *samples: Tensor) -> Program:
    """Return a program that calls one component."""
    inner = body(make, *samples)
    return program(lambda at, *x: at.call("net", *x)[0], *samples, net=inner)


def picture(at: Builder, x: fx.Node) -> fx.Node:
    """See the pixels of a picture as tokens, and attend."""
    batch, width, high, wide = x.meta["val"].shape
    flat = at(aten.view.default, x, [batch, width, high * wide])
    x = at(aten.transpose.int, flat, 1, 2)
    return at(aten.add.Tensor, x, attention(at, at(aten.layer_norm.default, x, [WIDTH])))


def run(text: str, model: Program, **more: Any) -> tuple[Program, Record]:
    result = Pipeline.parse(text).run(model, **more)
    return result, Record.from_json(result.history[-1])


def only(program: Program) -> Tensor:
    return program.run(program.sample)[0]


# Against loops


def merged(x: Tensor, into: list[int], count: int) -> tuple[Tensor, list[int]]:
    """Return the tokens of one picture that are left, and which one each token has become."""
    unit = x / x.norm(dim=1, keepdim=True)
    best = {}
    for i in set(range(len(x))) - set(into):
        scores = [float(unit[i] @ unit[j]) for j in into]
        best[i] = (max(scores), into[scores.index(max(scores))])
    sources = sorted(best, key=lambda i: -best[i][0])[:count]
    target = [best[i][1] if i in sources else i for i in range(len(x))]
    left = sorted(set(range(len(x))) - set(sources))
    groups = [[i for i in range(len(x)) if target[i] == j] for j in left]
    return torch.stack([x[group].mean(0) for group in groups]), [left.index(j) for j in target]


def attended(queries: Tensor, keys: Tensor) -> Tensor:
    q, k, v = (
        (x @ w.T).view(1, len(x), HEADS, -1).transpose(1, 2)
        for x, w in zip((queries, keys, keys), WEIGHTS[:3], strict=True)
    )
    y = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1) @ v
    return y.transpose(1, 2).reshape(len(queries), WIDTH) @ WEIGHTS[3].T + parameter(WIDTH, seed=20)


@pytest.mark.parametrize("which", ["all", "keys"])
@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 16), (6, 2)])
def test_it_does_what_loops_do(size: tuple[int, int], which: str) -> None:
    model = net(picture, randn(2, WIDTH, *size))
    result, _ = run(f"merge-tokens(ratio=0.4,merge={which},choice=regular)", model)
    grid = size if size[0] > 1 else (size[1],)
    into = token_merging.destinations(grid, None).tolist()
    count = int(0.4 * size[0] * size[1])
    rows = []
    for x in model.sample[0].flatten(2).transpose(1, 2):
        normed = torch.nn.functional.layer_norm(x, [WIDTH])
        left, where = merged(normed, into, count)
        y = attended(left, left)[where] if which == "all" else attended(normed, left)
        rows.append(x + y)
    torch.testing.assert_close(only(result), torch.stack(rows), rtol=1e-5, atol=1e-5)


def test_tokens_that_are_equal_are_merged_without_error() -> None:
    squares = randn(2, WIDTH, 3, 3).repeat_interleave(2, 2).repeat_interleave(2, 3)
    _, record = run("merge-tokens(ratio=0.75)", net(picture, squares))
    assert list(record.notes["merged"].values()) == ["6 x 6 tokens, 9 left"]
    assert record.changed
    assert record.max_abs < 1e-5  # the means of four equal numbers, and softmax over fewer


def test_destinations() -> None:
    assert token_merging.destinations((4, 4), None).tolist() == [0, 2, 8, 10]
    assert token_merging.destinations((3, 5), None).tolist() == [0, 2, 4, 10, 12, 14]
    assert token_merging.destinations((2, 2, 4), None).tolist() == [0, 2, 8, 10]
    assert token_merging.destinations((9,), None).tolist() == [0, 4, 8]
    seeded = [torch.Generator().manual_seed(s) for s in (1, 1, 2)]
    one, again, other = (token_merging.destinations((8, 8), s).tolist() for s in seeded)
    assert one == again != other
    cells = {(i // 8 // 2, i % 8 // 2) for i in one}
    assert len(one) == len(cells) == 16, "one in each square"


@pytest.mark.parametrize(("grid", "ratio", "count"), [((4, 4), 0.5, 8), ((3, 5), 0.75, 9)])
def test_how_many_go(grid: tuple[int, ...], ratio: float, count: int) -> None:
    assert token_merging.merged_count(grid, ratio) == count


# Where it does nothing


def skipped(make: Any, *samples: Tensor, options: str = "") -> list[str]:
    _, record = run(f"merge-tokens{options}", net(make, *samples))
    assert not record.changed
    return [text.partition(": ")[2] for text in record.skipped]


X, TEXT = randn(2, 16, WIDTH), randn(2, 6, WIDTH, seed=1)
JOINED = "tokens from several places are joined in it"
MASKED = "it has a mask, which says which tokens see which"


def test_masked_attention_stays() -> None:
    mask = torch.zeros(16, 16)
    assert skipped(lambda at, x: attention(at, x, mask), X) == [MASKED]
    assert skipped(lambda at, x: attention(at, x, None, 0.0, True), X) == [MASKED]


def test_cross_attention_stays() -> None:
    def make(at: Builder, x: fx.Node, text: fx.Node) -> fx.Node:
        q, k, v = (heads(at, n, w) for n, w in zip((x, text, text), WEIGHTS, strict=False))
        return project(at, at(aten.scaled_dot_product_attention.default, q, k, v))

    assert skipped(make, X, TEXT) == ["it is cross attention"]


def test_cross_attention_whose_keys_were_hoisted_stays() -> None:
    def make(at: Builder, x: fx.Node, k: fx.Node) -> fx.Node:
        q = heads(at, x, WEIGHTS[0])
        return project(at, at(aten.scaled_dot_product_attention.default, q, k, k))

    assert skipped(make, X, randn(2, HEADS, 6, 4)) == ["it is cross attention"]


def test_joint_attention_stays() -> None:
    def make(at: Builder, x: fx.Node, text: fx.Node) -> fx.Node:
        both = [at(aten.cat.default, [heads(at, text, w), heads(at, x, w)], 2) for w in WEIGHTS[:3]]
        return project(at, at(aten.scaled_dot_product_attention.default, *both))

    assert skipped(make, X, TEXT) == [JOINED]


def test_keys_that_hoisted_ones_are_joined_to_stay() -> None:
    def make(at: Builder, x: fx.Node, more: fx.Node) -> fx.Node:
        q, k, v = (heads(at, x, w) for w in WEIGHTS[:3])
        k, v = (at(aten.cat.default, [more, n], 2) for n in (k, v))
        return project(at, at(aten.scaled_dot_product_attention.default, q, k, v))

    assert skipped(make, X, randn(2, HEADS, 6, 4)) == [JOINED]


def test_part_of_the_tokens_stays() -> None:
    def make(at: Builder, x: fx.Node) -> fx.Node:
        q, k, v = (heads(at, x, w) for w in WEIGHTS[:3])
        k, v = (at(aten.slice.Tensor, n, 2, 0, 8) for n in (k, v))
        return project(at, at(aten.scaled_dot_product_attention.default, q, k, v))

    assert skipped(make, X) == ["some of its tokens are treated in another way"]


def test_rotary_positions_stay() -> None:
    def make(at: Builder, x: fx.Node) -> fx.Node:
        q, k, v = (heads(at, x, w) for w in WEIGHTS[:3])
        q, k = (at(aten.mul.Tensor, n, randn(16, 4)) for n in (q, k))
        return project(at, at(aten.scaled_dot_product_attention.default, q, k, v))

    reason = "aten.mul.Tensor gives each token something of its own (a position)"
    assert skipped(make, X) == [reason]


def test_positions_in_front_of_the_projections_do_not_matter() -> None:
    model = net(lambda at, x: attention(at, at(aten.add.Tensor, x, randn(16, WIDTH))), X)
    assert run("merge-tokens", model)[1].changed


def test_projections_that_others_read_stay() -> None:
    def make(at: Builder, x: fx.Node) -> list[fx.Node]:
        q, k, v = (heads(at, x, w) for w in WEIGHTS[:3])
        return [project(at, at(aten.scaled_dot_product_attention.default, q, k, v)), v]

    assert skipped(make, X) == ["its projections are read elsewhere as well"]


def test_a_sum_over_tokens_stays() -> None:
    def make(at: Builder, x: fx.Node) -> fx.Node:
        q, k, v = (heads(at, x, w) for w in WEIGHTS[:3])
        k = at(aten.softmax.int, k, 2)
        return project(at, at(aten.scaled_dot_product_attention.default, q, k, v))

    assert skipped(make, X) == ["aten.softmax.int is between the projections"]


def test_a_norm_over_tokens_stays() -> None:
    def make(at: Builder, x: fx.Node) -> fx.Node:
        q, k, v = (heads(at, x, w) for w in WEIGHTS[:3])
        k = at(aten.layer_norm.default, k, [16, WIDTH // HEADS])
        return project(at, at(aten.scaled_dot_product_attention.default, q, k, v))

    assert skipped(make, X) == ["aten.layer_norm is between the projections"]


def test_a_result_that_is_not_projected_stays() -> None:
    def make(at: Builder, x: fx.Node) -> fx.Node:
        q, k, v = (heads(at, x, w) for w in WEIGHTS[:3])
        y = at(aten.scaled_dot_product_attention.default, q, k, v)
        return at(aten.add.Tensor, y, at(aten.tanh.default, y))

    assert skipped(make, X) == ["its result is read in several places before it is projected"]


def test_few_tokens_stay() -> None:
    assert skipped(attention, X, options="(tokens=17)") == ["it has 16 tokens, too few"]
    assert skipped(attention, X, options="(ratio=0.05)") == ["it has 16 tokens, too few"]
    assert skipped(attention, X, options="(ratio=0)") == []


def two(at: Builder, x: fx.Node, y: fx.Node) -> list[fx.Node]:
    return [attention(at, x), attention(at, y)]


def test_only_the_largest_numbers_of_tokens() -> None:
    model = net(two, X, TEXT)
    assert list(run("merge-tokens", model)[1].notes["merged"].values()) == ["16 tokens, 8 left"]
    assert len(run("merge-tokens(levels=2)", model)[1].notes["merged"]) == 2
    assert len(run("merge-tokens(levels=0)", model)[1].notes["merged"]) == 2
    only_one = run("merge-tokens(levels=0,skip=*_1)", model)[1].notes["merged"]
    assert list(only_one) == ["net.scaled_dot_product_attention_default"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "merge-tokens(ratio=0.8)",
            "merge-tokens has ratio=0.8; write a number from 0 to 0.75: one token in 4 is what"
            " others are merged into",
        ),
        ("merge-tokens(levels=-1)", "merge-tokens wants levels and tokens to be 0 or more"),
        (
            "merge-tokens(layers=nothing)",
            "no attention of net matches 'nothing'; there are scaled_dot_product_attention_default",
        ),
        ("merge-tokens(components=other)", "there is no component 'other'; there are net"),
    ],
)
def test_bad_input(text: str, message: str) -> None:
    with pytest.raises(DiffoptError) as error:
        run(text, net(attention, X))
    assert error.value.message == message


# On pipelines, and beside other passes


@cache
def unrolled(name: str) -> Program:
    return Pipeline.parse("unroll,hoist,simplify").run(traced(name, num_inference_steps=4))


NAMES = ("sd", "dit")
COUNT = {"sd": 4, "dit": 2}


@pytest.mark.parametrize("name", NAMES)
def test_self_attention_of_a_unet_and_of_a_transformer(name: str) -> None:
    result, record = run("merge-tokens", unrolled(name))
    assert list(record.notes["merged"].values()) == ["4 x 4 tokens, 8 left"] * COUNT[name]
    reasons = {text.partition(": ")[2] for text in record.skipped}
    assert reasons == ({"it is cross attention"} if name == "sd" else set())
    assert 1e-4 < record.relative < 0.05
    assert record.after.flops < record.before.flops
    _, again = run("merge-tokens", result)
    assert not again.changed
    assert any("its tokens are merged already" in text for text in again.skipped)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_exact_passes_does_not_matter(name: str) -> None:
    early = Pipeline.parse("merge-tokens,unroll,hoist,simplify,fuse").run(
        traced(name, num_inference_steps=4)
    )
    late, _ = run("merge-tokens", unrolled(name))
    assert early.history[0]["relative"] > 1e-4
    # Sums change their order; which tokens are drawn does not.
    assert difference([only(early)], [only(late)])[1] < 1e-4
    fused = Pipeline.parse("fuse,merge-tokens").run(unrolled(name))
    assert len(fused.history[-1]["notes"]["merged"]) == COUNT[name]


def test_keys_alone_want_projections_of_their_own() -> None:
    result = Pipeline.parse("fuse,merge-tokens(merge=keys)").run(unrolled("dit"))
    record = Record.from_json(result.history[-1])
    assert not record.changed
    reason = "one layer projects queries and keys: run merge-tokens before fuse"
    assert {text.partition(": ")[2] for text in record.skipped} == {reason}
    assert run("merge-tokens(merge=keys)", unrolled("dit"))[1].changed


@pytest.mark.parametrize("name", NAMES)
def test_beside_other_passes(name: str) -> None:
    text = "merge-tokens,cache(fora,interval=2),quantize(int8,samples=1),cast(bf16)"
    result = Pipeline.parse(text).run(unrolled(name))
    records = [Record.from_json(row) for row in result.history[-4:]]
    assert all(record.changed for record in records)
    assert max(record.relative for record in records) < 0.1


def test_several_requests_a_run() -> None:
    batched = Pipeline.parse("merge-tokens,batch(max=2)").run(unrolled("dit"))
    assert batched.batch


def test_in_16_bits_and_behind_quantize() -> None:
    _, record = run("cast(bf16),merge-tokens", unrolled("dit"))
    assert len(record.notes["merged"]) == 2
    _, record = run("quantize(int8,samples=1),merge-tokens", unrolled("dit"))
    reason = "its layers are quantized: run merge-tokens before quantize"
    assert {text.partition(": ")[2] for text in record.skipped} == {reason}
    assert not record.changed


def test_seeds_choose_other_tokens() -> None:
    one, again = (run("merge-tokens", unrolled("dit"))[0] for _ in range(2))
    other = run("merge-tokens", unrolled("dit"), seed=1)[0]
    assert torch.equal(only(one), only(again))
    assert not torch.equal(only(one), only(other))


@pytest.mark.parametrize("target", ["cpu(threads=1)", "onnxruntime"])
def test_engines(target: str, tmp_path: Path) -> None:
    if target == "onnxruntime":
        pytest.importorskip("onnxruntime")
    reduced, _ = run("merge-tokens", net(picture, randn(2, WIDTH, 4, 6)))
    path = tmp_path / "out.engine"
    engine.build(reduced, target, path)
    got = engine.load(path).run(reduced.sample)
    torch.testing.assert_close(got[0], only(reduced), rtol=1e-5, atol=1e-5)
    reduced.save(tmp_path / "out.program")
    assert torch.equal(only(Program.load(tmp_path / "out.program")), only(reduced))
