"""Choose the values of a body to reuse from an earlier step, as a minimum cut.

Every operator is computed or not. A computed one costs its FLOPs. A value that is not computed, but
read by a computed operator, is reused from an earlier step and costs its error times a price. With
the price fixed, the cheapest choice is a minimum cut of a graph with two vertices a value:
x (computed if on the side of the source) and y (read if on the side of the source).

    x → sink      FLOPs of the operator
    x → y of each value that it reads     infinite: a computed operator reads its inputs
    y → x         price · error of the value; infinite where it cannot be reused
    source → y of each result             infinite: results are read

It is the closure problem of J.-C. Picard, "Maximal closure of a graph" (1976); its use to place
caches is new here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import networkx as nx
from torch import fx

_SOURCE, _SINK = "source", "sink"


def minimum_cut(
    nodes: Iterable[fx.Node],
    results: Iterable[fx.Node],
    costs: Mapping[fx.Node, float],
    errors: Mapping[fx.Node, float],
    price: float,
) -> list[fx.Node]:
    """Return the values to reuse from an earlier step, in the order of `nodes`; empty for none.

    Args:
        nodes: The operators that may be left out; others, such as arguments, are free.
        results: Values that are read from outside.
        costs: FLOPs by operator; none where it is missing.
        errors: By reusable value, the error that its reuse adds; errors are assumed to add up.
        price: FLOPs that one unit of error is worth.
    """
    nodes = list(nodes)
    inner = set(nodes)
    graph = nx.DiGraph()
    graph.add_nodes_from((_SOURCE, _SINK))
    for node in nodes:
        graph.add_edge(("x", node), _SINK, capacity=float(costs.get(node, 0.0)))
        if node in errors:
            graph.add_edge(("y", node), ("x", node), capacity=price * float(errors[node]))
        else:
            graph.add_edge(("y", node), ("x", node))
        for source in node.all_input_nodes:
            if source in inner:
                graph.add_edge(("x", node), ("y", source))
    for node in results:
        if node in inner:
            graph.add_edge(_SOURCE, ("y", node))
    _, (side, _) = nx.minimum_cut(graph, _SOURCE, _SINK)
    return [n for n in nodes if ("y", n) in side and ("x", n) not in side]


def cuts(
    nodes: Sequence[fx.Node],
    results: Sequence[fx.Node],
    costs: Mapping[fx.Node, float],
    errors: Mapping[fx.Node, float],
    count: int = 12,
) -> list[list[fx.Node]]:
    """Return the distinct cuts for a range of prices, from nothing reused to the cheapest.

    Prices are spaced evenly in their logarithm, from one at which every error is too dear to one at
    which none is.
    """
    total = sum(costs.values())
    smallest = min((e for e in errors.values() if e > 0), default=1.0)
    largest = max(errors.values(), default=1.0) or 1.0
    low, high = total * 1e-3 / largest, total * 1e1 / smallest
    distinct: dict[tuple[fx.Node, ...], None] = {}
    for index in range(count):
        price = high * (low / high) ** (index / max(1, count - 1))
        distinct.setdefault(tuple(minimum_cut(nodes, results, costs, errors, price)))
    return [list(cut) for cut in distinct]
