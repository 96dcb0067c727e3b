"""Sizes that no graph fixes: the tokens of a text, the requests of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.errors import DiffoptError, VerifyError, first_line
from diffopt.host.guards import mismatch
from diffopt.ir import graph as g
from diffopt.ir.interpreter import Interpreter

Bounds = dict[int, dict[int, tuple[int, int]]]
"""By argument of a component: by axis that has no fixed size, the smallest and the largest."""


def bounds_to_json(bounds: Bounds) -> list[Any]:
    """Return bounds as JSON, the same for the same bounds."""
    return [[i, sorted(axes.items())] for i, axes in sorted(bounds.items())]


def bounds_from_json(rows: Sequence[Any]) -> Bounds:
    """Return the bounds that `bounds_to_json` wrote."""
    return {i: {axis: (low, high) for axis, (low, high) in axes} for i, axes in rows}


@dataclasses.dataclass(frozen=True)
class Length:
    """The number of tokens of a text, from `low` to `high`.

    Attributes:
        text: The argument that decides it.
        low: The fewest.
        high: The most.
        axes: Of each input's axis that has it: the input, the axis, and what is added to it there.
    """

    text: str
    low: int
    high: int
    axes: tuple[tuple[int, int, int], ...]

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> Length:
        """Rebuild what `dataclasses.asdict` returned."""
        return Length(**{**row, "axes": tuple(map(tuple, row["axes"]))})

    def check(self, shapes: Sequence[Sequence[int]]) -> None:
        """Raise a `Mismatch` where inputs of these shapes have another number of tokens."""
        counts = sorted({shapes[index][axis] - plus for index, axis, plus in self.axes})
        if len(counts) > 1:
            raise mismatch(
                f"{self.text!r} gives {counts[0]} tokens to one input and {counts[-1]} to another; "
                "the program was built for texts that give all the same number",
                from_text=True,
            )
        if not self.low <= counts[0] <= self.high:
            raise mismatch(
                f"{self.text!r} gives {counts[0]} tokens; the program was built for "
                f"{self.low} to {self.high}",
                from_text=True,
            )


def lengths(roots: Sequence[fx.GraphModule], texts: Sequence[str]) -> list[Length]:
    """Return which axes of the inputs have the number of tokens of which text.

    Args:
        roots: The outer graph of the first capture, then one a text, which alone is longer there.
        texts: The arguments.
    """
    shapes = [[list(n.meta["val"].shape) for n in g.placeholders(root)] for root in roots]
    rows = []
    for text, longer in zip(texts, shapes[1:], strict=True):
        grown = [
            (index, axis, size, other - size)
            for index, (one, two) in enumerate(zip(shapes[0], longer, strict=True))
            for axis, (size, other) in enumerate(zip(one, two, strict=True))
            if size != other
        ]
        if len({growth for *_, growth in grown}) != 1:
            names = [n.name for n in g.placeholders(roots[0])]
            steps = ", ".join(f"{names[index]} by {growth}" for index, _, _, growth in grown)
            raise DiffoptError(
                f"{text!r} has no single number of tokens: a longer one adds to {steps or 'none'}"
            )
        first = grown[0][2]
        axes = tuple((index, axis, size - first) for index, axis, size, _ in grown)
        rows.append(Length(text, first, first + grown[0][3], axes))
    return rows


def free_axes(lengths: Sequence[Length], index: int) -> set[int]:
    """Return the axes of an input that have no fixed size."""
    return {axis for length in lengths for place, axis, _ in length.axes if place == index}


def infer_values(
    gm: fx.GraphModule,
    arguments: Sequence[Any],
    on_call: Callable[[str, fx.GraphModule, list[Any]], None] = lambda name, body, values: None,
    *,
    record: bool = False,
) -> list[Any]:
    """Return the fake results for arguments of other shapes than those of the capture.

    Args:
        gm: The outer graph, or a component.
        arguments: Fake values of the placeholders.
        on_call: Called with the name, the graph and the arguments of each component that is called.
        record: Whether to write what is inferred into the graphs' `meta["val"]`.
    """

    def infer(run: Interpreter, node: fx.Node) -> Any:
        if node.op == "get_attr":
            value = node.meta["val"]
        elif node.op == "call_module":
            name, (values, _) = str(node.target), run.arguments(node)
            body = g.attribute(gm, name)
            on_call(name, body, list(values))
            value = tuple(infer_values(body, values, on_call, record=record))
        else:
            with g.FAKE_MODE, torch.no_grad():
                value = run.run_node(node)
        if record:
            node.meta["val"] = value
        return value

    results = Interpreter(gm, also=gm.graph.nodes).run(*arguments, hook=infer)
    if record:
        g.output_node(gm).meta["val"] = results
        for node, value in zip(g.placeholders(gm), arguments, strict=True):
            node.meta["val"] = value
    return list(results)


def inputs(root: fx.GraphModule, lengths: Sequence[Length], counts: Sequence[int]) -> list[Tensor]:
    """Return fake inputs for a number of tokens of each text."""
    nodes = g.placeholders(root)
    shapes = [list(node.meta["val"].shape) for node in nodes]
    for length, count in zip(lengths, counts, strict=True):
        for index, axis, plus in length.axes:
            shapes[index][axis] = count + plus
    return [
        g.fake(torch.empty(shape, dtype=node.meta["val"].dtype, device="meta"))
        for node, shape in zip(nodes, shapes, strict=True)
    ]


def bounds(root: fx.GraphModule, lengths: Sequence[Length]) -> dict[str, Bounds]:
    """Return, of each component, which axes of its arguments vary with the texts, and how far.

    All shapes are worked out for the shortest and for the longest texts. A graph that does not
    follow is a `VerifyError`.
    """
    varying: dict[str, Bounds] = {}
    seen: dict[str, list[list[int]]] = {}

    def called(name: str, body: fx.GraphModule, values: list[Any]) -> None:
        shapes = [list(value.shape) for value in values]
        for index, (old, new) in enumerate(zip(seen.setdefault(name, shapes), shapes, strict=True)):
            for axis, (a, b) in enumerate(zip(old, new, strict=True)):
                if a != b:
                    low, high = varying.setdefault(name, {}).setdefault(index, {}).get(axis, (a, a))
                    varying[name][index][axis] = min(low, b), max(high, b)

    for counts in ([n.low for n in lengths], [n.high for n in lengths]):
        try:
            infer_values(root, inputs(root, lengths, counts), called)
        except Exception as error:  # each operator raises other kinds
            reason = first_line(error)
            tokens = ", ".join(map(str, counts))
            raise VerifyError(f"the graph does not serve texts of {tokens} tokens: {reason}") from (
                error
            )
    return varying
