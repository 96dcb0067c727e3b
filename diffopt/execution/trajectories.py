"""What passes measure before they rewrite: seeded calls of a program, and values inside its loop.

A loop is the calls of its body in the root graph, by (step, branch); see `call_tags`. Seeds and
prompts make the same numbers in every run, so that measurements can be kept on disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, fx

from diffopt.execution.calibration_inputs import requests
from diffopt.ir import graph as g
from diffopt.ir.interpreter import Interpreter, Values
from diffopt.ir.printing import graph_fingerprint
from diffopt.ir.program import Program
from diffopt.progress import Progress, silent
from diffopt.storage import container, disk_cache, weight_digests

__all__ = [
    "Visit",
    "cached",
    "identity",
    "loop_identity",
    "requests",
    "root_values",
    "run_root",
    "step_errors",
    "steps",
    "values",
]

Calls = Mapping[tuple[int, int], fx.Node]
"""The calls of a loop's body in the root graph, by step and branch."""


# Values


@dataclass(frozen=True, eq=False)
class Visit:
    """One call of a loop's body in a run of the program.

    Attributes:
        step: Of the call.
        branch: Of the call.
        arguments: The flat arguments of the body.
        values: What the nodes that were asked for are worth in this call.
    """

    step: int
    branch: int
    arguments: list[Tensor]
    values: dict[fx.Node, Tensor]


def values(
    body: fx.GraphModule, arguments: Sequence[Tensor], nodes: Iterable[fx.Node]
) -> dict[fx.Node, Tensor]:
    """Compute as much of a body as some of its nodes need; return their values.

    Nodes of other graphs are left out.
    """
    with torch.no_grad():
        return Interpreter(body, _local(body, nodes)).values(arguments)


def _local(body: fx.GraphModule, nodes: Iterable[fx.Node]) -> list[fx.Node]:
    nodes = set(nodes)
    return [n for n in body.graph.nodes if n in nodes]


def steps(
    program: Program, calls: Calls, inputs: Sequence[Tensor], nodes: Iterable[fx.Node] = ()
) -> Iterator[Visit]:
    """Run a program for one request up to the end of a loop; yield each call of the loop's body.

    Args:
        program: What to run.
        calls: The loop.
        inputs: The flat inputs of the request.
        nodes: Nodes of the body whose values are wanted: they cost no second run, as `values` does.
    """
    keys = {call: key for key, call in calls.items()}
    nodes = set(nodes)
    bodies: dict[fx.GraphModule, Interpreter] = {}
    visits: list[Visit] = []

    def compute(run: Interpreter, node: fx.Node) -> Any:
        with torch.no_grad():
            if node not in keys:
                return run.run_node(node)
            body = program.components[str(node.target)]
            local, outputs = _local(body, nodes), g.outputs(body)
            if body not in bodies:
                bodies[body] = Interpreter(body, [*outputs, *local])
            arguments = list(run.arguments(node)[0])
            computed = bodies[body].values(arguments)
            visits.append(Visit(*keys[node], arguments, {n: computed[n] for n in local}))
            return tuple(computed[n] for n in outputs)

    for _ in Interpreter(program.root, (), also=list(keys)).steps(inputs, hook=compute):
        yield from visits
        visits.clear()


Override = Callable[[fx.Node, list[Tensor]], Sequence[Tensor] | None]
"""Returns the results of a component's call with some arguments; None: run it as it is."""


def run_root(
    program: Program, inputs: Sequence[Tensor], override: Override | None = None
) -> list[Tensor]:
    """Return the outputs of a program for the flat inputs of a request.

    Args:
        program: What to run.
        inputs: The flat inputs of the request.
        override: May compute calls of components in its place.
    """
    outputs = g.outputs(program.root)
    computed = _run_root(program, inputs, override, outputs)
    return [computed[n] for n in outputs]


def root_values(
    program: Program, inputs: Sequence[Tensor], override: Override | None = None
) -> Values:
    """Return all values of a program's outer graph for a request; see `run_root`."""
    nodes = [n for n in program.root.graph.nodes if n.op != "output"]
    return _run_root(program, inputs, override, nodes)


def _run_root(
    program: Program,
    inputs: Sequence[Tensor],
    override: Override | None,
    wanted: Sequence[fx.Node],
) -> Values:
    def compute(run: Interpreter, node: fx.Node) -> Any:
        if override is not None and node.op == "call_module":
            results = override(node, list(run.arguments(node)[0]))
            if results is not None:
                return tuple(results)
        return run.run_node(node)

    calls = program.calls()
    with torch.no_grad():
        return Interpreter(program.root, wanted, also=calls).values(inputs, hook=compute)


# Measurements


def identity(program: Program, inputs: Sequence[Sequence[Tensor]]) -> dict[str, Any]:
    """Return what tells a program and requests from others by their values; part of a `cached` key.

    `Program.fingerprint` tells weights by object, which another process has others of.
    """
    known: dict[int, str] = {}

    def constant(tensor: Tensor) -> str:
        if id(tensor) not in known:
            # Digests of weights do not see two words of a prompt that change places.
            floats = tensor.is_floating_point()
            known[id(tensor)] = weight_digests.digest({"": tensor}) if floats else _sha256(tensor)
        return known[id(tensor)]

    bodies = program.graphs
    return {
        "program": {name: graph_fingerprint(gm, constant) for name, gm in bodies.items()},
        "inputs": [[_sha256(tensor) for tensor in tensors] for tensors in inputs],
    }


def loop_identity(
    program: Program, calls: Calls, inputs: Sequence[Sequence[Tensor]]
) -> dict[str, Any]:
    """Return what tells a loop on some requests from others; part of a `cached` key."""
    outer = {node: index for index, node in enumerate(program.root.graph.nodes)}
    places = sorted([*at, outer[call]] for at, call in calls.items())
    return {**identity(program, inputs), "calls": places}


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(container.raw_bytes(tensor)).hexdigest()


def cached(
    key: Mapping[str, Any], make: Callable[[], Mapping[str, Tensor]]
) -> Mapping[str, Tensor]:
    """Return the tensors that `make` computes, from disk if they were computed before.

    Args:
        key: All that they depend on, as JSON.
        make: Computes them; also where the entry on disk is damaged.
    """
    name = disk_cache.key(key)
    entry = disk_cache.get(name, "measurement")
    if entry is not None:
        return safetensors.torch.load(entry["values.safetensors"])
    tensors = make()
    content = b"".join(container.pack_tensors(tensors))
    disk_cache.put(name, {"values.safetensors": content}, "measurement")
    return tensors


def step_errors(
    program: Program,
    calls: Calls,
    groups: Mapping[str, Sequence[fx.Node]],
    inputs: Sequence[Sequence[Tensor]],
    *,
    max_gap: int = 3,
    progress: Progress = silent,
) -> Mapping[str, Tensor]:
    """Return, for each group, the relative errors of earlier values in place of those of a step.

    Entry [i, k] is the mean of |v@i - v@(i-k)| / |v@i|, both norms sums of absolute values, over
    requests, branches and the nodes of the group. It is infinite where there is no step i-k.

    Args:
        program: What to run.
        calls: The loop.
        groups: Nodes of the loop's body, by a name of the group.
        inputs: The flat inputs of each request.
        max_gap: The largest k.
        progress: Called with what is being done and the fraction done.
    """
    place = {
        n: i for call in calls.values() for i, n in enumerate(_body(program, call).graph.nodes)
    }
    key = {
        "step errors": 1,
        **loop_identity(program, calls, inputs),
        "groups": {name: sorted(place[n] for n in group) for name, group in groups.items()},
        "reach": max_gap,
    }
    return cached(key, lambda: _step_errors(program, calls, groups, inputs, max_gap, progress))


def _body(program: Program, call: fx.Node) -> fx.GraphModule:
    return program.components[str(call.target)]


def _step_errors(
    program: Program,
    calls: Calls,
    groups: Mapping[str, Sequence[fx.Node]],
    inputs: Sequence[Sequence[Tensor]],
    max_gap: int,
    progress: Progress,
) -> dict[str, Tensor]:
    size = 1 + max(step for step, _ in calls), 1 + max_gap
    total = {name: torch.zeros(size, dtype=torch.float64) for name in groups}
    count = {name: torch.zeros(size, dtype=torch.float64) for name in groups}
    nodes = {node for group in groups.values() for node in group}
    for index, tensors in enumerate(inputs):
        past: dict[tuple[int, int], dict[fx.Node, Tensor]] = {}
        for done, visit in enumerate(steps(program, calls, tensors, nodes)):
            what = f"calibrating: request {index + 1} of {len(inputs)}, step {visit.step + 1}"
            progress(what, (index + done / len(calls)) / len(inputs))
            past[visit.step, visit.branch] = visit.values
            past.pop((visit.step - max_gap - 1, visit.branch), None)
            for back in range(1 + max_gap):
                before = past.get((visit.step - back, visit.branch), {})
                for name, group in groups.items():
                    for node in group:
                        if node in before and node in visit.values:
                            error = _relative(visit.values[node], before[node])
                            total[name][visit.step, back] += error
                            count[name][visit.step, back] += 1
    missing = torch.tensor(torch.inf, dtype=torch.float64)
    return {n: torch.where(count[n] > 0, total[n] / count[n], missing) for n in groups}


def _relative(new: Tensor, old: Tensor) -> float:
    error = (new.float() - old.float()).abs().sum(dtype=torch.float64)
    norm = new.float().abs().sum(dtype=torch.float64)
    return float(error / norm) if error else 0.0
