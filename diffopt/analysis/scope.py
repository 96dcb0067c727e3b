"""Select the components and calls that a pass rewrites: the loop's, all, or some by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from diffopt.errors import DiffoptError
from diffopt.ir import call_tags, qdq
from diffopt.ir import graph as g
from diffopt.ir.flops import graph_flops
from diffopt.ir.nodes import stored_tensor
from diffopt.ir.program import Program
from diffopt.spec import suggest


@dataclass(frozen=True, eq=False)
class Scope:
    """The components that a pass rewrites.

    Attributes:
        calls: The calls of each, with their steps; 0 for those outside of the loop.
        loop: The components that the sampling loop calls.
        weights: The components of which weights alone are rewritten (quantized), not activations.
    """

    calls: dict[str, list[tuple[fx.Node, int]]]
    loop: list[str]
    weights: frozenset[str]


def choose_scope(program: Program, wanted: Sequence[str]) -> Scope:
    """Return the components that `wanted` means: "loop", "all", or patterns of names.

    "loop" is the component that is called in several steps (of several, the one with most FLOPs),
    in all of its bodies, and the prologues that passes put in front of the loop; "all" adds the
    weights of all others.

    Raises:
        DiffoptError: A pattern matches no component.
    """
    calls: dict[str, list[tuple[fx.Node, int]]] = {}
    spent: dict[str, int] = {}
    steps: dict[str, set[int]] = {}
    source: dict[str, str | None] = {}
    for call in program.calls():
        name, tag = str(call.target), call_tags.tag(call)
        calls.setdefault(name, []).append((call, tag.step if tag else 0))
        source[name] = tag.component if tag else None
        if tag:
            cost = graph_flops(program.components[name])
            spent[tag.component] = spent.get(tag.component, 0) + cost
            steps.setdefault(tag.component, set()).add(tag.step)
    # A small denoiser may cost less than the decoder, which runs once.
    heaviest = max(spent, key=lambda c: (len(steps[c]) > 1, spent[c]), default=None)
    loop = [name for name in calls if source[name] == heaviest]
    before = [name for name in calls if source[name] is None and heaviest is not None]
    if tuple(wanted) == ("loop",):
        chosen, weights = [*before, *loop], before
    elif tuple(wanted) == ("all",):
        chosen, weights = list(calls), [name for name in calls if name not in loop]
    else:
        chosen, weights = [], []
        for pattern in wanted:
            names = fnmatch.filter(calls, pattern)
            if not names:
                raise DiffoptError(f"there is no component '{pattern}'{suggest(pattern, calls)}")
            chosen += names
    chosen_calls = {name: calls[name] for name in calls if name in chosen}
    return Scope(chosen_calls, [name for name in loop if name in chosen_calls], frozenset(weights))


def by_step(scope: Scope) -> dict[tuple[int, int], fx.Node]:
    """Return the calls whose inputs are calibrated, by step and a unique number."""
    watched = [at for name, own in scope.calls.items() if name not in scope.weights for at in own]
    return {(step, number): call for number, (call, step) in enumerate(watched)}


def boundary_weights(program: Program, scope: Scope) -> list[Tensor]:
    """Return the weights of the first layers that read the latents, and of the last ones.

    They are small, and their rounding errors are directly in the latents.
    """
    weights: list[Tensor] = []
    late = g.descendants(call for name in scope.loop for call, _ in scope.calls[name])
    bodies = sorted(scope.loop, key=lambda n: graph_flops(program.components[n]))
    for name in bodies[-1:]:  # cheaper bodies begin and end inside of the costliest
        gm = program.components[name]
        arguments = [call.args for call, _ in scope.calls[name]]
        parameters = enumerate(g.placeholders(gm))
        seen = g.descendants(n for i, n in parameters if any(row[i] in late for row in arguments))
        layers = [layer for layer in qdq.layers(gm) if layer.node in seen]
        nodes = {layer.node for layer in layers}
        for layer in layers:
            is_first = not nodes & (g.ancestors([layer.node]) - {layer.node})
            is_last = not nodes & (g.descendants([layer.node]) - {layer.node})
            tensor = stored_tensor(gm, layer.weight)
            if (is_first or is_last) and tensor is not None:
                weights.append(tensor)
    return weights
