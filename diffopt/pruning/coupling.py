"""Which indices of which weights go together: groups of units that a program can lose.

Every index of every axis of a stored tensor has a label (`labels`). Following them through all
bodies (`labelrules`) ties those that have to go together: what a residual adds, what a norm scales,
what one layer makes and others read, the parts of a head, the halves of a gate. What is left are
units, each some indices of some tensors' axes. Units that concern the same axes are a group.

What a body takes and returns keeps its shape, and so does what an operator without a rule reads.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from diffopt.ir.program import Program
from diffopt.pruning.index_labels import along, changes, constant, narrow, varying
from diffopt.pruning.label_propagation import Flow, Source
from diffopt.pruning.label_rules import RULES

Kind = Literal["channels", "heads", "dims", "mlp"]
KINDS: tuple[Kind, ...] = ("channels", "heads", "dims", "mlp")

Axis = tuple[int, int]
"""A stored tensor, by identity, and one of its axes."""


@dataclass(frozen=True, eq=False)
class Unit:
    """What goes as a whole: some indices of axes of stored tensors."""

    label: int
    members: dict[Axis, Tensor]


@dataclass(frozen=True, eq=False)
class Group:
    """Units that concern the same axes.

    Attributes:
        name: The layer that makes them, the first in the graph, with its component.
        kind: Heads of an attention; what is in all of its heads; the inside of layers in a row; or
            channels, all the rest.
        units: In the order of the first layer's outputs.
        layers: The names of all layers that make them.
        made: The axes of those layers' weights.
        parts: Some of the units, as labels, of each of which one has to stay: values that have no
            others, such as slices.
    """

    name: str
    kind: Kind
    units: tuple[Unit, ...]
    layers: tuple[str, ...]
    made: tuple[Axis, ...]
    parts: tuple[frozenset[int], ...] = ()

    def width(self, unit: Unit) -> int:
        """Return how many outputs of its first layer a unit is."""
        return len(unit.members[self.made[0]])


@dataclass(frozen=True, eq=False)
class Coupling:
    """What goes together in a program.

    Attributes:
        flow: The labels of all values.
        roots: Of each label, the least one that it goes together with.
        groups: What can go, in the graphs' order.
        fixed: Layers none of whose outputs can go, each with the reason.
    """

    flow: Flow
    roots: Tensor
    groups: tuple[Group, ...]
    fixed: tuple[tuple[str, str], ...]


def couple(program: Program, *, in_heads: bool = False) -> Coupling:
    """Find out what goes together in all bodies of a program at once.

    Args:
        program: Where to look.
        in_heads: Let heads of attentions stay, and what is in them go, the same in all of them.
    """
    flow = Flow(in_heads=in_heads)
    for name, gm in {**program.components, "": program.root}.items():
        flow.read(name, gm, RULES)
    roots = _settled(flow)
    for check in flow.checks:
        check(roots)
    roots = flow.labels.roots()
    values: dict[bytes, Tensor] = {}
    for factor in _factors(flow):
        left = _labels(factor, roots)
        if len(left) == 1:
            flow.labels.pin(factor, "nothing would be left of it")
        values[left.numpy().tobytes()] = left
    reasons = _reasons(flow, roots)
    groups = tuple(_with_parts([*_groups(flow, roots, reasons)], [*values.values()], len(roots)))
    return Coupling(flow, roots, groups, tuple(_fixed(flow, roots, reasons)))


def _with_parts(groups: list[Group], values: list[Tensor], count: int) -> Iterator[Group]:
    """Give groups their parts: the labels of values that have some of a group's, and no others."""
    owner = torch.full((count,), -1)
    for number, group in enumerate(groups):
        owner[[unit.label for unit in group.units]] = number
    parts: list[list[frozenset[int]]] = [[] for _ in groups]
    for labels in values:
        number = int(owner[labels[0]]) if len(labels) else -1
        if number < 0 or len(labels) >= len(groups[number].units):
            continue
        if bool((owner[labels] == number).all()):
            parts[number].append(frozenset(labels.tolist()))
    for group, own in zip(groups, parts, strict=True):
        yield dataclasses.replace(group, parts=tuple(own))


def _labels(factor: Tensor, roots: Tensor) -> Tensor:
    """Return the roots of all labels of a factor, each once."""
    found: Tensor = roots[narrow(factor, constant(factor))].unique()  # type: ignore[no-untyped-call]
    return found


def _factors(flow: Flow) -> Iterator[Tensor]:
    """Yield the factors of all values and stored tensors, each once."""
    seen: set[int] = set()
    for values in flow.values.values():
        for value in values.values():
            for item in value:
                for factor in item if isinstance(item, list) else [item]:
                    if id(factor) not in seen:
                        seen.add(id(factor))
                        yield factor


def _settled(flow: Flow) -> Tensor:
    """Tie labels until no value changes along several axes; return the roots.

    Where an axis was split (into heads and what is in them) and nothing else decides, whole rows
    go: what is in them may be positions or angles. What is in heads that stay goes itself.
    """
    joint = [f for f in _factors(flow) if len(varying(f)) > 1]
    while True:
        roots = flow.labels.roots()
        open_axes = [(factor, changes(factor, roots)) for factor in joint]
        open_axes = [(factor, axes) for factor, axes in open_axes if len(axes) > 1]
        if not open_axes:
            return roots
        dims = _roots_of(flow.dims, roots)
        for factor, axes in open_axes:
            inside = not dims.isdisjoint(_labels(factor, roots).tolist())
            flow.labels.collapse(factor, axes[:-1] if inside else axes[1:])


def _reasons(flow: Flow, roots: Tensor) -> dict[int, str]:
    """Return why labels stay, by their roots."""
    reasons: dict[int, str] = {}
    for labels, reason in flow.labels.pins:
        for root in set(roots[labels].tolist()):
            reasons.setdefault(root, reason)
    return reasons


def _groups(flow: Flow, roots: Tensor, reasons: dict[int, str]) -> Iterator[Group]:
    """Put free units that concern the same axes together."""
    units = _units(flow, roots, reasons)
    heads, dims, sums = (_roots_of(own, roots) for own in (flow.heads, flow.dims, flow.sums))
    sources: dict[Axis, list[Source]] = collections.defaultdict(list)
    for source in flow.sources:
        sources[id(source.tensor), source.axis].append(source)
    order = {axis: number for number, axis in enumerate(sources)}
    alike: dict[tuple[Kind, frozenset[Axis]], list[Unit]] = collections.defaultdict(list)
    for unit in units:
        alike[_kind(flow, unit, heads, dims, sums), frozenset(unit.members)].append(unit)
    found: list[tuple[tuple[int, int], Kind, list[Axis], list[Unit]]] = []
    for (kind, axes), own in alike.items():
        made = sorted(axes & sources.keys(), key=order.__getitem__)
        if made:
            own.sort(key=lambda unit: int(unit.members[made[0]][0]))
            found.append(((order[made[0]], int(own[0].members[made[0]][0])), kind, made, own))
    count: collections.Counter[str] = collections.Counter()
    for _, kind, made, own in sorted(found, key=lambda row: row[0]):
        own_sources = [s for axis in made for s in sources[axis]]
        layers = tuple(dict.fromkeys(_name(s.component, s.node) for s in own_sources))
        count[layers[0]] += 1
        name = layers[0] if count[layers[0]] == 1 else f"{layers[0]}:{count[layers[0]]}"
        yield Group(name, kind, tuple(own), layers, tuple(made))


def _units(flow: Flow, roots: Tensor, reasons: dict[int, str]) -> list[Unit]:
    """Return all units that may go, with their members."""
    members: dict[int, dict[Axis, Tensor]] = collections.defaultdict(dict)
    for axis, labels in _axes(flow):
        indices: dict[int, list[int]] = collections.defaultdict(list)
        for index, root in enumerate(roots[labels].tolist()):
            indices[root].append(index)
        for root, own in indices.items():
            if root not in reasons:
                members[root][axis] = torch.tensor(own)
    return [Unit(root, own) for root, own in members.items()]


def _kind(flow: Flow, unit: Unit, heads: set[int], dims: set[int], sums: set[int]) -> Kind:
    """Tell what a unit is: added values and those of convolutions are channels."""
    if unit.label in heads:
        return "heads"
    if unit.label in dims:
        return "dims"
    wide = any(flow.tensors[tensor].dim() > 2 for tensor, _ in unit.members)
    return "channels" if wide or unit.label in sums else "mlp"


def _axes(flow: Flow) -> Iterator[tuple[Axis, Tensor]]:
    """Yield every axis of every stored tensor that was read, with its labels."""
    for key, factors in flow.stored.items():
        for axis, factor in factors.items():
            yield (key, axis), along(factor, axis)


def _roots_of(factors: Iterable[Tensor], roots: Tensor) -> set[int]:
    found: set[int] = set()
    for factor in factors:
        found.update(_labels(factor, roots).tolist())
    return found


def _fixed(flow: Flow, roots: Tensor, reasons: dict[int, str]) -> Iterator[tuple[str, str]]:
    """Yield the layers of which no output can go, and why."""
    seen: set[Axis] = set()
    for source in flow.sources:
        axis = id(source.tensor), source.axis
        if axis in seen:
            continue
        seen.add(axis)
        if axis[1] not in flow.stored[axis[0]]:
            continue  # of size 1
        found = roots[along(flow.stored[axis[0]][axis[1]], axis[1])].tolist()
        if all(root in reasons for root in found):
            yield _name(source.component, source.node), reasons[found[0]]
    for name in dict.fromkeys(_name(*own) for own in flow.computed):
        yield name, "its weight is computed"


def _name(component: str, node: fx.Node) -> str:
    path = node.meta.get("module") or node.name
    return f"{component}.{path}" if component else str(path)
