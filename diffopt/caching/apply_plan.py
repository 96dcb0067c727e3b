"""Rewrite a sampling loop to reuse values of earlier steps: the mechanism of every cache policy.

The loop calls one body once a step. A plan says which values of the body a step reuses from which
earlier steps of the same branch, as they were there or as a weighted sum:

    v@i := sum w[k] * v@k                          # reuse is one term of weight 1
    v@i := base@i + sum w[k] * (v - base)@k        # the same with what v adds to another value

`apply` makes a body for each distinct set of reuses and exports. A reused value is an argument of
its body, and operators that only it needed are removed; an exported value is one more result. The
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
from diffopt.caching.reuse_plan import Export, Plan, ResolvedReuse, Reuse, StepPlan, Term
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

__all__ = ["Loop", "Plan", "PlanCost", "Reuse", "Term", "apply", "find_loop", "merge_calls"]

aten = torch.ops.aten

# Bodies


@dataclass(eq=False)
class _Variant:
    """A body with some values reused and others exported.

    Attributes:
        name: Its name as a component.
        body: Its graph.
        result_index: The index among its results of each export.
    """

    name: str
    body: fx.GraphModule
    result_index: dict[Export, int]


def _bodies_of_steps(loop: Loop, steps: Sequence[StepPlan]) -> list[_Variant]:
    """Return the body of every step.

    A step shares the body of one with the same reuses and more exports if that costs no FLOPs.
    """
    by_form: dict[Any, list[_Variant]] = {}
    of_step: dict[int, _Variant] = {}
    for index in sorted(range(len(steps)), key=lambda i: -len(steps[i].exports)):
        step = steps[index]
        form = tuple(item.signature for item in step.reuses), step.flops(loop)
        variants = by_form.setdefault(form, [])
        fitting = (v for v in variants if step.exports.keys() <= v.result_index.keys())
        variant = next(fitting, None)
        if variant is None:
            variant = _make_variant(loop, step)
            variants.append(variant)
        of_step[index] = variant
    return [of_step[index] for index in range(len(steps))]


def _make_variant(loop: Loop, step: StepPlan) -> _Variant:
    """Add the body of a step to the program."""
    if not step.reuses and not step.exports:
        return _Variant(loop.name, loop.body, {})
    body = g.clone(loop.body)
    copies = dict(zip(loop.body.graph.nodes, body.graph.nodes, strict=True))
    for item in step.reuses:
        copies[item.value] = _add_reuse(body, item, copies)
    results, result_index = g.outputs(body), dict[Export, int]()
    for value, base in sorted(step.exports, key=lambda e: [loop.positions[n] for n in e if n]):
        exported = copies[value]
        if base is not None:
            with body.graph.inserting_before(g.output_node(body)):
                exported = g.call(body.graph, aten.sub.Tensor, exported, copies[base], like=value)
        if exported not in results:
            results.append(exported)
        result_index[value, base] = results.index(exported)
    g.set_outputs(body, results)
    g.prune_unused(body)
    return _Variant(loop.program.add_component(loop.name, body), body, result_index)


def _add_reuse(
    body: fx.GraphModule, item: ResolvedReuse, copies: Mapping[fx.Node, fx.Node]
) -> fx.Node:
    """Replace a value of a body by arguments, or by their weighted sum; return that."""
    value = copies[item.value]
    past = [add_placeholder(body, "reused") for _ in item.weights]
    for node in past:
        node.meta |= {"val": g.fake(item.exported_type()), "reuse": True}
    result = past[0]
    if item.is_sum:
        weights = [add_placeholder(body, "weight") for _ in past]
        for node in weights:
            node.meta["val"] = g.fake(torch.tensor(1.0, dtype=item.weight_dtype()))
        with body.graph.inserting_before(value):
            terms = [
                g.call(body.graph, aten.mul.Tensor, *pair, like=value)
                for pair in zip(past, weights, strict=True)
            ]
            result = terms[0]
            for term in terms[1:]:
                result = g.call(body.graph, aten.add.Tensor, result, term, like=value)
    if item.base is not None:
        with body.graph.inserting_before(value):
            result = g.call(body.graph, aten.add.Tensor, copies[item.base], result, like=value)
    value.replace_all_uses_with(result)
    if not nodes.same_layout(result, value):
        propagate_layouts(body, {result})
    return result


# The program


@dataclass(frozen=True)
class PlanCost:
    """The cost of a loop before and after a plan was applied.

    Attributes:
        bodies: How many bodies the loop's calls have.
        flops_before: Floating point operations of all calls of the loop before.
        flops_after: The same of the calls that are left.
        peak_cache_bytes: The most bytes of exported values that are alive between two calls.
    """

    bodies: int
    flops_before: int
    flops_after: int
    peak_cache_bytes: int


def apply(program: Program, loop: Loop, plan: Plan) -> PlanCost:
    """Rewrite the loop's calls in place so that every step reuses the values that the plan says.

    Reuses that no result depends on are dropped. A term of a step that reuses the value itself
    means that step's terms. Calls keep their tags; a call with nothing left to compute is removed.

    Args:
        program: The program to rewrite.
        loop: Its loop, from `find_loop`.
        plan: The reuses of each step.

    Raises:
        DiffoptError: The plan names unknown values, or a source step lacks a branch's call.
    """
    reuse_plan.check_plan(loop, plan)
    flops_before = len(loop.calls) * loop.flops()
    steps = reuse_plan.resolve(loop, plan)
    _check_branches(loop, steps)
    variants = _bodies_of_steps(loop, steps)
    _pass_values(program, loop, steps, variants)
    for name in dict.fromkeys(v.name for v in variants if v.body is not loop.body):
        component_signatures.trim_outputs(program, name)
        component_signatures.drop_unread_arguments(program, name)
    program.refresh()
    loop_calls = set(loop.calls.values())
    bodies = [str(call.target) for call in program.calls() if call in loop_calls]
    costs = {name: graph_flops(program.components[name]) for name in bodies}
    flops_after = sum(costs[name] for name in bodies)
    return PlanCost(len(costs), flops_before, flops_after, _peak_bytes(loop, steps))


def _check_branches(loop: Loop, steps: Sequence[StepPlan]) -> None:
    """Raise where a source step has no call of a branch."""
    for step, branch in loop.calls:
        for item in steps[step].reuses:
            for source in item.weights:
                if (source, branch) not in loop.calls:
                    raise DiffoptError(
                        f"{loop.name}, step {step}: {item.value} is taken from step {source}, "
                        f"which has no call of branch {branch}"
                    )


def _pass_values(
    program: Program, loop: Loop, steps: Sequence[StepPlan], variants: Sequence[_Variant]
) -> None:
    """Retarget every call to its step's body, with the reused values as arguments."""
    graph = program.root.graph
    weights: dict[tuple[float, torch.dtype], Tensor] = {}
    exported: dict[tuple[fx.Node, int], fx.Node] = {}

    def result(key: CallKey, export: Export) -> fx.Node:
        call, index = loop.calls[key], variants[key[0]].result_index[export]
        if (call, index) not in exported:
            with graph.inserting_after(call):
                exported[call, index] = g.call(graph, operator.getitem, call, index)
        return exported[call, index]

    for (step, branch), call in loop.calls.items():  # earlier ones are done
        arguments = list(call.args)
        with graph.inserting_before(call):
            for item in steps[step].reuses:
                arguments += [result((source, branch), item.export) for source in item.weights]
                if not item.is_sum:
                    continue
                for number in item.weights.values():
                    key = number, item.weight_dtype()
                    tensor = weights.setdefault(key, torch.tensor(number, dtype=key[1]))
                    arguments.append(g.get_attr(program.root, "weight", tensor))
        call.args, call.target = tuple(arguments), variants[step].name
        call.meta["val"] = tuple(n.meta["val"] for n in g.outputs(variants[step].body))


def _peak_bytes(loop: Loop, steps: Sequence[StepPlan]) -> int:
    """Return the most bytes of exported values that are alive between two calls."""
    order = {key: place for place, key in enumerate(loop.calls)}
    deltas = [0] * (len(order) + 1)
    for (step, branch), place in order.items():
        # Views of one value keep that value.
        last: dict[Export, int] = {}
        for (value, base), readers in steps[step].exports.items():
            stored = (storage_owner(value), None) if base is None else (value, base)
            reads = [order[reader, branch] for reader in readers if (reader, branch) in order]
            last[stored] = max([last.get(stored, place), *reads])
        for (value, _), end in last.items():
            size = g.tensor_bytes([value.meta["val"]])
            deltas[place] += size
            deltas[end] -= size
    return max(itertools.accumulate(deltas))
