"""Where a component's call comes from: the component, its step, its branch of guidance.

Capture tags every call of the root graph, and passes keep the tags. The step is how many calls of
the component it waits for, one after the other. Calls of one step that do not wait for each other
are branches; a call belongs to the branch whose last call shares most arguments with it (the
prompt's embedding, say), so that a step without guidance continues the right one.

A pass that lets a call reuse a value from inside an earlier call marks the argument that takes it:
`meta["reuse"] = True` on the placeholder of the component's body. `verify` reads the source from
the graph, so the mark cannot go stale when arguments move or equal values are merged. A rule about
all values would refuse every guidance: both branches' results make the next latents of both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import fx

from diffopt.errors import VerifyError
from diffopt.ir import graph as g

Key = TypeVar("Key")


@dataclass(frozen=True)
class Tag:
    """Which call of a component: the tag stays when the call's body becomes another one."""

    component: str
    step: int
    branch: int

    def __str__(self) -> str:
        return f"{self.component}, step {self.step}, branch {self.branch}"


def tag(node: fx.Node) -> Tag | None:
    """Return a call's tag; a call that a pass put before the loop has none."""
    return node.meta.get("tag") if node.op == "call_module" else None


def reused(root: fx.GraphModule, call: fx.Node) -> dict[fx.Node, fx.Node]:
    """Return the values that a call reuses, by the placeholders that take them."""
    takes = g.placeholders(g.attribute(root, str(call.target)))
    pairs = zip(takes, call.args, strict=True)
    return {a: b for a, b in pairs if a.meta.get("reuse") and isinstance(b, fx.Node)}


def assign(root: fx.GraphModule) -> None:
    """Tag every component call of a captured root graph."""
    waits: dict[fx.Node, Mapping[str, int]] = {}  # the calls in a row up to a node, by component
    branches: dict[str, list[fx.Node]] = {}  # the last call of every branch
    for node in root.graph.nodes:
        waits[node] = _merge([waits[n] for n in node.all_input_nodes])
        if node.op != "call_module":
            continue
        # All bodies of one component have its name; as submodules, the second is `unet_2`.
        component = type(g.attribute(root, str(node.target))).__name__
        step = waits[node].get(component, 0)
        waits[node] = {**waits[node], component: step + 1}
        branch = _branch(node, step, branches.setdefault(component, []))
        node.meta["tag"] = Tag(component, step, branch)


def _branch(call: fx.Node, step: int, last: list[fx.Node]) -> int:
    """Return a call's branch, and make it the last call of that branch."""
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


def _merge(known: Sequence[Mapping[Key, int]]) -> Mapping[Key, int]:
    """Return the largest numbers; nodes share the mapping where nothing new comes to it."""
    known = list({id(numbers): numbers for numbers in known if numbers}.values())
    if len(known) < 2:
        return known[0] if known else {}
    merged: dict[Key, int] = {}
    for numbers in known:
        for key, number in numbers.items():
            merged[key] = max(number, merged.get(key, number))
    return merged


# Checking


def verify(root: fx.GraphModule) -> None:
    """Check that tags are unique, that steps follow one another, and what is reused where."""
    taken: dict[Tag, fx.Node] = {}
    latest: dict[fx.Node, Mapping[tuple[str, int], int]] = {}  # the last step of every branch
    for node in root.graph.nodes:
        latest[node] = _merge([latest[n] for n in node.all_input_nodes])
        own = tag(node)
        if own is None:
            continue
        if own in taken:
            raise _error(node, f"tagged as {own}, and so is {taken[own].format_node()}")
        taken[own] = node
        branch = (own.component, own.branch)
        step = latest[node].get(branch, -1)
        if step > own.step:
            raise _error(node, f"tagged as {own}, and depends on step {step} of this branch")
        latest[node] = {**latest[node], branch: own.step}
        for formal, value in reused(root, node).items():
            sources = _sources(value)
            if not sources:
                raise _error(node, f"{formal.name} reuses what no earlier step returns")
            for source in sources:  # that its step is an earlier one was checked above
                if (source.component, source.branch) != branch:
                    raise _error(node, f"{formal.name} of {own} reuses a value of {source}")


def _sources(value: fx.Node) -> list[Tag]:
    """Return the tags of the calls that a value is computed from without another call between."""
    nodes = g.reachable([value], lambda n: () if n.op == "call_module" else n.all_input_nodes)
    found = (tag(node) for node in nodes)
    return sorted((own for own in found if own is not None), key=str)


def _error(call: fx.Node, message: str) -> VerifyError:
    return VerifyError(f"program: {call.format_node()}: {message}")
