"""Tags of component calls: of which component, in which step, of which branch of guidance.

Capture tags every call of the root graph, and passes keep the tags. The step is how many calls of
the component it depths for, one after the other. Calls of one step that do not wait for each other
are branches; a call belongs to the branch whose last call shares most arguments with it (the
prompt's embedding, say), so that a step without guidance continues the right one.

A pass that lets a call reuse a value from inside an earlier call marks the argument that it is
passed as: `meta["reuse"] = True` on the placeholder of the component's body. `verify` reads the
source from the graph, so the mark cannot go stale when arguments move or equal values are merged.
A rule about all values would refuse every guidance, whose next latents depend on both branches.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import fx

from diffopt.errors import VerifyError
from diffopt.ir import graph as g

Key = TypeVar("Key")


@dataclass(frozen=True)
class Tag:
    """Which call of a component: a pass that replaces the call's body keeps the tag.

    Attributes:
        component: Its name at capture.
        step: How many calls of it depend on each other up to this one, counted from 0.
        branch: Of those that do not.
        timestep: The number that the call was told, and others of the component in other steps:
            how much noise there is, as the scheduler counts it. None where there is none such.
    """

    component: str
    step: int
    branch: int
    timestep: float | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.component}, step {self.step}, branch {self.branch}"


def tag(node: fx.Node) -> Tag | None:
    """Return a call's tag; calls that passes insert before the loop have none."""
    return node.meta.get("tag") if node.op == "call_module" else None


def reused(root: fx.GraphModule, call: fx.Node) -> dict[fx.Node, fx.Node]:
    """Return the values that a call reuses, by the placeholders that they are passed to."""
    pairs = zip(g.placeholders(g.attribute(root, str(call.target))), call.args, strict=True)
    return {a: b for a, b in pairs if a.meta.get("reuse") and isinstance(b, fx.Node)}


def assign(root: fx.GraphModule) -> None:
    """Tag every component call of a captured root graph."""
    depths: dict[fx.Node, Mapping[str, int]] = {}  # the calls in a row up to a node, by component
    branches: dict[str, list[fx.Node]] = {}  # the last call of every branch
    for node in root.graph.nodes:
        depths[node] = _maxima([depths[n] for n in node.all_input_nodes])
        if node.op != "call_module":
            continue
        # All bodies of one component have its name; as submodules, the second is `unet_2`.
        component = type(g.attribute(root, str(node.target))).__name__
        step = depths[node].get(component, 0)
        depths[node] = {**depths[node], component: step + 1}
        branch = _branch(node, step, branches.setdefault(component, []))
        node.meta["tag"] = Tag(component, step, branch)
    calls: dict[str, list[fx.Node]] = {}
    for node in root.graph.find_nodes(op="call_module", sort=True):
        calls.setdefault(node.meta["tag"].component, []).append(node)
    for group in calls.values():
        for node, timestep in zip(group, _timesteps(root, group), strict=True):
            node.meta["tag"] = replace(node.meta["tag"], timestep=timestep)


def _timesteps(root: fx.GraphModule, calls: Sequence[fx.Node]) -> Sequence[float | None]:
    """Return the constant that calls pass, and that goes up or down from step to step."""
    by_step = [call.meta["tag"].step for call in calls]
    for actual in zip(*(call.args for call in calls), strict=False):
        numbers = [_number(root, value) for value in actual]
        # One number a step, whatever the branch.
        steps = dict(zip(by_step, numbers, strict=True))
        values = [steps[step] for step in sorted(steps)]
        if None in numbers or any(steps[s] != n for s, n in zip(by_step, numbers, strict=True)):
            continue
        differences = {(b > a) - (b < a) for a, b in itertools.pairwise(values)}
        if differences in ({1}, {-1}):
            return numbers
    return [None] * len(calls)


def _number(root: fx.GraphModule, value: object) -> float | None:
    """Return the value of a constant all of whose elements are the same number."""
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    tensor = g.attribute(root, str(value.target))
    if tensor.numel() == 0 or tensor.dtype == torch.bool or (tensor != tensor.flatten()[0]).any():
        return None
    return float(tensor.flatten()[0])


def _branch(call: fx.Node, step: int, last: list[fx.Node]) -> int:
    """Return a call's branch, and record it as the last call of that branch."""
    # Steps of a branch go up in the order of the graph, also where two loops are independent.
    free = [i for i, other in enumerate(last) if other.meta["tag"].step < step]
    if not free:
        last.append(call)
        return len(last) - 1
    branch = max(free, key=lambda i: _shared(call, last[i]))  # of equal ones the first
    last[branch] = call
    return branch


def _shared(a: fx.Node, b: fx.Node) -> int:
    """Count the arguments that two calls have in common."""
    return len({_value(n) for n in a.all_input_nodes} & {_value(n) for n in b.all_input_nodes})


def _value(node: fx.Node) -> object:
    return node.target if node.op == "get_attr" else node


def _maxima(mappings: Sequence[Mapping[Key, int]]) -> Mapping[Key, int]:
    """Return the largest number of each key; a single mapping is shared, which saves memory."""
    mappings = list({id(numbers): numbers for numbers in mappings if numbers}.values())
    if len(mappings) < 2:
        return mappings[0] if mappings else {}
    merged: dict[Key, int] = {}
    for numbers in mappings:
        for key, number in numbers.items():
            merged[key] = max(number, merged.get(key, number))
    return merged


# Checking


def verify(root: fx.GraphModule) -> None:
    """Raise a `VerifyError` for tags used twice, steps out of order and reuse across branches."""
    tagged: dict[Tag, fx.Node] = {}
    latest: dict[fx.Node, Mapping[tuple[str, int], int]] = {}  # the last step of every branch
    for node in root.graph.nodes:
        latest[node] = _maxima([latest[n] for n in node.all_input_nodes])
        this = tag(node)
        if this is None:
            continue
        if this in tagged:
            raise _error(node, f"tagged as {this}, and so is {tagged[this].format_node()}")
        tagged[this] = node
        branch = (this.component, this.branch)
        step = latest[node].get(branch, -1)
        if step > this.step:
            raise _error(node, f"tagged as {this}, and depends on step {step} of this branch")
        latest[node] = {**latest[node], branch: this.step}
        for formal, value in reused(root, node).items():
            sources = _sources(value)
            if not sources:
                raise _error(node, f"{formal.name} reuses what no earlier step returns")
            for source in sources:  # that its step is an earlier one was checked above
                if (source.component, source.branch) != branch:
                    raise _error(node, f"{formal.name} of {this} reuses a value of {source}")


def _sources(value: fx.Node) -> list[Tag]:
    """Return the tags of the calls that a value depends on with no other call in between."""
    nodes = g.reachable([value], lambda n: () if n.op == "call_module" else n.all_input_nodes)
    tags = (tag(node) for node in nodes)
    return sorted((each for each in tags if each is not None), key=str)


def _error(call: fx.Node, message: str) -> VerifyError:
    return VerifyError(f"program: {call.format_node()}: {message}")
