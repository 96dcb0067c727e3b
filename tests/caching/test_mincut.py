"""Cuts against all that there are, on graphs small enough to try them all."""

import itertools
import random

import pytest
import torch
from torch import fx

from diffopt.caching.mincut import cuts, minimum_cut

Graph = tuple[list[fx.Node], dict[fx.Node, float], dict[fx.Node, float]]


def graph(seed: int, count: int = 7) -> Graph:
    """Make a random graph; some values cost nothing, some cannot be taken."""
    source = random.Random(seed)
    values_graph = fx.Graph()
    values = [values_graph.placeholder("x")]
    for _ in range(count):
        values.append(values_graph.call_function(torch.add, tuple(source.choices(values, k=2))))
    values_graph.output(values[-1])
    nodes = values[1:]
    costs = {n: source.choice([0.0, source.uniform(1, 9)]) for n in nodes}
    errors = {n: source.uniform(0, 3) for n in nodes if source.random() < 0.7}
    return nodes, costs, errors


def total(problem: Graph, taken: set[fx.Node], price: float) -> float:
    """Return what it costs to take some values and to compute all else that the result needs."""
    nodes, costs, errors = problem
    needed, stack = set[fx.Node](), [nodes[-1]]
    while stack:
        node = stack.pop()
        if node in needed or node.op == "placeholder":
            continue
        needed.add(node)
        if node not in taken:
            stack.extend(node.all_input_nodes)
    computed = sum(costs[n] for n in needed - taken)
    return computed + price * sum(errors[n] for n in needed & taken)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("price", [0.0, 0.3, 2.0, 1e6])
def test_no_choice_is_cheaper(seed: int, price: float) -> None:
    problem = graph(seed)
    nodes, costs, errors = problem
    subsets = (
        set(part) for r in range(len(errors) + 1) for part in itertools.combinations(errors, r)
    )
    least = min(total(problem, part, price) for part in subsets)
    cut = minimum_cut(nodes, [nodes[-1]], costs, errors, price)
    assert set(cut) <= errors.keys()
    assert total(problem, set(cut), price) == pytest.approx(least)


def test_cuts_go_from_nothing_to_the_cheapest() -> None:
    nodes, costs, errors = graph(3, 9)
    errors = dict.fromkeys(nodes, 1.0) | errors
    problem = (nodes, costs, errors)
    sequence = cuts(nodes, [nodes[-1]], costs, errors)
    computed = [total(problem, set(cut), 0.0) for cut in sequence]
    assert sequence[0] == []
    assert computed == sorted(computed, reverse=True)
    assert computed[-1] == 0.0
