"""Guidance in the outer graph: `u + s (c - u)` of the halves of one batched call's result.

`find` follows the result of a call to where its halves are cut out and where they join. With u = c
all of it is c, so the unconditional half need not be computed: `drop` lets a call compute the other
half alone. A result that is also read whole (of which some channels alone are guided) becomes the
conditional half twice.

Not dropped when
- the result is not cut into two halves, or the halves join in another way;
- the body has operators that need both halves, so that nothing would be saved.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from diffopt.analysis.sharding import Shard, shard_call
from diffopt.ir import call_tags, nodes
from diffopt.ir import graph as g
from diffopt.ir.cse import argument_key
from diffopt.ir.flops import graph_flops
from diffopt.ir.nodes import args, is_call
from diffopt.ir.op_sets import SPLITS
from diffopt.ir.printing import format_type, target_name
from diffopt.ir.program import Program
from diffopt.ir.propagation import propagate_layouts
from diffopt.transforms import batch_slice

aten = torch.ops.aten

HALVES = Shard(0, 2), Shard(1, 2)


@dataclass(frozen=True)
class Guidance:
    """Where the halves of a result are cut out, and where they join.

    Attributes:
        picks: What cuts a half out, with the value that it is cut out of.
        guided: What is `u + s (c - u)`, with c.
        conditional: Which half c is.
    """

    picks: dict[fx.Node, fx.Node]
    guided: dict[fx.Node, fx.Node]
    conditional: Shard


class Unguided(Exception):
    """Why a call's unconditional half is computed."""


def drop(
    program: Program, call: fx.Node, known: dict[object, tuple[str, batch_slice.ShardedBody]]
) -> None:
    """Let a call compute the conditional half of its batch alone.

    Calls that read values of this one come first, so that it is known which half they read.

    Args:
        program: The program to rewrite.
        call: A call whose result's first axis has the two branches.
        known: The bodies so far, which calls share.

    Raises:
        Unguided: It must compute both.
    """
    result, loop_carried = _results(call)
    guidance = find(result)
    half = guidance.conditional
    results: dict[int, int | None] = {args(result)[1]: 0}
    results |= {args(node)[1]: _axis_read(node, half) for node in loop_carried}
    name, sharded = _body(program, str(call.target), results, half, known)
    cutter = batch_slice.Cutter(program.root, half)
    whole = [(args(call)[index], axis) for index, axis in sharded.parameters]
    with program.root.graph.inserting_before(call):
        arguments = [node if axis is None else cutter.cut(node, axis) for node, axis in whole]
        new_result, *new = program.insert_call(name, arguments, call_tags.tag(call))
    for node, by in zip(loop_carried, new, strict=True):
        _replace_result(node, by, results[args(node)[1]], half)
    _replace(program, result, new_result, guidance)
    g.sort_topologically(program.root)


def _results(call: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """Return the result that guidance reads, and those that later calls alone read."""
    read = [node for node in call.users if node.users]
    loop_carried = [node for node in read if all(_is_argument(user) for user in node.users)]
    others = [node for node in read if node not in loop_carried]
    if len(others) != 1:
        raise Unguided(f"{len(others)} of its results are read outside of calls")
    return others[0], loop_carried


def _is_argument(node: fx.Node) -> bool:
    is_cut = is_call(node, aten.slice.Tensor)
    return node.op == "call_module" or (is_cut and all(u.op == "call_module" for u in node.users))


def _axis_read(node: fx.Node, half: Shard) -> int | None:
    """Return the axis along which all readers of a value cut out the same half of it."""
    axes = {half.cut_by(user) for user in node.users}
    return axes.pop() if len(axes) == 1 else None


def _body(
    program: Program,
    name: str,
    results: dict[int, int | None],
    half: Shard,
    known: dict[object, tuple[str, batch_slice.ShardedBody]],
) -> tuple[str, batch_slice.ShardedBody]:
    """Return the name of the body that computes the half, and the body."""
    key = name, tuple(results.items()), half
    if key not in known:
        whole = program.components[name]
        sharded = batch_slice.shard_body(whole, results, half)
        costs = graph_flops(sharded.body), graph_flops(whole)
        if costs[0] >= costs[1]:
            reasons = [target_name(node) for node in sharded.blocked[:1]]
            raise Unguided(f"{reasons[0] if reasons else 'nothing'} needs both halves of it")
        if batch_slice.error(whole, sharded, results, half) > 1:
            raise Unguided("its half of the batch gives other results alone")
        known[key] = program.add_component(f"{name}_half", sharded.body), sharded
    return known[key]


def _replace_result(node: fx.Node, new: fx.Node, axis: int | None, half: Shard) -> None:
    """Let what reads a result, or cuts the half out of it, read the new one."""
    for user in list(node.users):
        if axis is not None and half.cut_by(user) == axis and _is_argument(user):
            user.replace_all_uses_with(new)
        elif axis is None:
            user.replace_input_with(node, new)


def _replace(program: Program, result: fx.Node, half: fx.Node, guidance: Guidance) -> None:
    """Let the conditional half stand for both."""
    graph = program.root.graph
    cutter = batch_slice.Cutter(program.root, guidance.conditional)
    cutter.known[result, 0] = half
    for node, conditional in guidance.guided.items():
        node.replace_all_uses_with(conditional)  # u + s (c - u) with u = c
    changed = set()
    for pick, value in guidance.picks.items():
        new = cutter.cut(value, 0)
        if pick.meta["val"].dim() < value.meta["val"].dim():
            with graph.inserting_before(pick):
                new = g.call(graph, aten.select.int, new, 0, 0, like=pick)
        pick.replace_all_uses_with(new)
        if not nodes.same_layout(new, pick):
            changed.add(new)
    g.prune_unused(program.root)
    rest = [user for user in result.users if user.users]
    if rest:
        with graph.inserting_before(rest[0]):
            twice = g.call(graph, aten.cat.default, [half, half], like=result)
        for user in rest:
            user.replace_input_with(result, twice)
    propagate_layouts(program.root, changed)


# Analysis


def find(result: fx.Node) -> Guidance:
    """Return the guidance that reads a call's result."""
    later = g.descendants([result])
    nodes = [node for node in result.graph.nodes if node in later and node.op != "output"]
    both, picks, sides = {result}, dict[fx.Node, tuple[fx.Node, int]](), dict[fx.Node, set[int]]()
    joins = []
    for node in nodes[1:]:
        sources = [n for n in node.all_input_nodes if n in later]
        if (half := _half(node, both)) is not None:
            picks[node] = half
            sides[node] = {half[1]}
        elif both.issuperset(sources) and _keeps_rows(node, sources):
            both.add(node)
        else:
            read = [sides.get(n, set()) for n in sources]
            sides[node] = set().union(*read)
            if len(sides[node]) == 2 and all(len(side) < 2 for side in read):
                joins.append(node)
    if not joins:
        raise Unguided("no guidance joins two halves of its result")
    known = _Join(picks, sides, later)
    guided: dict[fx.Node, fx.Node] = {}
    conditional = {known.follow(node, guided) for node in joins}
    if len(conditional) > 1:
        raise Unguided("its halves take turns in being the conditional one")
    cut = {pick: value for pick, (value, _) in picks.items()}
    return Guidance(cut, guided, HALVES[conditional.pop()])


def _half(node: fx.Node, both: set[fx.Node]) -> tuple[fx.Node, int] | None:
    """Return the value that a node cuts a half out of, and which half."""
    if node.op != "call_function" or not isinstance(source := args(node)[0], fx.Node):
        return None
    if is_call(node, operator.getitem) and is_call(source, *SPLITS, aten.unbind.int):
        value, count = args(source)[0], len(source.meta["val"])
        if value in both and count == 2 and shard_call(source, 0, HALVES[0]) is None:
            first, second = source.meta["val"]
            return (value, args(node)[1]) if first.shape == second.shape else None
    elif source in both and is_call(node, aten.select.int) and args(node)[1] == 0:
        return (source, args(node)[2] % 2) if source.meta["val"].shape[0] == 2 else None
    elif source in both and is_call(node, aten.slice.Tensor):
        return next(((source, p.index) for p in HALVES if p.cut_by(node) == 0), None)
    return None


def _keeps_rows(node: fx.Node, sources: Sequence[fx.Node]) -> bool:
    call = shard_call(node, 0, HALVES[0])
    return call is not None and all(call.axes.get(n) == 0 for n in sources)


@dataclass(frozen=True)
class _Join:
    """Follows what becomes of the difference of the halves."""

    picks: dict[fx.Node, tuple[fx.Node, int]]
    sides: dict[fx.Node, set[int]]
    later: set[fx.Node]

    def follow(self, node: fx.Node, guided: dict[fx.Node, fx.Node]) -> int:
        """Return which half the other is subtracted from, and add what is guided by that."""
        c, u = args(node)[:2] if is_call(node, aten.sub.Tensor) else (None, None)
        if c is None or node.kwargs or not self._alike(c, u):
            raise _odd(node)
        stack = [node]
        while stack:
            for user in stack.pop().users:
                others = [n for n in user.all_input_nodes if n in self.later]
                if is_call(user, aten.add.Tensor) and self._adds(user, c):
                    guided[user] = c
                elif len(others) == 1 and is_call(user, *_SCALINGS) and self._is_first(user):
                    stack.append(user)
                else:
                    raise _odd(user)
        return next(iter(self.sides[c]))

    def _is_first(self, node: fx.Node) -> bool:
        return node.target is not aten.div.Tensor or args(node)[0] in self.later

    def _adds(self, node: fx.Node, c: fx.Node) -> bool:
        same = [n for n in args(node)[:2] if isinstance(n, fx.Node) and self._alike(n, c)]
        return len(same) == 1 and format_type(node.meta["val"]) == format_type(c.meta["val"])

    def _alike(self, a: object, b: object) -> bool:
        """Tell whether two values are the same if the halves are."""
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or a is b:
            return a is b
        if a in self.picks and b in self.picks:
            same = self.picks[a][0] is self.picks[b][0]
            return same and a.meta["val"].shape == b.meta["val"].shape
        if a.op != "call_function" or a.target is not b.target:
            return False
        inner = [g.nodes_in((n.args, n.kwargs)) for n in (a, b)]
        names = dict.fromkeys([*inner[0], *inner[1]], 0)
        frozen = [argument_key((n.args, n.kwargs), names) for n in (a, b)]
        return frozen[0] == frozen[1] and all(
            self._alike(x, y) for x, y in zip(*inner, strict=True)
        )


def _odd(node: fx.Node) -> Unguided:
    name = target_name(node) if node.op == "call_function" else node.name
    return Unguided(f"{name} joins the halves of its result in another way than u + s (c - u)")


_SCALINGS = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten._to_copy.default)
