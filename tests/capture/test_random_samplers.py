"""Random sampling programs are captured with their bits for any later call, or it is refused.

`COUNT=2000 pytest tests/capture/test_random_samplers.py` tries more of them.
"""

import copy
import dataclasses
import os
import random
from typing import Any

import pytest
import torch

import diffopt
from diffopt.capture.perturbation import separated
from diffopt.capture.value_tree import same_bits
from diffopt.errors import DiffoptError
from tests.capture.random_samplers import STATEMENTS, VALUES, Sampler, changed, sampler

COUNT = int(os.environ.get("COUNT", "60"))
CALLS = 4


def run(function: Any, arguments: dict[str, Any]) -> Any:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(11)
        return function(**copy_of(arguments))


def copy_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return copies that keep which arguments are the same object."""
    memo: dict[int, Any] = {}
    for value in arguments.values():
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, torch.Generator):
                memo[id(item)] = item.clone_state()
    return copy.deepcopy(arguments, memo)


def attempt(function: Any, arguments: dict[str, Any]) -> Any:
    """Return a call's result, or the error that it raises."""
    try:
        return run(function, arguments)
    except Exception as error:
        return error


def faults(pipe: Sampler, seed: int) -> list[str]:
    """Return what differs silently between a sampler and its program, in some later calls."""
    r = random.Random(seed)
    arguments, parts = pipe.arguments(r), copy.deepcopy(pipe.components)
    before = {name: t.clone() for name, t in pipe.components["net"].state_dict().items()}
    try:
        program = diffopt.trace(pipe, check=seed % 2 == 0, **copy_of(arguments))
    except DiffoptError:
        return []
    after = pipe.components["net"].state_dict()
    found = [f"{n} was left changed" for n, t in before.items() if not torch.equal(after[n], t)]
    calls = [arguments, *(changed(arguments, r) for _ in range(CALLS))]
    for call in calls:
        got = attempt(program, call)
        # A copy: nothing that a call leaves, least of all one that fails half-way, is of the next.
        expected = attempt(dataclasses.replace(pipe, components=copy.deepcopy(parts)), call)
        if isinstance(got, DiffoptError):
            continue
        if isinstance(got, Exception):
            if not isinstance(expected, Exception):
                found.append(f"{call}: raises {type(got).__name__}: {got}")
        elif isinstance(expected, Exception):
            found.append(f"{call}: no result expected ({expected!r}), got one")
        elif not same_bits(expected, got):
            found.append(f"{call}: another result, by {float((got - expected).abs().max())}")
    return found


@pytest.mark.parametrize("seed", range(COUNT))
def test_a_random_sampler(seed):
    pipe = sampler(seed)
    assert not faults(pipe, seed), pipe.names


def test_what_the_statements_are_captured_as():
    """Every statement alone is captured, but where what Python read alone is the result."""
    refused = []
    for name in STATEMENTS:
        read, statement = STATEMENTS[name]
        pipe = sampler(0)
        pipe.statements = [statement]
        words = read.split()
        pipe.arguments = lambda r, words=words: {w: VALUES[w](r) for w in words}
        try:
            diffopt.trace(pipe, **separated(pipe.arguments(random.Random(0))))
        except DiffoptError as error:
            refused.append(f"{name}: {error}")
    names = [line.partition(":")[0] for line in refused]
    assert names == ["words counted", "corner", "array read"], refused
