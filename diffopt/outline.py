"""Outline a step: the denoiser's call and the arithmetic around it become one body.

The root graph is cut at the calls of its costliest component. A step is the call, what only
prepares its arguments, and what follows up to the next step's preparation. Steps that are equal up
to the values
that come from outside (constants among them) become calls of one body, which takes those as
arguments.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from torch import fx

from diffopt import graph as g
from diffopt.core import Context
from diffopt.program import Program
from diffopt.tables import is_view


@dataclasses.dataclass
class Step:
    """One step's nodes in the root graph, and the values from outside that they read."""

    call: fx.Node
    nodes: list[fx.Node]
    """In the order of the step that the others were matched with."""
    outside: list[fx.Node]


def outline_steps(program: Program, ctx: Context) -> None:
    """Make each step of the sampling loop one call of a body shared by all equal steps."""
    anchors = _anchors(program)
    if len(anchors) < 2:
        ctx.skip("steps", "no component is called more than once")
        return
    steps = _cut(program, anchors)
    if all(n is s.call or s.call in n.args for s in steps for n in s.nodes):
        ctx.skip("steps", "each is one call already")
        return
    left = list(steps)
    outlined = 0
    replaced: dict[fx.Node, fx.Node] = {}
    while len(left) > 1:
        # A middle step stands for all: the first and the last may lack a neighbour.
        model = left[len(left) // 2]
        group = [s for s in (_match(model, other) for other in left) if s is not None]
        calls = {model.call, *(s.call for s in group)}
        left = [s for s in left if s.call not in calls]
        if len(group) > 1 and model.call in {s.call for s in group}:
            _replace(program, model, group, replaced)
            outlined += len(group)
        else:
            ctx.skip(model.call, "no other step is equal to this one")
    for step in left:
        ctx.skip(step.call, "no other step is equal to this one")
    g.sort(program.root)
    ctx.note("steps outlined", [outlined, len(steps)])


def _anchors(program: Program) -> list[fx.Node]:
    """Return the calls of the component on which the loop spends most, in order."""
    costs = {n: g.flops(gm) * len(program.calls(n)) for n, gm in program.components.items()}
    loops = [n for n in costs if len(program.calls(n)) > 1]
    return program.calls(max(loops, key=costs.__getitem__)) if loops else []


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
    steps = [Step(call, [], []) for call in anchors]
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
    sizes = [_bytes(n) for n in (*more, node)]
    return sum(sizes[:-1]) < sizes[-1]


def _bytes(node: fx.Node) -> int:
    value = node.meta["val"]
    return g.tensor_bytes(value if isinstance(value, (tuple, list)) else [value])


def _match(model: Step, other: Step) -> Step | None:
    """Return the part of `other` that is equal to `model` up to values from outside, or None."""
    inside = set(model.nodes)
    # In the order of the graph: of two equal users the first is the twin of the model's first.
    allowed = {node: i for i, node in enumerate(other.nodes)}
    pairs: dict[fx.Node, fx.Node] = {}
    taken: set[fx.Node] = set()

    def same(a: object, b: object) -> bool:
        """Compare two arguments, walking back through what prepares the call."""
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            if a in pairs:
                return pairs[a] is b
            if g.type_text(a.meta["val"]) != g.type_text(b.meta["val"]):
                return False
            if a in inside:
                return b in allowed and b not in taken and pair(a, b)
            if b in taken:
                return False
            pairs[a] = b
            return True
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
        return type(a) is type(b) and a == b

    def pair(a: fx.Node, b: fx.Node) -> bool:
        if a.op != b.op or a.target != b.target or a.kwargs.keys() != b.kwargs.keys():
            return False
        if not same(a.args, b.args) or not all(same(a.kwargs[k], b.kwargs[k]) for k in a.kwargs):
            return False
        pairs[a] = b
        taken.add(b)
        return True

    if not pair(model.call, other.call):
        return None
    waiting = [n for n in model.nodes if n not in pairs]
    while waiting:
        for node in waiting:
            if node in pairs:
                continue
            known = [pairs[n] for n in node.all_input_nodes if n in inside and n in pairs]
            users = [u for k in known[:1] for u in k.users if u in allowed and u not in taken]
            any(_try(pair, pairs, taken, node, u) for u in sorted(users, key=allowed.__getitem__))
        left = [n for n in waiting if n not in pairs]
        if len(left) == len(waiting):
            return None
        waiting = left
    nodes = [pairs[n] for n in model.nodes]
    outside = [pairs[n] for n in _outside(model.nodes)]
    # A value from outside that depends on the step would have to be both before and after its call.
    if g.ancestors(outside) & set(nodes):
        return None
    return Step(other.call, nodes, outside)


class _Outside:
    """Tell whether a user of a value is none of some nodes."""

    def __init__(self, nodes: set[fx.Node]) -> None:
        self.nodes = nodes

    def __call__(self, user: fx.Node) -> bool:
        return user not in self.nodes


def _try(
    pair: Callable[[fx.Node, fx.Node], bool],
    pairs: dict[fx.Node, fx.Node],
    taken: set[fx.Node],
    node: fx.Node,
    candidate: fx.Node,
) -> bool:
    """Match two nodes; where they differ, forget what was matched on the way."""
    before = dict(pairs), set(taken)
    if pair(node, candidate):
        return True
    pairs.clear()
    pairs.update(before[0])
    taken.clear()
    taken.update(before[1])
    return False


def _outside(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Return the values that nodes read and that are none of them, in order of first use."""
    own = set(nodes)
    return list(dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in own))


def _replace(
    program: Program, model: Step, group: Sequence[Step], replaced: dict[fx.Node, fx.Node]
) -> None:
    """Replace equal steps by calls of one body; `replaced` says which results took whose place."""
    root = program.root
    model = next(s for s in group if s.call is model.call)
    outputs = [
        i
        for i in range(len(model.nodes))
        if any(set(s.nodes[i].users) - set(s.nodes) for s in group)
    ]
    # The getitems of a call may be outputs; the call itself, a tuple of values, is none.
    outputs = [i for i in outputs if not isinstance(model.nodes[i].meta["val"], tuple)]
    shared = [
        i
        for i, n in enumerate(model.outside)
        if n.op == "get_attr" and len({s.outside[i].target for s in group}) == 1
    ]
    passed = [i for i in range(len(model.outside)) if i not in shared]
    body, env = g.new_body("step"), dict[fx.Node, fx.Node]()
    for i in passed:
        env[model.outside[i]] = body.graph.placeholder(f"arg{i}")
        env[model.outside[i]].meta["val"] = model.outside[i].meta["val"]
    g.copy_nodes([model.outside[i] for i in shared], root, body, env)
    g.copy_inlined(model.nodes, root, body, env)
    results = [env[model.nodes[i]] for i in outputs]
    body.graph.output(tuple(results))
    g.set_outputs(body, results)
    body.recompile()
    name = program.add_component(f"{model.call.target}_step", body)
    for step in group:
        with root.graph.inserting_after(step.nodes[-1]):
            values = program.call(
                name, [replaced.get(step.outside[i], step.outside[i]) for i in passed]
            )
        own = set(step.nodes)
        for i, value in zip(outputs, values, strict=True):
            replaced[step.nodes[i]] = value
            step.nodes[i].replace_all_uses_with(value, delete_user_cb=_Outside(own))
        for node in step.nodes:  # dead now; the graph is pruned when all steps are done
            node.args, node.kwargs = (), {}
