"""Outline a step: the denoiser's call and the arithmetic around it become one body.

The root graph is cut at the calls of its costliest component. A step is the call, the nodes that
only prepare its arguments, and those that follow up to the next step's preparation. The nodes that
all steps have become calls of one body, whose arguments are the values from outside (constants
among them). Nodes that only some steps have, such as the history of a multistep solver, are left in
the root graph: the denoiser is in one body whatever the solver. Where steps call different bodies,
as after caching, the steps of each are outlined separately.
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
        inside: Those that all steps have.
        matches: This step's nodes by the model step's, inside and in front of that part.
    """

    call: fx.Node
    nodes: list[fx.Node] = field(default_factory=list)
    inside: set[fx.Node] = field(default_factory=set)
    matches: dict[fx.Node, fx.Node] = field(default_factory=dict)


def outline_steps(program: Program, ctx: Context) -> None:
    """Replace the nodes that all steps of the sampling loop have by calls of one body."""
    calls = _loop_calls(program)
    if len(calls) < 2:
        ctx.skip("steps", "no component is called more than once")
        return
    _complete_items(program.root)
    groups: dict[str, list[Step]] = {}
    for step in _cut(program, calls):
        groups.setdefault(str(step.call.target), []).append(step)
    # All bodies are built before the first call is inserted, which changes the graph.
    bodies = [shared for steps in groups.values() if (shared := _outline(program, steps, ctx))]
    replaced: dict[fx.Node, fx.Node] = {}
    for shared in bodies:
        for step in shared.steps:
            _call(program, shared, step, replaced)
    if bodies:
        g.sort_topologically(program.root)
        ctx.note("steps outlined", sum(len(shared.steps) for shared in bodies))


def _outline(program: Program, steps: Sequence[Step], ctx: Context) -> SharedBody | None:
    """Build a body of the nodes that all steps have; None if that is the call alone."""
    if len(steps) < 2:
        ctx.skip(steps[0].call, "no other step calls this body")
        return None
    # From the middle, as the first and the last may lack a neighbour; two, as some solvers
    # alternate between two kinds of steps, and one may read a value twice, as one argument.
    models = steps[len(steps) // 2 - 1 :][:2]
    model = max(models, key=lambda step: len(_find_common(step, steps)))
    nodes = _find_common(model, steps)
    if all(n.op == "call_module" or _is_item(n) for n in nodes):
        ctx.skip("steps", "they have nothing in common but the call")
        return None
    _skip_rest(steps, ctx)
    return _make_body(program, model, nodes, steps)


def _skip_rest(steps: Sequence[Step], ctx: Context) -> None:
    """Report how many steps have nodes that not all have, which are left between the calls."""
    calls = [step.call for step in steps]
    loop = g.descendants(calls) & g.ancestors(calls)
    rest = [len(loop.intersection(step.nodes) - step.inside) for step in steps]
    if any(rest):
        more = sum(count > 0 for count in rest)
        reason = f"{more} of {len(steps)} have nodes that not all have, up to {max(rest)}"
        ctx.skip("steps", f"{reason}: these stay outside of the shared body")


def _complete_items(root: fx.GraphModule) -> None:
    """Insert one getitem for each value of a tuple, so that equal steps have equal nodes."""
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


def _loop_calls(program: Program) -> list[fx.Node]:
    """Return the calls of the loop's component with most FLOPs, in order.

    Calls of other bodies that passes have replaced such calls by are among them.
    """
    costs = {n: graph_flops(gm) * len(program.calls(n)) for n, gm in program.components.items()}
    loops = [n for n in costs if len(program.calls(n)) > 1]
    if not loops:
        return []
    main = program.calls(max(loops, key=costs.__getitem__))
    branches = {_branch(call) for call in main} - {None}
    return [call for call in program.calls() if call in main or _branch(call) in branches]


def _branch(call: fx.Node) -> tuple[str, int] | None:
    tag = call_tags.tag(call)
    return (tag.component, tag.branch) if tag else None


def _cut(program: Program, calls: Sequence[fx.Node]) -> list[Step]:
    """Assign nodes to steps; return the steps."""
    nodes = list(program.root.graph.nodes)
    number = {call: k for k, call in enumerate(calls)}
    after: dict[fx.Node, int] = {}  # the last call that a node depends on
    for node in nodes:
        after[node] = max([number.get(node, -1), *(after[n] for n in node.all_input_nodes)])
    step_of = dict(after)  # the step that a node belongs to
    preparing = set(calls)  # calls, and nodes that only prepare the arguments of one
    changed = True
    while changed:  # an input may move after its user was visited
        changed = False
        for node in reversed(nodes):
            if node.op not in ("call_function", "call_module") or node in number or not node.users:
                continue
            if node.args and node.args[0] in number:
                continue  # a result belongs to its call
            users = {step_of[user] if user.op != "output" else len(calls) for user in node.users}
            later = after[node] + 1
            if step_of[node] == later or users != {later} or later == len(calls):
                continue
            if preparing.issuperset(node.users):
                preparing.add(node)
            elif not _is_cheaper(node, after, step_of):
                continue
            step_of[node] = later
            changed = True
    steps = [Step(call, []) for call in calls]
    for node in nodes:
        if _is_item(node):  # no value of a tuple without the tuple
            step_of[node] = step_of[node.all_input_nodes[0]]
        if node.op in ("call_function", "call_module") and step_of[node] >= 0:
            steps[step_of[node]].nodes.append(node)
    return steps


def _is_cheaper(node: fx.Node, after: dict[fx.Node, int], step_of: dict[fx.Node, int]) -> bool:
    """Tell whether moving a node to the next step passes no more bytes to it."""
    more = [
        n
        for n in node.all_input_nodes
        if n.op != "get_attr"
        and after[n] == after[node]
        and not any(u is not node and step_of[u] > after[node] for u in n.users)
    ]
    if not more or is_view(node):
        return True
    sizes = [g.value_bytes(n.meta["val"]) for n in (*more, node)]
    return sum(sizes[:-1]) < sizes[-1]


def _find_common(model: Step, steps: Sequence[Step]) -> list[fx.Node]:
    """Grow the part around the call that all steps have; return the model's nodes of it."""
    common = {model.call}
    for step in steps:
        step.inside, step.matches = {step.call}, {model.call: step.call}
        if not _pair(model.call.args, step.call.args, step, step.matches):
            return []
    size = 0
    while len(common) > size:
        size = len(common)
        for node in reversed(model.nodes):  # the part's inputs, users first
            if node not in common and node in model.matches:
                _add(model, node, steps, common)
        for node in model.nodes:  # its users: of two equal ones the first corresponds
            if node not in common and not common.isdisjoint(node.all_input_nodes):
                _add(model, node, steps, common)
    tuples = {n for n in common if _is_item(n) and n.args[0] not in common}
    nodes = [n for n in model.nodes if n in common - tuples]
    for step in steps:
        step.inside = {step.matches[n] for n in nodes}
    return nodes


def _is_item(node: fx.Node) -> bool:
    return node.target is operator.getitem


def _add(model: Step, node: fx.Node, steps: Sequence[Step], common: set[fx.Node]) -> None:
    """Add a node to the common part if every step has it."""
    pairs_of_steps = []
    for step in steps:
        pairs = _find_match(node, step, common, [node] if step is model else None)
        if pairs is None:
            return
        pairs_of_steps.append(pairs)
    common.add(node)
    for step, pairs in zip(steps, pairs_of_steps, strict=True):
        step.matches.update(pairs)
        step.inside.add(pairs[node])


def _find_match(
    node: fx.Node, step: Step, common: set[fx.Node], candidates: Sequence[fx.Node] | None
) -> dict[fx.Node, fx.Node] | None:
    """Return the counterparts of a model's node and its inputs in another step; None without."""
    if candidates is None and node in step.matches:
        candidates = [step.matches[node]]
    if candidates is None:
        users = next(step.matches[n].users for n in node.all_input_nodes if n in common)
        candidates = [n for n in step.nodes if n in users]
    for match in candidates:
        if match in step.inside or match not in step.nodes:
            continue
        if match.op != node.op or match.target != node.target:
            continue
        if any(m is match and n is not node for n, m in step.matches.items()):
            continue  # it is the counterpart of a value from outside of the part, too
        pairs = {node: match}
        if not _pair((node.args, node.kwargs), (match.args, match.kwargs), step, pairs):
            continue
        if _is_convex(step.nodes, step.inside | {match}):
            return pairs
    return None


def _pair(a: object, b: object, step: Step, pairs: dict[fx.Node, fx.Node]) -> bool:
    """Compare arguments; pairs of values from outside of the part are added to `pairs`."""
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        known = step.matches.get(a, pairs.get(a))
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
    """Tell whether no path leaves the part and enters it again: it can be one call then."""
    between: set[fx.Node] = set()
    for node in nodes:
        enters = not between.isdisjoint(node.all_input_nodes)
        if node in part and enters:
            return False
        if node not in part and (enters or not part.isdisjoint(node.all_input_nodes)):
            between.add(node)
    return True


def _outside(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Return the inputs of nodes that are none of them, in order of first use."""
    inside = set(nodes)
    return list(dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in inside))


@dataclass(eq=False)
class SharedBody:
    """The common part of steps, as a body to call.

    Attributes:
        name: The body's name as a component.
        steps: The steps that call it.
        passed: The body's arguments, as nodes of the model step.
        results: The body's results, as nodes of the model step.
    """

    name: str
    steps: Sequence[Step]
    parameters: Sequence[fx.Node]
    results: Sequence[fx.Node]


def _make_body(
    program: Program, model: Step, nodes: Sequence[fx.Node], steps: Sequence[Step]
) -> SharedBody:
    """Add the common part of the steps, which is `nodes` in the model, as a component."""
    root = program.root
    # The getitems of a call may be outputs; the call itself, a tuple, may not.
    outputs = [
        n
        for n in nodes
        if not isinstance(n.meta["val"], (tuple, list))
        and any(set(s.matches[n].users) - s.inside for s in steps)
    ]
    outside = _outside(nodes)
    shared = [
        n for n in outside if n.op == "get_attr" and len({s.matches[n].target for s in steps}) == 1
    ]
    parameters = [n for n in outside if n not in shared]
    reused = set(call_tags.reused(root, model.call).values())
    body, env = g.new_body("step"), dict[fx.Node, fx.Node]()
    for i, node in enumerate(parameters):
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
    return SharedBody(name, steps, parameters, outputs)


def _call(program: Program, body: SharedBody, step: Step, replaced: dict[fx.Node, fx.Node]) -> None:
    """Replace a step's part by a call of the body; `replaced` maps old values to new results."""
    with program.root.graph.inserting_after(step.nodes[-1]):
        arguments = [replaced.get(step.matches[n], step.matches[n]) for n in body.parameters]
        values = program.insert_call(body.name, arguments, call_tags.tag(step.call))
    for node, value in zip([step.matches[n] for n in body.results], values, strict=True):
        replaced[node] = value
        node.replace_all_uses_with(value, delete_user_cb=lambda user: user not in step.inside)
    for node in step.inside:  # dead now; the graph is pruned when the pass is done
        node.args, node.kwargs = (), {}
