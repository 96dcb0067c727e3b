"""Tags: every call knows its component, step and branch, and nonsense is refused."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import fx

from diffopt.core import Context, Pipeline
from diffopt.errors import VerifyError
from diffopt.ir import call_tags
from diffopt.ir.program import Program
from diffopt.transforms.outline_steps import outline_steps
from tests import loops
from tests.passes.build import Builder, aten, body, program, randn
from tests.zoo import traced

X, TEXT = randn(4), randn(4, seed=1)


def net(name: str = "net") -> fx.GraphModule:
    return body(lambda b, x, text: b(aten.mul.Tensor, x, text), X, TEXT, name=name)


def tagged(make: Any, *samples: torch.Tensor, **components: fx.GraphModule) -> Program:
    """Return a program written down by hand, with tags."""
    components = components or {"net": net()}
    built = program(make, *(samples or (X, TEXT)), **components)
    call_tags.assign(built.root)
    built.verify()
    return built


def steps_and_branches(built: Program, component: str = "net") -> list[tuple[int, int]]:
    """Return the step and branch of a component's calls in order."""
    tags = [call_tags.tag(node) for node in built.calls()]
    return [(t.step, t.branch) for t in tags if t is not None and t.component == component]


# What capture finds


def guided(
    b: Builder, x: fx.Node, text: fx.Node | torch.Tensor, skip: Sequence[int] = ()
) -> fx.Node:
    """Call without and with text in four steps; some leave out the call without text."""
    for step in range(4):
        b.weights.clear()  # as in capture, a constant has a node for each use
        without = [] if step in skip else b.call("net", x, TEXT)
        parts = [*without, *b.call("net", x, text)]
        for part in parts:
            x = b(aten.add.Tensor, x, part)
    return x


def test_calls_that_do_not_wait_for_each_other_are_branches_of_a_step() -> None:
    built = tagged(guided)
    assert steps_and_branches(built) == [(s, b) for s in range(4) for b in range(2)]
    assert built.at("net", 2, 1) is built.calls()[5]
    assert built.at("net", 4) is None


def test_a_step_without_guidance_continues_the_branch_with_the_same_text() -> None:
    expected = [(0, 0), (0, 1), (1, 1), (2, 1), (3, 0), (3, 1)]
    assert (
        steps_and_branches(tagged(lambda b, x, text: guided(b, x, text, skip=(1, 2)))) == expected
    )
    assert steps_and_branches(tagged(lambda b, x, text: guided(b, x, X, skip=(1, 2)))) == expected


def test_another_body_of_a_component_is_the_same_component() -> None:
    def two_bodies(b: Builder, x: fx.Node, text: fx.Node) -> fx.Node:
        (once,) = b.call("net", x, text)
        (twice,) = b.call("net_2", once, text)
        return b.call("net", twice, text)[0]

    assert steps_and_branches(tagged(two_bodies, net=net(), net_2=net())) == [
        (0, 0),
        (1, 0),
        (2, 0),
    ]
    other = tagged(two_bodies, net=net(), net_2=net("other"))
    assert (steps_and_branches(other), steps_and_branches(other, "other")) == (
        [(0, 0), (1, 0)],
        [(0, 0)],
    )


def test_loops_that_run_one_after_the_other_are_branches() -> None:
    def one_by_one(b: Builder, x: fx.Node, text: fx.Node) -> list[fx.Node]:
        # The second loop begins with the text that the first one ends with.
        texts = [[text, TEXT, TEXT], [TEXT, TEXT, text]]
        ends = []
        for loop in texts:
            y = x
            for t in loop:
                (y,) = b.call("net", y, t)
            ends.append(y)
        return ends

    assert steps_and_branches(tagged(one_by_one)) == [
        (0, 0),
        (1, 0),
        (2, 0),
        (0, 1),
        (1, 1),
        (2, 1),
    ]


@pytest.mark.parametrize(
    ("name", "component", "steps", "branches"),
    [
        ("sd", "unet", 3, 1),  # guidance in one batch
        ("chroma", "transformer", 3, 2),  # guidance in two calls
        ("karras-ve", "unet", 5, 1),  # Heun: two calls a step, one in the last
        ("sd-controlnet", "controlnet", 3, 1),
        ("kandinsky", "prior_prior", 2, 1),
        ("kandinsky", "unet", 3, 1),
        ("wan", "transformer", 3, 2),
    ],
)
def test_pipelines(name: str, component: str, steps: int, branches: int) -> None:
    built = traced(name)
    assert steps_and_branches(built, component) == [
        (s, b) for s in range(steps) for b in range(branches)
    ]
    assert all(call_tags.tag(node) is not None for node in built.calls())


# What passes keep


def test_passes_keep_tags_and_prologues_have_none() -> None:
    built = Pipeline.parse("unroll,hoist,simplify,fuse").run(loops.program())
    assert {str(node.target): call_tags.tag(node) is None for node in built.calls()} == {
        "denoiser_once": True,
        "denoiser_steps": True,
        "denoiser_step": False,
    }
    assert steps_and_branches(built, "denoiser") == [(s, 0) for s in range(4)]
    assert built.at("denoiser", 3) is built.calls("denoiser_step")[3]


def test_a_step_of_two_calls_keeps_both_branches() -> None:
    built = Pipeline.parse("unroll,hoist,simplify,fuse").run(traced("chroma"))
    assert steps_and_branches(built, "transformer") == [(s, b) for s in range(3) for b in range(2)]


def test_an_outlined_step_keeps_what_its_call_reuses() -> None:
    part = body(lambda b, x, kept: (b(aten.mul.Tensor, x, kept), b(aten.neg.default, kept)), X, X)
    part.graph.find_nodes(op="placeholder")[1].meta["reuse"] = True

    def make(b: Builder, x: fx.Node) -> fx.Node:
        (kept,) = b.call("first", x)
        for _ in range(4):
            noise, kept = b.call("rest", x, kept)
            x = b(aten.add.Tensor, x, noise)
        return x

    first = body(lambda b, x: b(aten.neg.default, x), X)
    built = tagged(make, X, first=first, rest=part)
    outline_steps(built, Context())
    built.refresh()
    built.verify()
    calls = built.calls("rest_step")
    assert len(calls) >= 3
    reused = [list(call_tags.reused(built.root, call).values()) for call in calls]
    # The value that the step before returns, each time in the same argument.
    assert [[node.args[0] for node in nodes] for nodes in reused[1:]] == [[c] for c in calls[:-1]]


def test_another_number_of_steps_has_other_tags() -> None:
    built = Pipeline.parse("unroll(steps=6)").run(loops.program())
    assert steps_and_branches(built, "denoiser") == [(s, 0) for s in range(6)]


def test_clones_and_files_keep_tags_and_marks(tmp_path: Any) -> None:
    built = reusing()
    built.save(tmp_path / "a.program")
    for copy in (built.clone(), Program.load(tmp_path / "a.program")):
        assert (
            steps_and_branches(copy)
            == steps_and_branches(built)
            == [(0, 0), (0, 1), (1, 0), (1, 1)]
        )
        copy.verify()
        copy.at("net", 1).update_arg(1, value_of(copy, 0, 1))
        with pytest.raises(VerifyError, match="x1 of net, step 1, branch 0 reuses a value of"):
            copy.verify()


# What is refused


def reusing(branch: int = 0) -> Program:
    """Return two steps of two branches; in the last, a branch reuses what it had in the first."""
    full, rest = net(), net()
    rest.graph.find_nodes(op="placeholder")[1].meta["reuse"] = True

    def make(b: Builder, x: fx.Node, text: fx.Node) -> list[fx.Node]:
        firsts = [b.call("net", x, TEXT)[0], b.call("net", x, text)[0]]
        y = b(aten.add.Tensor, *firsts)
        scaled = b(aten.mul.Tensor, firsts[branch], 0.5)
        return [b.call("net_2", y, scaled)[0], b.call("net", y, text)[0]]

    built = program(make, X, TEXT, net=full, net_2=rest)
    call_tags.assign(built.root)
    return built


def value_of(built: Program, step: int, branch: int = 0) -> fx.Node:
    call = built.at("net", step, branch)
    assert call is not None
    return next(iter(call.users))


def refused(built: Program) -> str:
    """Return why a program is refused, without the call that it is about."""
    with pytest.raises(VerifyError) as caught:
        built.verify()
    where, _, why = str(caught.value).partition("): ")
    assert where.startswith("program: %net")
    return why


def test_two_calls_with_one_tag_are_refused() -> None:
    built = tagged(guided)
    first, second, *_ = built.calls()
    second.meta["tag"] = first.meta["tag"]
    assert refused(built) == f"tagged as net, step 0, branch 0, and so is {first.format_node()}"


def test_a_call_that_depends_on_a_later_step_of_its_branch_is_refused() -> None:
    built = tagged(guided)
    a, b = built.calls()[2], built.calls()[4]
    a.meta["tag"], b.meta["tag"] = b.meta["tag"], a.meta["tag"]
    assert refused(built) == "tagged as net, step 1, branch 0, and depends on step 2 of this branch"


def test_reuse_of_an_earlier_step_of_the_branch_is_right() -> None:
    reusing().verify()


def test_reuse_across_branches_is_refused() -> None:
    why = "x1 of net, step 1, branch 0 reuses a value of net, step 0, branch 1"
    assert refused(reusing(branch=1)) == why


def test_reuse_of_another_component_is_refused() -> None:
    built = reusing()
    for node in built.calls()[:2]:
        node.meta["tag"] = call_tags.Tag("other", 0, node.meta["tag"].branch)
    why = "x1 of net, step 1, branch 0 reuses a value of other, step 0, branch 0"
    assert refused(built) == why


def test_reuse_of_a_later_step_is_refused() -> None:
    built = reusing()
    first, _, last, _ = built.calls()
    first.meta["tag"], last.meta["tag"] = last.meta["tag"], first.meta["tag"]
    assert refused(built) == "tagged as net, step 0, branch 0, and depends on step 1 of this branch"


def test_reuse_of_what_no_step_returns_is_refused() -> None:
    built = reusing()
    text = built.root.graph.find_nodes(op="placeholder")[1]
    call = built.at("net", 1)
    assert call is not None
    call.update_arg(1, text)
    assert refused(built) == "x1 reuses what no earlier step returns"
