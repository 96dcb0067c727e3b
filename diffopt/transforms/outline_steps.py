"""Outline a step: the denoiser's call and the arithmetic around it become one body.

The root graph is cut at the calls of its costliest component. A step is the call, what only
prepares its arguments, and what follows up to the next step's preparation. What all steps have in
common becomes calls of one body, which takes the values from outside (constants among them) as
arguments. What only some of them have, such as the history of a multistep solver, stays in the
root graph: the denoiser is in one body whatever the solver. Where steps call different bodies, as
after caching, this goes for the steps of each.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import fx

from diffopt.core import Context
from diffopt.ir import call_tags
from diffopt.ir import graph as g
from diffopt.ir.flops import graph_flops
from diffopt.ir.printing import format_type
from diffopt.ir.program import Program
from diffopt.ir.step_tables import is_view


@dataclass(eq=False)
class Step:
    """One step's nodes in the root graph, and which of them all steps have.

    Attributes:
        call: The call of the costliest component.
        nodes: All of the step, in the order of the graph.
        inside: The part that all steps have.
        twins: Which value here a value in or around that part of the model step is.
    """

    call: fx.Node
    nodes: list[fx.Node] = field(default_factory=list)
    inside: set[fx.Node] = field(default_factory=set)
    twins: dict[fx.Node, fx.Node] = field(default_factory=dict)


def outline_steps(program: Program, ctx: Context) -> None:
    """Make what all steps of the sampling loop have in common calls of one body."""
    anchors = _anchors(program)
    if len(anchors) < 2:
        ctx.skip("steps", "no component is called more than once")
        return
    _complete_items(program.root)
    groups: dict[str, list[Step]] = {}
    for step in _cut(program, anchors):
        groups.setdefault(str(step.call.target), []).append(step)
    # All bodies are made before the first call changes what the others are made from.
    parts = [part for steps in groups.values() if (part := _find_part(program, steps, ctx))]
    replaced: dict[fx.Node, fx.Node] = {}
    for part in parts:
        for step in part.steps:
            _call(program, part, step, replaced)
    if parts:
        g.sort_topologically(program.root)
        ctx.note("steps outlined", sum(len(part.steps) for part in parts))


def _find_part(program: Program, steps: Sequence[Step], ctx: Context) -> Part | None:
    """Make a body of what steps have in common; None if that is the call alone."""
    if len(steps) < 2:
        ctx.skip(steps[0].call, "no other step calls this body")
        return None
    # From the middle, as the first and the last may lack a neighbour; two, as some solvers take
    # turns, and a value that only one kind of step uses twice is one argument there.
    models = steps[len(steps) // 2 - 1 :][:2]
    model = max(models, key=lambda step: len(_find_common(step, steps)))
    nodes = _find_common(model, steps)
    if all(n.op == "call_module" or _is_item(n) for n in nodes):
        ctx.skip("steps", "they have nothing in common but the call")
        return None
    _skip_rest(steps, ctx)
    return _make_part(program, model, nodes, steps)


def _skip_rest(steps: Sequence[Step], ctx: Context) -> None:
    """Say how many steps are more than one call: what not all have stays between the calls."""
    calls = [step.call for step in steps]
    loop = g.descendants(calls) & g.ancestors(calls)
    rest = [len(loop.intersection(step.nodes) - step.inside) for step in steps]
    if any(rest):
        more = sum(count > 0 for count in rest)
        reason = f"{more} of {len(steps)} have nodes that not all have, up to {max(rest)}"
        ctx.skip("steps", f"{reason}: these stay outside of the shared body")


def _complete_items(root: fx.GraphModule) -> None:
    """Give each tuple of values one node for each of its values, so that equal steps look equal."""
    for node in list(root.graph.nodes):
        if not isinstance(node.meta.get("val"), (tuple, list)) or node.op == "output":
            continue
        items: dict[object, fx.Node] = {}
        for user in list(node.users):
            first = items.setdefault(user.args[1], user)
            if first is not user:
                user.replace_all_uses_with(first)
        with root.graph.inserting_after(node):
            for index in range(len(node.meta["val"])):
                if index not in items:
                    g.call(root.graph, operator.getitem, node, index)


def _anchors(program: Program) -> list[fx.Node]:
    """Return the calls of the component on which the loop spends most, in order.

    Calls of other bodies that took the place of such calls are among them.
    """
    costs = {n: graph_flops(gm) * len(program.calls(n)) for n, gm in program.components.items()}
    loops = [n for n in costs if len(program.calls(n)) > 1]
    if not loops:
        return []
    main = program.calls(max(loops, key=costs.__getitem__))
    own = {_branch(call) for call in main} - {None}
    return [call for call in program.calls() if call in main or _branch(call) in own]


def _branch(call: fx.Node) -> tuple[str, int] | None:
    tag = call_tags.tag(call)
    return (tag.component, tag.branch) if tag else None


def _cut(program: Program, anchors: Sequence[fx.Node]) -> list[Step]:
    """Return every step with all nodes that may belong to it."""
    nodes = list(program.root.graph.nodes)
    number = {call: k for k, call in enumerate(anchors)}
    after: dict[fx.Node, int] = {}  # the last call that a node depends on
    for node in nodes:
        after[node] = max([number.get(node, -1), *(after[n] for n in node.all_input_nodes)])
    place = dict(after)  # the step that a node belongs to
    preparing = set(anchors)  # calls, and what does nothing but prepare the arguments of one
    moved = True
    while moved:  # what a node needs may move after it was looked at
        moved = False
        for node in reversed(nodes):
            if node.op not in ("call_function", "call_module") or node in number or not node.users:
                continue
            if node.args and node.args[0] in number:
                continue  # a result belongs to its call
            users = {place[user] if user.op != "output" else len(anchors) for user in node.users}
            later = after[node] + 1
            if place[node] == later or users != {later} or later == len(anchors):
                continue
            if preparing.issuperset(node.users):
                preparing.add(node)
            elif not _stays_small(node, after, place):
                continue
            place[node] = later
            moved = True
    steps = [Step(call, []) for call in anchors]
    for node in nodes:
        if node.op in ("call_function", "call_module") and place[node] >= 0:
            steps[place[node]].nodes.append(node)
    return steps


def _stays_small(node: fx.Node, after: dict[fx.Node, int], place: dict[fx.Node, int]) -> bool:
    """Tell whether the next step can compute a node itself without getting more from this one."""
    more = [
        n
        for n in node.all_input_nodes
        if n.op != "get_attr"
        and after[n] == after[node]
        and not any(u is not node and place[u] > after[node] for u in n.users)
    ]
    if not more or is_view(node):
        return True
    sizes = [g.value_bytes(n.meta["val"]) for n in (*more, node)]
    return sum(sizes[:-1]) < sizes[-1]


def _find_common(model: Step, steps: Sequence[Step]) -> list[fx.Node]:
    """Find the part around the call that all steps have; return the model's nodes of it."""
    common = {model.call}
    for step in steps:
        step.inside, step.twins = {step.call}, {model.call: step.call}
        if not _pair(model.call.args, step.call.args, step, step.twins):
            return []
    size = 0
    while len(common) > size:
        size = len(common)
        for node in reversed(model.nodes):  # what prepares the part, users first
            if node not in common and node in model.twins:
                _add(model, node, steps, common)
        for node in model.nodes:  # what follows, in order: of two equal users the first is the twin
            if node not in common and not common.isdisjoint(node.all_input_nodes):
                _add(model, node, steps, common)
    tuples = {n for n in common if _is_item(n) and n.args[0] not in common}
    nodes = [n for n in model.nodes if n in common - tuples]
    for step in steps:
        step.inside = {step.twins[n] for n in nodes}
    return nodes


def _is_item(node: fx.Node) -> bool:
    return node.target is operator.getitem


def _add(model: Step, node: fx.Node, steps: Sequence[Step], common: set[fx.Node]) -> None:
    """Add a node to the common part if every step has it."""
    found = []
    for step in steps:
        pairs = _find_twin(node, step, common, [node] if step is model else None)
        if pairs is None:
            return
        found.append(pairs)
    common.add(node)
    for step, pairs in zip(steps, found, strict=True):
        step.twins.update(pairs)
        step.inside.add(pairs[node])


def _find_twin(
    node: fx.Node, step: Step, common: set[fx.Node], candidates: Sequence[fx.Node] | None
) -> dict[fx.Node, fx.Node] | None:
    """Return what a node of the model step and the values that it reads are in another step."""
    if candidates is None and node in step.twins:
        candidates = [step.twins[node]]
    if candidates is None:
        users = next(step.twins[n].users for n in node.all_input_nodes if n in common)
        candidates = [n for n in step.nodes if n in users]
    for twin in candidates:
        if twin in step.inside or twin not in step.nodes:
            continue
        if twin.op != node.op or twin.target != node.target:
            continue
        pairs = {node: twin}
        if not _pair((node.args, node.kwargs), (twin.args, twin.kwargs), step, pairs):
            continue
        if _is_convex(step.nodes, step.inside | {twin}):
            return pairs
    return None


def _pair(a: object, b: object, step: Step, pairs: dict[fx.Node, fx.Node]) -> bool:
    """Compare arguments; values from outside the part are added to `pairs` where they can be."""
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        known = step.twins.get(a, pairs.get(a))
        if known is not None:
            return known is b
        if b in step.inside or format_type(a.meta["val"]) != format_type(b.meta["val"]):
            return False
        pairs[a] = b
        return True
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_pair(a[k], b[k], step, pairs) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        both = zip(a, b, strict=False)
        return len(a) == len(b) and all(_pair(x, y, step, pairs) for x, y in both)
    return type(a) is type(b) and a == b


def _is_convex(nodes: Iterable[fx.Node], part: set[fx.Node]) -> bool:
    """Tell whether no value leaves the part and comes back: it can be one call then."""
    between: set[fx.Node] = set()
    for node in nodes:
        comes_back = not between.isdisjoint(node.all_input_nodes)
        if node in part and comes_back:
            return False
        if node not in part and (comes_back or not part.isdisjoint(node.all_input_nodes)):
            between.add(node)
    return True


def _outside(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Return the values that nodes read and that are none of them, in order of first use."""
    own = set(nodes)
    return list(dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in own))


@dataclass(eq=False)
class Part:
    """What steps have in common, as a body to call.

    Attributes:
        name: The body's name as a component.
        steps: Those that have it.
        passed: The body's arguments, as nodes of the model step.
        results: The body's results, as nodes of the model step.
    """

    name: str
    steps: Sequence[Step]
    passed: Sequence[fx.Node]
    results: Sequence[fx.Node]


def _make_part(
    program: Program, model: Step, nodes: Sequence[fx.Node], steps: Sequence[Step]
) -> Part:
    """Add the common part of the steps, given as the model's nodes, as a component."""
    root = program.root
    # The getitems of a call may be outputs; the call itself, a tuple of values, is none.
    outputs = [
        n
        for n in nodes
        if not isinstance(n.meta["val"], (tuple, list))
        and any(set(s.twins[n].users) - s.inside for s in steps)
    ]
    outside = _outside(nodes)
    shared = [
        n for n in outside if n.op == "get_attr" and len({s.twins[n].target for s in steps}) == 1
    ]
    passed = [n for n in outside if n not in shared]
    reused = set(call_tags.reused(root, model.call).values())
    body, env = g.new_body("step"), dict[fx.Node, fx.Node]()
    for i, node in enumerate(passed):
        env[node] = body.graph.placeholder(f"arg{i}")
        env[node].meta["val"] = node.meta["val"]
        if node in reused:
            env[node].meta["reuse"] = True
    g.copy_nodes(shared, root, body, env)
    g.copy_inlined(nodes, root, body, env)
    body.graph.output(())
    g.set_outputs(body, [env[n] for n in outputs])
    body.recompile()
    name = program.add_component(f"{model.call.target}_step", body)
    return Part(name, steps, passed, outputs)


def _call(program: Program, part: Part, step: Step, replaced: dict[fx.Node, fx.Node]) -> None:
    """Call the body in place of a step's part; `replaced` says which results took whose place."""
    with program.root.graph.inserting_after(step.nodes[-1]):
        given = [replaced.get(step.twins[n], step.twins[n]) for n in part.passed]
        values = program.insert_call(part.name, given, call_tags.tag(step.call))
    for node, value in zip([step.twins[n] for n in part.results], values, strict=True):
        replaced[node] = value
        node.replace_all_uses_with(value, delete_user_cb=lambda user: user not in step.inside)
    for node in step.inside:  # dead now; the graph is pruned when the pass is done
        node.args, node.kwargs = (), {}
