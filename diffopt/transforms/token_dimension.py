"""One program of several captures whose texts have other numbers of tokens.

The captures must have the same operators. A size that differs is a sum of numbers of tokens, each
times a whole number, and a constant. The new graph computes it from the size of an argument
(`aten.sym_size`), or lets a reshape say -1. Of a constant that grows with a text, such as a mask or
a table of positions, the longest is kept and cut to size.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.errors import DiffoptError
from diffopt.host.guards import Guards
from diffopt.ir import graph as g
from diffopt.ir.op_sets import RESHAPES
from diffopt.ir.printing import format_type, target_name
from diffopt.ir.program import Program

aten = torch.ops.aten

Sizes = tuple[int, ...]
"""One number in every capture."""


def unify(captures: Sequence[Program]) -> tuple[fx.GraphModule, Guards | None]:
    """Return an outer graph with its components, and guards, that serve every number of tokens.

    Args:
        captures: As `sizes.lengths` takes them; the recorded shapes are those of the first.

    Raises:
        DiffoptError: The captures differ in more than sizes.
    """
    names = [list(p.components) for p in captures]
    if any(other != names[0] for other in names):
        raise DiffoptError(
            "texts of other lengths need other components: "
            f"{', '.join(sorted(set(names[0]).symmetric_difference(*names[1:])) or names[0])}"
        )
    root = _merge("the program", [p.root for p in captures])
    for name in names[0]:
        root.add_module(name, _merge(name, [p.components[name] for p in captures]))
    return root, _guards([p.guards for p in captures])  # the caller refreshes the graphs


def _guards(guards: Sequence[Guards | None]) -> Guards | None:
    """Return guards whose values have what the number of tokens adds to them taken off."""
    known = [each for each in guards if each is not None]
    if not known:
        return None
    counts = [len(each.expected) if each else 0 for each in guards]
    if len(set(counts)) > 1:
        raise DiffoptError("what Python reads of the texts depends on their lengths")

    def shifted(merge: _Merge, outputs: list[fx.Node]) -> list[fx.Node]:
        shifts = [
            _shift([each.expected[index] for each in known], known[0].where[index])
            for index in range(counts[0])
        ]
        return [
            g.call(merge.new.graph, aten.sub.Scalar, node, merge.number(shift)) if shift else node
            for node, shift in zip(outputs, shifts, strict=True)
        ]

    body = _merge("the guards", [each.body for each in known], shifted)
    body.recompile()
    return Guards(body, known[0].expected, known[0].where, known[0].from_text)


def _shift(expected: Sequence[Any], where: str) -> Sizes | None:
    """Return by how much a value that was read is larger than in the first capture."""
    if all(value == expected[0] for value in expected):
        return None
    rows = [value if isinstance(value, list) else [value] for value in expected]
    if len({len(row) for row in rows}) == 1 and all(type(n) is int for row in rows for n in row):
        steps = [{n - first for n, first in zip(row, rows[0], strict=True)} for row in rows]
        if all(len(step) == 1 for step in steps):
            return tuple(step.pop() for step in steps)
    raise DiffoptError(f"{where.rstrip(':')}: what is read here depends on a text's length")


def _merge(
    name: str,
    graphs: Sequence[fx.GraphModule],
    finish: Callable[[_Merge, list[fx.Node]], list[fx.Node]] = lambda merge, outputs: outputs,
) -> fx.GraphModule:
    """Return one graph for all; `finish` may change what it returns."""
    merge = _Merge(name, graphs)
    for rows in merge.rows():
        merge.add(rows)
    results = finish(merge, [merge.env[n] for n in g.outputs(graphs[0])])
    merge.new.graph.output(tuple(results))
    g.set_outputs(merge.new, results)
    return merge.new


class _Merge:
    """Builds a graph from equal ones, node by node.

    Attributes:
        new: The graph.
        env: New nodes by those of the first graph.
    """

    def __init__(self, name: str, graphs: Sequence[fx.GraphModule]) -> None:
        self.name = name
        self.graphs = graphs
        self.new = g.new_body(type(graphs[0]).__name__)
        self.env: dict[fx.Node, fx.Node] = {}
        self._places = [{n: i for i, n in enumerate(gm.graph.nodes)} for gm in graphs]
        self._axes: list[tuple[fx.Node, int, Sizes]] = []
        self._numbers: dict[Sizes, fx.Node] = {}
        self._at = next(iter(graphs[0].graph.nodes))  # what is added, for errors

    def rows(self) -> list[tuple[fx.Node, ...]]:
        """Return the nodes that stand at the same place, up to the outputs."""
        ordered = [[n for n in gm.graph.nodes if n.op != "output"] for gm in self.graphs]
        for row in zip(*ordered, strict=False):
            if any((n.op, _target(n)) != (row[0].op, _target(row[0])) for n in row):
                other = next(n for n in row if _target(n) != _target(row[0]))
                raise self._differs(row[0], f"{_target(row[0])} and {_target(other)}")
        if len({len(nodes) for nodes in ordered}) > 1:
            raise DiffoptError(f"{self.name}: texts of other lengths take more or fewer operators")
        for gm, places in zip(self.graphs, self._places, strict=True):
            if [places[n] for n in g.outputs(gm)] != [
                self._places[0][n] for n in g.outputs(self.graphs[0])
            ]:
                raise DiffoptError(f"{self.name}: texts of other lengths give other results")
        return list(zip(*ordered, strict=True))

    def add(self, row: tuple[fx.Node, ...]) -> None:
        """Add the node that stands for those of a row."""
        first = self._at = row[0]
        if first.op == "placeholder":
            new = self.new.graph.node_copy(first)
            shapes = [n.meta["val"].shape for n in row]
            for axis, sizes in enumerate(zip(*shapes, strict=True)):
                if len(set(sizes)) > 1:
                    self._axes.append((new, axis, tuple(sizes)))
        elif first.op == "get_attr":
            new = self._constant(row)
        elif first.op == "call_module":
            new = self.new.graph.node_copy(first, self.env.__getitem__)
            self._arguments(row)
        elif first.target in RESHAPES:
            new = self._view(row)
        elif torch.Tag.data_dependent_output in getattr(first.target, "tags", ()):  # in guards
            new = self.new.graph.call_function(first.target, *self._arguments(row))  # type: ignore[arg-type]
            new.meta["val"] = first.meta["val"]
        else:
            arguments, kwargs = self._arguments(row)
            new = g.call(self.new.graph, first.target, *arguments, like=first, **kwargs)
        new.meta |= {k: v for k, v in first.meta.items() if k != "val"}
        self.env[first] = new

    def _differs(self, node: fx.Node, how: str) -> DiffoptError:
        where = node.meta.get("where") or node.meta.get("module") or f"{self.name}, {node.name}"
        return DiffoptError(
            f"{str(where).rstrip(':')}: texts of other lengths are computed in another way here: "
            f"{how}"
        )

    def _arguments(self, row: tuple[fx.Node, ...]) -> Any:
        return self._merged(row[0], [(n.args, n.kwargs) for n in row])

    def _merged(self, node: fx.Node, values: Sequence[Any]) -> Any:
        """Return one argument for those of a row."""
        first = values[0]
        if len({type(value) for value in values}) > 1:
            other = next(v for v in values if type(v) is not type(first))
            raise self._differs(node, f"{_target(node)} with {first} and with {other}")
        if isinstance(first, fx.Node):
            for value, places in zip(values, self._places, strict=True):
                if places[value] != self._places[0][first]:
                    raise self._differs(node, f"{_target(node)} of {first} and of {value}")
            return self.env[first]
        if isinstance(first, (list, tuple)) and len({len(value) for value in values}) == 1:
            items = [self._merged(node, parts) for parts in zip(*values, strict=True)]
            return tuple(items) if isinstance(first, tuple) else items
        if isinstance(first, dict) and len({tuple(value) for value in values}) == 1:
            return {key: self._merged(node, [value[key] for value in values]) for key in first}
        if len({repr(value) for value in values}) == 1:
            return first
        if type(first) is int:
            return self.number(tuple(values))
        other = next(v for v in values if repr(v) != repr(first))
        raise self._differs(node, f"{_target(node)} with {first} and with {other}")

    def _view(self, row: tuple[fx.Node, ...]) -> fx.Node:
        """Return a change of shape; one size that varies is -1."""
        shapes = list(zip(*(n.meta["val"].shape for n in row), strict=True))
        varying = [axis for axis, sizes in enumerate(shapes) if len(set(sizes)) > 1]
        source = self._merged(row[0], [n.args[0] for n in row])
        target: Any = row[0].target
        if varying or source.meta["val"].stride() != row[0].all_input_nodes[0].meta["val"].stride():
            target = aten.reshape.default
        shape = [
            -1 if axis in varying[:1] else self.number(sizes) if axis in varying else sizes[0]
            for axis, sizes in enumerate(shapes)
        ]
        return g.call(self.new.graph, target, source, shape, like=row[0])

    def _constant(self, row: tuple[fx.Node, ...]) -> fx.Node:
        """Return a weight, or the longest of constants that begin with one another, cut to size."""
        tensors = [g.attribute(gm, str(n.target)) for gm, n in zip(self.graphs, row, strict=True)]
        longest = max(tensors, key=lambda tensor: tensor.numel())
        if any(not _begins(longest, tensor) for tensor in tensors):
            kinds = [format_type(tensor) for tensor in (tensors[0], longest)]
            user = next(iter(row[0].users))
            raise self._differs(
                user, f"{_target(user)} with a constant {kinds[0]} and with another {kinds[1]}"
            )
        new = g.get_attr(self.new, str(row[0].target), longest)
        for axis, sizes in enumerate(zip(*(t.shape for t in tensors), strict=True)):
            if len(set(sizes)) > 1:
                end = self.number(tuple(sizes))
                new = g.call(self.new.graph, aten.slice.Tensor, new, axis, 0, end, like=row[0])
        return new

    def number(self, sizes: Sizes) -> fx.Node:
        """Return a value of the graph that is this size in the captures, and any other's alike."""
        if sizes not in self._numbers:
            self._numbers[sizes] = self._of_one(sizes) or self._sum(sizes)
        return self._numbers[sizes]

    def _sum(self, sizes: Sizes) -> fx.Node:
        """Return a size to which several texts add."""
        total: Any = sizes[0]
        for index, size in enumerate(sizes):
            if size == sizes[0]:
                continue
            part = tuple(size - sizes[0] if i == index else 0 for i in range(len(sizes)))
            number = self._of_one(part)
            if number is None:
                raise self._differs(
                    self._at,
                    f"no argument has a size from which {' or '.join(map(str, sizes))} follows",
                )
            total = g.call(self.new.graph, operator.add, number, total)
        assert isinstance(total, fx.Node)
        return total

    def _of_one(self, sizes: Sizes) -> fx.Node | None:
        """Return a size computed from one size of an argument; None if there is none to do it."""
        choices = [
            (times, over, node, axis, base)
            for node, axis, base in self._axes
            if (ratio := _ratio(sizes, base)) is not None
            for times, over in [ratio]
        ]
        if not choices:
            return None
        times, over, node, axis, base = min(choices, key=lambda c: (c[1], abs(c[0])))
        number = g.call(self.new.graph, aten.sym_size.int, node, axis)
        if times != 1:
            number = g.call(self.new.graph, operator.mul, number, times)
        if plus := over * sizes[0] - times * base[0]:
            number = g.call(self.new.graph, operator.add, number, plus)
        return number if over == 1 else g.call(self.new.graph, operator.floordiv, number, over)


def _ratio(sizes: Sizes, base: Sizes) -> tuple[int, int] | None:
    """Return integers (a, b), one of them 1: `sizes` grows a/b times as much as `base` does."""
    grown, steps = ([n - each[0] for n in each[1:]] for each in (sizes, base))
    index = next(i for i, n in enumerate(steps) if n)
    if not grown[index] or any(
        a * steps[index] != b * grown[index] for a, b in zip(grown, steps, strict=True)
    ):
        return None
    if grown[index] % steps[index] == 0:
        return grown[index] // steps[index], 1
    if steps[index] % grown[index] == 0 and steps[index] // grown[index] > 0:
        return 1, steps[index] // grown[index]
    return None


def _begins(longest: Tensor, tensor: Tensor) -> bool:
    """Tell whether one tensor is the leading part of another along every axis."""
    if longest is tensor:
        return True
    if (longest.dim(), longest.dtype) != (tensor.dim(), tensor.dtype):
        return False
    if any(size > most for size, most in zip(tensor.shape, longest.shape, strict=True)):
        return False
    part = longest[tuple(slice(0, size) for size in tensor.shape)]
    if part.is_floating_point() and part.shape != longest.shape:
        # The last elements that a vectorised function takes can round otherwise.
        return torch.allclose(part, tensor, rtol=1e-6, atol=1e-6, equal_nan=True)
    return bool(torch.equal(part, tensor))


def _target(node: fx.Node) -> str:
    """Return what a node calls; constants' and arguments' names do not matter."""
    return "" if node.op in ("get_attr", "placeholder") else target_name(node)
