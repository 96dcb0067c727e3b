"""Steps that take values of earlier steps: against an interpreter that looks them up."""

import random
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import diffopt
from diffopt.caching.apply_plan import (
    Loop,
    Plan,
    PlanCost,
    Reuse,
    Term,
    apply,
    find_loop,
    merge_calls,
)
from diffopt.core import Pipeline
from diffopt.engine.engine import build
from diffopt.errors import DiffoptError, VerifyError
from diffopt.ir import call_tags
from diffopt.ir import graph as g
from diffopt.ir.flops import graph_flops
from diffopt.ir.printing import format_type
from diffopt.ir.program import Program
from diffopt.transforms.component_signatures import merge_equal_components
from tests import loops, reference
from tests.passes.build import Builder, body, parameter, program, randn
from tests.zoo import traced

aten = torch.ops.aten

ATTENTION = aten.scaled_dot_product_attention.default


class Apart(loops.Loop):
    """Guidance with two calls a step; `alone` steps at the end have but the one with the text."""

    def __call__(
        self,
        text: Tensor,
        label: Tensor,
        generator: torch.Generator,
        steps: int = 4,
        alone: int = 0,
    ) -> Tensor:
        x = torch.randn(1, 3, 8, generator=generator)
        denoiser, zero = self.components["denoiser"], torch.zeros_like(text)
        for i, t in enumerate(torch.linspace(1.0, 0.1, steps)):
            noise = denoiser(x, t, text, label)
            if i < steps - alone:
                without = denoiser(x, t, zero, label)
                noise = without + 3.0 * (noise - without)
            x = x * (1 - 0.1 * t) - 0.2 * t * noise
        return x.tanh()


@cache
def loop_program(
    name: str, passes: str = "unroll,hoist", steps: int = 5, alone: int = 0
) -> Program:
    """Return a program with a loop."""
    if name == "batched":
        captured = loops.program(steps=steps)
    elif name == "apart":
        captured = diffopt.trace(Apart(), **loops.arguments(steps=steps, alone=alone))
    else:
        captured = traced(name, num_inference_steps=steps)
    return Pipeline.parse(passes).run(captured)


Planner = Callable[[Loop], Plan]


def reused(name: str | Program, plan: Planner, **how: Any) -> tuple[Program, PlanCost]:
    """Return a program after a plan for its loop, verified."""
    changed = (loop_program(name, **how) if isinstance(name, str) else name).clone()
    loop = find_loop(changed)
    applied = apply(changed, loop, plan(loop))
    changed.verify()
    return changed, applied


def expected(name: str | Program, plan: Planner, **how: Any) -> list[Tensor]:
    """Return what the interpreter gives."""
    original = (loop_program(name, **how) if isinstance(name, str) else name).clone()
    loop = find_loop(original)
    return reference.run(loop, plan(loop), original.sample_inputs())


def outputs(built: Program) -> list[Tensor]:
    return list(built.run(built.sample_inputs()))


def assert_same(built: Program, wanted: Sequence[Tensor]) -> None:
    torch.testing.assert_close(outputs(built), list(wanted), rtol=0, atol=0)


def assert_close(built: Program, wanted: Sequence[Tensor]) -> None:
    torch.testing.assert_close(outputs(built), list(wanted), rtol=1e-6, atol=1e-6)


def attention(loop: Loop) -> list[fx.Node]:
    """Return the results of attention."""
    results = list(loop.body.graph.find_nodes(op="call_function", target=ATTENTION))
    return results or [loop_parts(loop)[1]]


def every_second(loop: Loop) -> Plan:
    """Take attention from the step before, in every second step."""
    return {s: [Reuse(v, (Term(s - 1),)) for v in attention(loop)] for s in range(1, loop.steps, 2)}


def every(interval: int) -> Planner:
    return lambda loop: {
        s: [Reuse(v, (Term(s - s % interval),)) for v in attention(loop)]
        for s in range(loop.steps)
        if s % interval
    }


# What it is equal to

NAMES = ["sd", "dit", "batched", "apart"]


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_plan_changes_nothing(name: str) -> None:
    changed, applied = reused(name, lambda loop: {1: []})
    assert str(changed) == str(loop_program(name))
    loop = find_loop(changed)
    total = len(loop.calls) * graph_flops(loop.body)
    assert applied == PlanCost(1, total, total, 0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("passes", ["unroll", "unroll,hoist"])
def test_reuse_is_bit_by_bit_what_looking_up_gives(name: str, passes: str) -> None:
    changed, applied = reused(name, every_second, passes=passes)
    wanted = expected(name, every_second, passes=passes)
    assert_same(changed, wanted)
    assert applied.flops_after < applied.flops_before
    assert applied.bodies == 2
    assert not torch.equal(wanted[0], outputs(loop_program(name, passes))[0])


@pytest.mark.parametrize("name", NAMES)
def test_what_depends_on_the_prompt_alone_is_the_same_in_every_step(name: str) -> None:
    def plan(loop: Loop) -> Plan:
        values = prompt_only(loop)
        assert values
        return {s: [Reuse(v, (Term(0),)) for v in values] for s in range(1, loop.steps)}

    changed, applied = reused(name, plan, passes="unroll")
    assert_same(changed, outputs(loop_program(name, "unroll")))
    assert applied.bodies == 2
    # In "dit" it is the embedding of a label, which counts for nothing.
    assert applied.flops_after < applied.flops_before or name == "dit"


def prompt_only(loop: Loop) -> list[fx.Node]:
    """Return the linears of a body that depend only on arguments that all steps share."""
    shared = []
    for index, formal in enumerate(g.placeholders(loop.body)):
        nodes = {b: {c.args[index] for (_, x), c in loop.calls.items() if x == b} for b in (0, 1)}
        if all(len(passed) <= 1 for passed in nodes.values()):
            shared.append(formal)
    others = [n for n in g.placeholders(loop.body) if n not in shared]
    dependents = g.descendants(shared) - g.descendants(others)
    return [n for n in dependents if n.target in (aten.linear.default, aten.embedding.default)]


def extrapolated(loop: Loop) -> Plan:
    """Take attention along the line through the two last steps that computed it."""
    values = attention(loop)
    line = {2: (Term(0, -1.0), Term(1, 2.0)), 3: (Term(0, -2.0), Term(1, 3.0))}
    return {step: [Reuse(v, terms) for v in values] for step, terms in line.items()}


def residual(loop: Loop) -> Plan:
    """Take what attention adds to its query."""
    pairs = [(v, v.all_input_nodes[0]) for v in attention(loop)]
    pairs = [(v, q) for v, q in pairs if q.meta["val"].shape == v.meta["val"].shape] or stream(loop)
    assert pairs
    one = {1: (Term(0),), 2: (Term(0, 0.5),), 4: (Term(0, -0.25), Term(3, 1.25))}
    return {step: [Reuse(v, terms, q) for v, q in pairs] for step, terms in one.items()}


def stream(loop: Loop) -> list[tuple[fx.Node, fx.Node]]:
    """Return the last result and the first value of its type."""
    (last,) = g.outputs(loop.body)
    types = (n for n in loop.positions if n.op == "call_function" and n is not last)
    same = (n for n in types if format_type(n.meta["val"]) == format_type(last.meta["val"]))
    return [(last, next(same))]


def chain(loop: Loop) -> Plan:
    """Take from steps that took the value themselves."""
    values = attention(loop)
    links = {
        1: (Term(0),),
        2: (Term(1),),
        3: (Term(1, 0.5), Term(2, 0.25), Term(0, 0.125)),
        4: (Term(3, 2.0), Term(2, -1.0)),
    }
    return {step: [Reuse(v, terms) for v in values] for step, terms in links.items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("plan", [extrapolated, residual, chain])
def test_sums_are_what_looking_up_gives(name: str, plan: Planner) -> None:
    changed, _ = reused(name, plan)
    assert_close(changed, expected(name, plan))


@pytest.mark.parametrize("seed", range(40))
def test_random_plans(seed: int) -> None:
    name = NAMES[seed % len(NAMES)] if seed < 8 else NAMES[2 + seed % 2]

    def plan(loop: Loop) -> Plan:
        return random_plan(loop, random.Random(seed))

    changed, _ = reused(name, plan)
    torch.testing.assert_close(outputs(changed), expected(name, plan), rtol=1e-4, atol=1e-5)


def random_plan(loop: Loop, choose: random.Random) -> Plan:
    varying = g.descendants(g.placeholders(loop.body))
    values = [
        n for n in loop.positions if n in varying and n.op == "call_function" and _is_float(n)
    ]
    popular = choose.sample(values, 4)  # so that steps take the same
    plan = {}
    for step in range(1, loop.steps):
        taken = dict.fromkeys(
            choose.sample(popular, 2) + choose.sample(values, choose.randint(0, 2))
        )
        plan[step] = [_random_reuse(loop, v, step, choose) for v in taken]
    return plan


def _random_reuse(loop: Loop, value: fx.Node, step: int, choose: random.Random) -> Reuse:
    same = [n for n in loop.positions if _is_float(n) and loop.positions[n] < loop.positions[value]]
    bases = [n for n in same if format_type(n.meta["val"]) == format_type(value.meta["val"])]
    base = choose.choice(bases) if bases and choose.random() < 0.3 else None
    steps = choose.sample(range(step), min(step, choose.choice([1, 1, 2])))
    weights = [1.0] if len(steps) == 1 and choose.random() < 0.7 else [0.75, 0.25]
    return Reuse(value, tuple(Term(s, w) for s, w in zip(steps, weights, strict=False)), base)


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def test_other_inputs() -> None:
    changed, _ = reused("apart", every_second)
    original = loop_program("apart").clone()
    loop = find_loop(original)
    inputs = original.prepare(**loops.arguments(seed=5, steps=5))
    wanted = reference.run(loop, every_second(loop), inputs)
    assert all(map(torch.equal, changed.run(inputs), wanted))


# What it costs


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_flops(name: str) -> None:
    changed, applied = reused(name, every_second)
    loop = find_loop(loop_program(name))
    values = attention(loop)
    assert loop.flops() == graph_flops(loop.body)
    assert loop.flops(values) < loop.flops()
    assert applied.flops_before == 5 * loop.flops()
    assert applied.flops_after == 3 * loop.flops() + 2 * loop.flops(values)
    bodies = [
        str(c.target)
        for c in changed.calls()
        if (t := call_tags.tag(c)) and t.component in loop.name
    ]
    assert len(bodies) == 5
    assert sum(graph_flops(changed.components[n]) for n in bodies) == applied.flops_after


def taylor(loop: Loop) -> Plan:
    """Extrapolate attention from the last two steps that computed it, of which every third does."""
    plan = {}
    for step in range(4, loop.steps):
        last = step - step % 3
        if step > last:
            k = (step - last) / 3
            terms = (Term(last, 1 + k), Term(last - 3, -k))
            plan[step] = [Reuse(v, terms) for v in attention(loop)]
    return plan


@pytest.mark.parametrize(("plan", "bodies"), [(every(3), 2), (taylor, 2)])
def test_bodies_do_not_grow_with_steps(plan: Planner, bodies: int) -> None:
    after = []
    for steps in (10, 30):
        changed, applied = reused("batched", plan, steps=steps)
        assert applied.bodies == bodies
        after.append(len(Pipeline.parse("simplify,fuse").run(changed).components))
    assert after[1] <= after[0]


def test_a_step_that_exports_less_shares_a_body_unless_that_costs() -> None:
    def early(loop: Loop) -> Plan:  # no step reads what the last one computes
        return {1: [Reuse(v, (Term(0),)) for v in attention(loop)]}

    assert reused("batched", early)[1].bodies == 2

    def dead(loop: Loop) -> Plan:  # no result of step 2 depends on what step 1 exports
        scores, result = loop_parts(loop)
        return {
            2: [Reuse(result, (Term(0),))],
            3: [Reuse(result, (Term(0),))],
            4: [Reuse(scores, (Term(2),))],
        }

    changed, applied = reused("batched", dead)
    assert_same(changed, expected("batched", dead))
    assert applied.bodies == 4


def loop_parts(loop: Loop) -> tuple[fx.Node, fx.Node]:
    """Return the attention scores and the result of attention of `loops.Denoiser`."""
    scores, result = loop.body.graph.find_nodes(op="call_function", target=aten.matmul.default)
    return scores, result


def test_what_no_result_depends_on_is_not_kept() -> None:
    def both(loop: Loop) -> Plan:
        scores, result = loop_parts(loop)
        return {1: [Reuse(scores, (Term(0),)), Reuse(result, (Term(0),))]}

    def one(loop: Loop) -> Plan:
        return {1: [Reuse(loop_parts(loop)[1], (Term(0),))]}

    assert str(reused("batched", both)[0]) == str(reused("batched", one)[0])


def test_a_term_that_counts_for_nothing_is_not_kept() -> None:
    def plan(*terms: Term) -> Planner:
        return lambda loop: {2: [Reuse(loop_parts(loop)[1], terms)]}

    one, _ = reused("batched", plan(Term(0)))
    assert str(reused("batched", plan(Term(0), Term(1, 0.0)))[0]) == str(one)
    assert str(reused("batched", plan(Term(1, -1.0), Term(0), Term(1)))[0]) == str(one)


def test_the_memory_layout_of_a_sum_is_recorded() -> None:
    def plan(loop: Loop) -> Plan:  # the value is every other row of what the sum is a whole of
        (modulation,) = loop.body.graph.find_nodes(op="call_function", target=aten.split.Tensor)
        return {2: [Reuse(v, (Term(0), Term(1, 0.5))) for v in modulation.users]}

    changed, _ = reused("batched", plan, passes="unroll")
    assert_close(changed, expected("batched", plan, passes="unroll"))
    call = changed.at("denoiser", 2)
    assert call is not None
    body = changed.components[str(call.target)]
    taken = [n for n in g.placeholders(body) if n.meta.get("reuse")]
    views = [n for n in g.descendants(taken) if n.target is aten.unsqueeze.default]
    assert len(views) == 2
    for view in views:
        assert view.meta["val"].stride() == g.infer_value(view).stride()


def test_a_step_with_nothing_to_compute_has_no_call() -> None:
    def whole(loop: Loop) -> Plan:
        return {s: [Reuse(v, (Term(s - 1),)) for v in g.outputs(loop.body)] for s in (1, 2, 4)}

    changed, applied = reused("batched", whole)
    assert_same(changed, expected("batched", whole))
    loop = find_loop(loop_program("batched"))
    assert applied == PlanCost(1, 5 * loop.flops(), 2 * loop.flops(), 2 * 3 * 8 * 4)
    tags = [tag for call in changed.calls() if (tag := call_tags.tag(call))]
    assert [tag.step for tag in tags] == [0, 3]


def test_the_peak_is_what_is_kept_between_two_calls() -> None:
    def plan(loop: Loop) -> Plan:
        scores, result = loop_parts(loop)  # of [2,3,2] and [2,3,8]
        return {
            2: [Reuse(scores, (Term(0), Term(1)))],  # 0 to 2, 1 to 2
            3: [Reuse(result, (Term(1),), scores_like(loop, result))],  # 1 to 3
            4: [Reuse(result, (Term(2),))],  # 2 to 4
        }

    scores, result = 2 * 3 * 2 * 4, 2 * 3 * 8 * 4
    between = [scores, 2 * scores + result, 2 * result, result]
    assert reused("batched", plan)[1].peak_cache_bytes == max(between)


def scores_like(loop: Loop, value: fx.Node) -> fx.Node:
    """Return an earlier value of the same type."""
    text = format_type(value.meta["val"])
    return next(n for n in loop.positions if format_type(n.meta.get("val")) == text)


def test_the_peak_counts_branches_and_the_memory_that_views_keep() -> None:
    def parts(loop: Loop) -> Plan:
        (modulation,) = loop.body.graph.find_nodes(op="call_function", target=aten.split.Tensor)
        scale, _ = modulation.users
        return {1: [Reuse(scale, (Term(0),))]}

    _, applied = reused("apart", parts, passes="unroll")
    assert (
        applied.peak_cache_bytes == 2 * 16 * 4
    )  # two branches; scale and shift are one piece of memory


def test_steps_that_differ_in_weights_alone_share_constants_and_a_body() -> None:
    def lines(loop: Loop) -> Plan:
        (value,) = attention(loop)
        slopes = {2: 0.5, 3: 0.25, 4: 0.5}
        return {s: [Reuse(value, (Term(0, 1 - k), Term(1, k)))] for s, k in slopes.items()}

    changed, applied = reused("batched", lines)
    assert applied.bodies == 2
    weights = [t for n, t in g.named_tensors(changed.root) if n.startswith("weight")]
    assert sorted(t.item() for t in weights) == [0.25, 0.5, 0.75]
    assert {t.dim() for t in weights} == {0}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sums_have_the_type_of_the_value(dtype: torch.dtype) -> None:
    weight = torch.nn.Parameter(parameter(4, 4).to(dtype), requires_grad=False)

    def net(b: Builder, x: Any) -> Any:
        return b(aten.tanh.default, b(aten.linear.default, x, weight))

    def make(b: Builder, x: Any) -> Any:
        for _ in range(3):
            (x,) = b.call("net", x)
        return x

    def plan(loop: Loop) -> Plan:
        (value,) = loop.body.graph.find_nodes(op="call_function", target=aten.linear.default)
        return {2: [Reuse(value, (Term(0, -1 / 3), Term(1, 4 / 3)))]}

    x = randn(4).to(dtype)
    built = program(make, x, net=body(net, x, name="net"))
    call_tags.assign(built.root)
    changed, _ = reused(built, plan)
    bound = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(outputs(changed), expected(built, plan), rtol=bound, atol=bound)


# Branches


def test_branches_keep_to_themselves() -> None:
    changed, applied = reused("apart", every_second)
    assert applied.bodies == 2
    assert applied.peak_cache_bytes == 2 * 3 * 8 * 4
    for call in changed.calls():
        sources = {call_tags.tag(n.args[0]) for n in call_tags.reused(changed.root, call).values()}
        tag = call_tags.tag(call)
        if tag is None or tag.step % 2 == 0:
            assert not sources
        else:
            assert sources == {call_tags.Tag(tag.component, tag.step - 1, tag.branch)}


def test_a_value_of_another_branch_is_refused() -> None:
    changed, _ = reused("apart", every_second)
    one, other = (changed.at("denoiser", 1, branch) for branch in (0, 1))
    assert one is not None
    assert other is not None
    ((place, value),) = [(i, v) for i, v in enumerate(other.args) if is_reused(changed, other, v)]
    one.update_arg(place, value)
    with pytest.raises(VerifyError, match="step 1, branch 0 reuses a value of denoiser, step 0, b"):
        changed.verify()


def is_reused(built: Program, call: fx.Node, value: Any) -> bool:
    return value in call_tags.reused(built.root, call).values()


def test_equal_bodies_of_which_one_reuses_a_value_stay_two() -> None:
    changed, _ = reused("apart", lambda loop: {2: [Reuse(loop_parts(loop)[1], (Term(0),))]})
    call = changed.at("denoiser", 2)
    assert call is not None
    twin = g.clone(changed.components[str(call.target)])
    for formal in g.placeholders(twin):
        formal.meta.pop("reuse", None)
    other = changed.at("denoiser", 2, 1)
    assert other is not None
    other.target = changed.add_component("twin", twin)
    merge_equal_components(changed)
    assert other.target == "twin"
    assert call_tags.reused(changed.root, call)


def test_a_branch_that_ends_is_no_matter_to_the_other() -> None:
    changed, applied = reused("apart", every_second, alone=2)
    assert_same(changed, expected("apart", every_second, alone=2))
    assert applied.bodies == 2


# What comes after


@pytest.mark.parametrize("name", NAMES)
def test_the_exact_passes(name: str, tmp_path: Path) -> None:
    changed, applied = reused(name, lambda loop: {**extrapolated(loop), **every_second(loop)})
    result = Pipeline.parse("simplify,fuse").run(changed)
    before = outputs(changed)
    torch.testing.assert_close(outputs(result), before, rtol=1e-4, atol=1e-5)
    steps = [
        c for c in result.calls() if (tag := call_tags.tag(c)) and tag.component == component(name)
    ]
    assert len({c.target for c in steps}) <= applied.bodies + 1
    # Each body still knows what it reuses.
    assert sum(bool(call_tags.reused(result.root, c)) for c in steps) >= len(steps) // 2 - 1

    result.save(tmp_path / "a.program")
    loaded = Program.load(tmp_path / "a.program")
    loaded.verify()
    assert_same(loaded, outputs(result))

    engine = build(result, "eager", tmp_path / "a.engine")
    assert all(map(torch.equal, engine.run(result.sample_inputs()), outputs(result)))

    batched = Pipeline.parse("batch(max=3)").run(result)
    runs = batched.sample_outputs(batched.run(batched.sample_inputs()))
    torch.testing.assert_close(runs, outputs(result), rtol=1e-4, atol=1e-5)


def component(name: str) -> str:
    return {"sd": "unet", "dit": "transformer"}.get(name, "denoiser")


# Calls that have become independent


def no_latents(loop: Loop) -> Plan:
    """Take all that depends on the latents: the modulated state, of all steps but every third."""
    linears = loop.body.graph.find_nodes(op="call_function", target=aten.linear.default)
    depends = g.descendants(g.placeholders(loop.body)[:1])
    first = next(n for n in linears if n in depends)
    return {s: [Reuse(first, (Term(s - s % 3),))] for s in range(loop.steps) if s % 3}


def late_rows() -> Program:
    """Return a loop of which a body reads its row of a table after all that reads the latents."""
    weights, table = [parameter(4, 4, seed=i) / 2 for i in range(2)], randn(7, 4)
    bias = randn(4, seed=3)

    def net(b: Builder, x: Any, row: Any, text: Any, constant: Any) -> Any:
        deep = b(aten.tanh.default, b(aten.linear.default, x, weights[0]))
        mixed = b(aten.add.Tensor, b(aten.mul.Tensor, deep, row), text)
        mixed = b(aten.add.Tensor, mixed, constant)
        return b(aten.linear.default, mixed, weights[1]), b(aten.neg.default, text)

    def make(b: Builder, x: Any, text: Any) -> Any:
        rest = None
        for step in range(7):
            b.weights.clear()  # as in capture, a constant has a node for each use
            row = b(aten.select.int, table, 0, step)
            noise, rest = b.call("net", x, row, text, bias)
            x = b(aten.add.Tensor, x, b(aten.mul.Tensor, noise, 0.3))
        return x, rest

    x, text = randn(2, 4, seed=8), randn(2, 4, seed=9)
    built = program(make, x, text, net=body(net, x, table[0], text, bias, name="net"))
    call_tags.assign(built.root)
    return built


def test_independent_calls_become_one() -> None:
    original = late_rows()
    changed, applied = reused(original, no_latents)
    wanted = expected(original, no_latents)
    assert_same(changed, wanted)
    assert applied.bodies == 2
    loop = find_loop(original)
    assert merge_calls(changed, changed.calls()) == 2
    changed.verify()
    targets = [str(c.target) for c in changed.calls()]
    full, merged = targets[0], targets[1]
    assert targets == [full, merged, full, merged, full]
    # Only what differs is stacked: a row of the table.
    assert len(changed.root.graph.find_nodes(op="call_function", target=aten.stack.default)) == 2
    assert_close(changed, wanted)
    assert [tag.step for c in changed.calls() if (tag := call_tags.tag(c))] == [0, 1, 3, 4, 6]
    assert loop.steps == 7
    inputs = [randn(2, 4, seed=20), randn(2, 4, seed=21)]
    again = reference.run(loop, no_latents(loop), inputs)
    torch.testing.assert_close(list(changed.run(inputs)), again, rtol=1e-6, atol=1e-6)


def test_merged_calls_go_through_the_other_passes(tmp_path: Path) -> None:
    changed, _ = reused("apart", no_latents, steps=7)
    assert merge_calls(changed, changed.calls()) == 4
    result = Pipeline.parse("simplify,fuse").run(changed)
    torch.testing.assert_close(outputs(result), outputs(changed), rtol=1e-4, atol=1e-5)
    engine = build(result, "eager", tmp_path / "a.engine")
    assert all(map(torch.equal, engine.run(result.sample_inputs()), outputs(result)))
    batched = Pipeline.parse("batch(max=3)").run(result)
    runs = batched.sample_outputs(batched.run(batched.sample_inputs()))
    torch.testing.assert_close(runs, outputs(changed), rtol=1e-4, atol=1e-5)


def test_calls_that_wait_for_each_other_stay_apart() -> None:
    def added(loop: Loop) -> Plan:  # to the latents, which depend on the step before
        (result, latents) = loop_parts(loop)[1], g.placeholders(loop.body)[0]
        return {s: [Reuse(result, (Term(s - s % 3),), latents)] for s in (1, 2, 4)}

    changed, _ = reused("batched", added)
    targets = [str(c.target) for c in changed.calls()][-5:]
    full, rest = targets[:2]
    assert targets == [full, rest, rest, full, rest]
    before = str(changed)
    assert merge_calls(changed, changed.calls()) == 0
    assert str(changed) == before


def test_removed_calls_are_not_merged() -> None:
    changed = loop_program("batched").clone()
    loop = find_loop(changed)
    whole = {s: [Reuse(v, (Term(0),)) for v in g.outputs(loop.body)] for s in (1, 2, 3, 4)}
    assert apply(changed, loop, whole).bodies == 1
    assert merge_calls(changed, list(loop.calls.values())) == 0
    changed.verify()


def test_branches_are_merged_each_by_itself() -> None:
    changed, _ = reused("apart", no_latents, steps=7)
    loop = find_loop(loop_program("apart", steps=7))
    wanted = outputs(changed)
    assert merge_calls(changed, changed.calls()) == 4  # of two branches, two runs of two
    changed.verify()
    assert_close(changed, wanted)
    assert len(loop.calls) == 14


def test_a_unet_decodes_several_steps_in_one_call() -> None:
    def decoder(loop: Loop) -> Plan:
        late = g.descendants(g.placeholders(loop.body)[:1])
        convolution = aten.conv2d.default
        convs = loop.body.graph.find_nodes(op="call_function", target=convolution)
        values = [n for n in convs if n in late][:-1]
        # The last convolution reads a norm of what all others are before.
        return {s: [Reuse(v, (Term(0),)) for v in values] for s in range(1, loop.steps)}

    changed, _ = reused("sd", decoder)
    wanted = outputs(changed)
    loop = find_loop(loop_program("sd"))
    saved = merge_calls(changed, changed.calls())
    changed.verify()
    assert saved == loop.steps - 2
    torch.testing.assert_close(outputs(changed), wanted, rtol=1e-4, atol=1e-5)


# What is refused


def refused(name: str, plan: Planner) -> str:
    with pytest.raises(DiffoptError) as caught:
        reused(name, plan)
    message = str(caught.value)
    assert "\n" not in message
    return message


def one(step: int, *terms: Term, value: str = "result", base: str = "") -> Planner:
    """Return a plan of one reuse."""

    def plan(loop: Loop) -> Plan:
        scores, result = loop_parts(loop)
        split = loop.body.graph.find_nodes(op="call_function", target=aten.split.Tensor)
        known: dict[str, fx.Node | None] = {
            "scores": scores,
            "result": result,
            "last": g.outputs(loop.body)[0],
            "argument": g.placeholders(loop.body)[0],
            "several": next(iter(split), None),
            "elsewhere": find_loop(loop_program("apart")).calls[0, 0],
            "": None,
        }
        chosen = known[value]
        assert chosen is not None
        return {step: [Reuse(chosen, terms, known[base])]}

    return plan


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (one(5, Term(0)), "the plan has a step 5; denoiser has the steps 0 to 4"),
        (one(-1, Term(0)), "the plan has a step -1; denoiser has the steps 0 to 4"),
        (one(2), "denoiser, step 2: matmul_1 is taken from no step: name one before step 2"),
        (
            one(2, Term(2)),
            "denoiser, step 2: matmul_1 is taken from step 2: only a step before 2 has it by then",
        ),
        (
            one(2, Term(0), Term(3)),
            "denoiser, step 2: matmul_1 is taken from step 3: only a step before 2 has it by then",
        ),
        (
            one(2, Term(-1)),
            "denoiser, step 2: matmul_1 is taken from step -1: only a step before 2 has it by then",
        ),
        (
            one(2, Term(0, float("nan"))),
            "denoiser, step 2: matmul_1 has the weight nan: give a finite one",
        ),
        (
            one(2, Term(0), base="scores"),
            "denoiser, step 2: matmul_1 is float32[2,3,8], and matmul, which it is taken relative "
            "to, is float32[2,3,2]",
        ),
        (
            one(2, Term(0), base="last"),
            "denoiser, step 2: matmul_1 is taken relative to linear_6, which does not come before "
            "it in the body",
        ),
        (
            one(2, Term(0), base="result"),
            "denoiser, step 2: matmul_1 is taken relative to matmul_1, which does not come before "
            "it in the body",
        ),
        (
            one(2, Term(0), base="elsewhere"),
            "denoiser, step 2: matmul_1 is taken relative to denoiser, which is no value of the "
            "body",
        ),
        (
            one(2, Term(0), value="elsewhere"),
            "denoiser, step 2: denoiser is no value that the body computes: name one of its "
            "operators",
        ),
        (
            one(2, Term(0), value="argument"),
            "denoiser, step 2: arg0 is no value that the body computes: name one of its operators",
        ),
        (
            one(2, Term(0), value="several"),
            "denoiser, step 2: split_tensor has several results: name one of them",
        ),
        (
            lambda loop: {2: [r for p in (one(2, Term(0)), one(2, Term(1))) for r in p(loop)[2]]},
            "denoiser, step 2: matmul_1 is taken twice in one step: give one sum of terms",
        ),
    ],
)
def test_a_plan_that_means_nothing_is_refused(plan: Planner, message: str) -> None:
    before = str(loop_program("batched"))
    assert refused("batched", plan) == message
    assert str(loop_program("batched")) == before


def test_integers_are_taken_as_they_were_or_not_at_all() -> None:
    def make(b: Builder, x: Any) -> Any:
        for _ in range(3):
            (x,) = b.call("net", x)
        return x

    def net(b: Builder, x: Any) -> Any:
        places = b(aten.argsort.default, x)
        return b(aten.add.Tensor, b(aten.gather.default, x, 0, places), 1.0)

    x = randn(4)
    built = program(make, x, net=body(net, x, name="net"))
    call_tags.assign(built.root)

    def plan(*terms: Term) -> Planner:
        return lambda loop: {
            2: [Reuse(n, terms) for n in loop.positions if n.target is aten.argsort.default]
        }

    changed, _ = reused(built, plan(Term(1)))
    assert_same(changed, expected(built, plan(Term(1))))
    why = "net, step 2: argsort_default is int64[4]: without a fraction it can only be taken as it"
    with pytest.raises(DiffoptError, match=re.escape(why)):
        reused(built, plan(Term(0), Term(1)))


def test_a_step_without_a_call_of_the_branch_is_no_source() -> None:
    def make(b: Builder, x: Any, text: Any) -> Any:
        for step in range(3):
            parts = [b.call("net", x, text)[0]] + ([b.call("net", x, x)[0]] if step != 1 else [])
            for part in parts:
                x = b(aten.add.Tensor, x, part)
        return x

    def net(b: Builder, x: Any, text: Any) -> Any:
        return b(aten.neg.default, b(aten.mul.Tensor, x, text))

    x = randn(4)
    built = program(make, x, randn(4, seed=1), net=body(net, x, x, name="net"))
    call_tags.assign(built.root)

    def plan(source: int) -> Planner:
        return lambda loop: {
            2: [Reuse(n, (Term(source),)) for n in loop.positions if n.target is aten.mul.Tensor]
        }

    changed, _ = reused(built, plan(0))
    assert_same(changed, expected(built, plan(0)))
    why = "net, step 2: mul_tensor is taken from step 1, which has no call of branch 1"
    with pytest.raises(DiffoptError, match=f"^{why}$"):
        reused(built, plan(1))


def test_a_program_that_is_not_unrolled_is_refused() -> None:
    with pytest.raises(DiffoptError) as caught:
        find_loop(loops.program())
    assert str(caught.value) == (
        "denoiser is not unrolled, its calls pass the timestep: run `unroll` first, as in "
        "unroll,hoist,cache"
    )


def test_a_program_without_a_loop_is_refused() -> None:
    with pytest.raises(DiffoptError) as caught:
        find_loop(loop_program("batched", steps=1))
    assert str(caught.value) == (
        "no component is called in more than one step, so there are no values of an earlier step: "
        "sample in two or more steps, as with unroll(steps=20)"
    )
