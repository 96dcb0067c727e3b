"""Let a step of the sampling loop take values of earlier steps: the mechanism of every cache.

The loop calls one body once a step. A plan says which values of the body a step takes and from
which earlier steps of the same branch, as they were there or as a weighted sum:

    v@i := sum w[k] * v@k                          # reuse is one term of weight 1
    v@i := base@i + sum w[k] * (v - base)@k        # the same with what v adds to another value

`apply` makes a body for each way in which steps differ. A value that is taken is an argument of its
body, and what only that value needed is gone; a value that is read later is one more result. The
weights of sums are arguments too, so that steps that differ in them alone share a body.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.caching import reuse_plan
from diffopt.caching.reuse_plan import Kept, Plan, Reuse, Step, Taken, Term
from diffopt.errors import DiffoptError
from diffopt.ir import graph as g
from diffopt.ir import nodes
from diffopt.ir.aliasing import storage_owner
from diffopt.ir.flops import graph_flops
from diffopt.ir.program import Program
from diffopt.ir.propagation import propagate_layouts
from diffopt.ir.sampling_loop import CallKey, Loop, find_loop
from diffopt.ir.step_tables import add_placeholder
from diffopt.transforms import component_signatures
from diffopt.transforms.batch_calls import merge_calls

__all__ = ["Applied", "Loop", "Plan", "Reuse", "Term", "apply", "find_loop", "merge_calls"]

aten = torch.ops.aten

# Bodies


@dataclass(eq=False)
class _Variant:
    """A body that takes some values and hands over others.

    Attributes:
        name: Its name as a component.
        body: Its graph.
        places: Which of its results each value that it hands over is.
    """

    name: str
    body: fx.GraphModule
    places: dict[Kept, int]


def _variants(loop: Loop, steps: Sequence[Step]) -> list[_Variant]:
    """Return the body of every step.

    A step also uses the body of one that takes the same and hands over more, if that costs nothing.
    """
    made: dict[Any, list[_Variant]] = {}
    chosen: dict[int, _Variant] = {}
    for index in sorted(range(len(steps)), key=lambda i: -len(steps[i].kept)):
        step = steps[index]
        form = tuple(item.form for item in step.taken), _cost(loop, step)
        known = made.setdefault(form, [])
        fitting = (v for v in known if step.kept.keys() <= v.places.keys())
        variant = next(fitting, None)
        if variant is None:
            variant = _make(loop, step)
            known.append(variant)
        chosen[index] = variant
    return [chosen[index] for index in range(len(steps))]


def _cost(loop: Loop, step: Step) -> int:
    taken = {item.value: item.base for item in step.taken}
    more = [node for kept in step.kept for node in kept if node is not None]
    return loop.cost(loop.live_nodes(taken, more) - taken.keys())


def _make(loop: Loop, step: Step) -> _Variant:
    """Make the body of a step."""
    if not step.taken and not step.kept:
        return _Variant(loop.name, loop.body, {})
    body = g.clone(loop.body)
    now = dict(zip(loop.body.graph.nodes, body.graph.nodes, strict=True))
    for item in step.taken:
        now[item.value] = _take(body, item, now)
    results, places = g.outputs(body), dict[Kept, int]()
    kept = sorted(step.kept, key=lambda pair: [loop.positions[n] for n in pair if n is not None])
    for value, base in kept:
        handed = now[value]
        if base is not None:
            with body.graph.inserting_before(g.output_node(body)):
                handed = g.call(body.graph, aten.sub.Tensor, handed, now[base], like=value)
        if handed not in results:
            results.append(handed)
        places[value, base] = results.index(handed)
    g.set_outputs(body, results)
    g.prune_unused(body)
    return _Variant(loop.program.add_component(loop.name, body), body, places)


def _take(body: fx.GraphModule, item: Taken, now: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """Make a body take a value as arguments; return what stands for it."""
    value = now[item.value]
    takes = [add_placeholder(body, "reused") for _ in item.weights]
    for node in takes:
        node.meta |= {"val": g.fake(item.handed_over()), "reuse": True}
    made = takes[0]
    if item.is_sum:
        weights = [add_placeholder(body, "weight") for _ in takes]
        for node in weights:
            node.meta["val"] = g.fake(torch.tensor(1.0, dtype=item.weight_dtype()))
        with body.graph.inserting_before(value):
            parts = [
                g.call(body.graph, aten.mul.Tensor, *pair, like=value)
                for pair in zip(takes, weights, strict=True)
            ]
            made = parts[0]
            for part in parts[1:]:
                made = g.call(body.graph, aten.add.Tensor, made, part, like=value)
    if item.base is not None:
        with body.graph.inserting_before(value):
            made = g.call(body.graph, aten.add.Tensor, now[item.base], made, like=value)
    value.replace_all_uses_with(made)
    if not nodes.same_layout(made, value):
        propagate_layouts(body, {made})
    return made


# The program


@dataclass(frozen=True)
class Applied:
    """What came of a plan.

    Attributes:
        bodies: How many bodies the loop's calls have.
        flops_before: Floating point operations of all calls of the loop before.
        flops_after: The same of the calls that are left.
        peak_cache_bytes: The most that is kept for later steps between two calls.
    """

    bodies: int
    flops_before: int
    flops_after: int
    peak_cache_bytes: int


def apply(program: Program, loop: Loop, plan: Plan) -> Applied:
    """Rewrite the loop's calls in place so that every step takes what the plan says.

    Values that no result depends on are neither taken nor kept. A term of a step that took the
    value itself stands for what that step took. Calls keep their tags; one that has nothing left
    to compute goes.

    Args:
        program: The program to rewrite.
        loop: Its loop, as `find_loop` found it in this program.
        plan: What is taken from where.
    """
    reuse_plan.check(loop, plan)
    before = len(loop.calls) * loop.flops()
    steps = reuse_plan.schedule(loop, plan)
    _check_branches(loop, steps)
    variants = _variants(loop, steps)
    _pass_values(program, loop, steps, variants)
    for name in {v.name for v in variants if v.body is not loop.body}:
        component_signatures.trim_outputs(program, name)
        component_signatures.drop_unread_arguments(program, name)
    program.refresh()
    own = set(loop.calls.values())
    left = [str(call.target) for call in program.calls() if call in own]
    costs = {name: graph_flops(program.components[name]) for name in left}
    after = sum(costs[name] for name in left)
    return Applied(len(costs), before, after, _peak_bytes(loop, steps))


def _check_branches(loop: Loop, steps: Sequence[Step]) -> None:
    """Refuse a plan that takes from a call which there is not."""
    for step, branch in loop.calls:
        for item in steps[step].taken:
            for source in item.weights:
                if (source, branch) not in loop.calls:
                    raise DiffoptError(
                        f"{loop.name}, step {step}: {item.value} is taken from step {source}, "
                        f"which has no call of branch {branch}"
                    )


def _pass_values(
    program: Program, loop: Loop, steps: Sequence[Step], variants: Sequence[_Variant]
) -> None:
    """Make every call one of its step's body."""
    graph = program.root.graph
    weights: dict[tuple[float, torch.dtype], Tensor] = {}
    handed: dict[tuple[fx.Node, int], fx.Node] = {}

    def result(key: CallKey, kept: Kept) -> fx.Node:
        call, place = loop.calls[key], variants[key[0]].places[kept]
        if (call, place) not in handed:
            with graph.inserting_after(call):
                handed[call, place] = g.call(graph, operator.getitem, call, place)
        return handed[call, place]

    for (step, branch), call in loop.calls.items():  # earlier ones are done
        given = list(call.args)
        with graph.inserting_before(call):
            for item in steps[step].taken:
                given += [result((source, branch), item.kept) for source in item.weights]
                if not item.is_sum:
                    continue
                for number in item.weights.values():
                    key = number, item.weight_dtype()
                    tensor = weights.setdefault(key, torch.tensor(number, dtype=key[1]))
                    given.append(g.get_attr(program.root, "weight", tensor))
        call.args, call.target = tuple(given), variants[step].name
        call.meta["val"] = tuple(n.meta["val"] for n in g.outputs(variants[step].body))


def _peak_bytes(loop: Loop, steps: Sequence[Step]) -> int:
    """Return the most bytes that are kept between two calls."""
    order = {key: place for place, key in enumerate(loop.calls)}
    changes = [0] * (len(order) + 1)
    for (step, branch), place in order.items():
        # Views of one value keep that value.
        last: dict[Kept, int] = {}
        for (value, base), readers in steps[step].kept.items():
            what = (storage_owner(value), None) if base is None else (value, base)
            ends = [order[reader, branch] for reader in readers if (reader, branch) in order]
            last[what] = max([last.get(what, place), *ends])
        for (value, _), end in last.items():
            size = g.tensor_bytes([value.meta["val"]])
            changes[place] += size
            changes[end] -= size
    return max(itertools.accumulate(changes))
