"""Which indices of which weights are coupled: groups of units that can be removed from a program.

Every index of every axis of a stored tensor has a label (`index_labels` has an example). Following
them through all bodies (`label_rules`) unites those that are coupled: what a residual adds, what a
norm scales, what one layer computes and others read, the inside of a head, the halves of a gate.
The equivalence classes are units, each some indices of some tensors' axes. Units of the same axes
are a group.

A body's arguments and results keep their shapes, and so does what an operator without a rule reads.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from diffopt.ir.nodes import module_path
from diffopt.ir.program import Program
from diffopt.pruning.index_labels import along, constant, narrow, varying, varying_by_class
from diffopt.pruning.label_propagation import Flow, Source
from diffopt.pruning.label_rules import RULES

Kind = Literal["channels", "heads", "dims", "mlp"]
KINDS: tuple[Kind, ...] = ("channels", "heads", "dims", "mlp")

Axis = tuple[int, int]
"""A stored tensor, by identity, and one of its axes."""


@dataclass(frozen=True, eq=False)
class Unit:
    """What is removed as a whole: some indices of axes of stored tensors."""

    label: int
    members: dict[Axis, Tensor]


@dataclass(frozen=True, eq=False)
class Group:
    """Units of the same axes.

    Attributes:
        name: The layer that computes them, the first in the graph, with its component.
        kind: Heads of an attention; what is in all of its heads; the inside of layers in a row; or
            channels, all the rest.
        units: In the order of the first layer's outputs.
        layers: The names of all layers that compute them.
        output_axes: The axes of those layers' weights.
        keep_one_of: Sets of units, as labels, of each of which one has to be kept: values that have
            no others, such as slices.
    """

    name: str
    kind: Kind
    units: tuple[Unit, ...]
    layers: tuple[str, ...]
    output_axes: tuple[Axis, ...]
    keep_one_of: tuple[frozenset[int], ...] = ()

    def width(self, unit: Unit) -> int:
        """Return how many outputs of its first layer a unit is."""
        return len(unit.members[self.output_axes[0]])


@dataclass(frozen=True, eq=False)
class Coupling:
    """What is coupled in a program.

    Attributes:
        flow: The labels of all values.
        classes: Of each label, its equivalence class: the least label of it.
        groups: What can be removed, in the graphs' order.
        fixed: Layers none of whose outputs can be removed, each with the reason.
    """

    flow: Flow
    classes: Tensor
    groups: tuple[Group, ...]
    fixed: tuple[tuple[str, str], ...]


def couple(program: Program, *, in_heads: bool = False) -> Coupling:
    """Return what is coupled in all bodies of a program at once.

    Args:
        program: Where to look.
        in_heads: Keep heads of attentions, and remove what is in them, the same in all of them.
    """
    flow = Flow(in_heads=in_heads)
    for name, gm in {**program.components, "": program.root}.items():
        flow.read(name, gm, RULES)
    classes = _with_one_axis(flow)
    for check in flow.checks:
        check(classes)
    classes = flow.labels.classes()
    values: dict[bytes, Tensor] = {}
    for factor in _factors(flow):
        labels = _labels(factor, classes)
        if len(labels) == 1:
            flow.labels.constrain(factor, "nothing would be left of it")
        values[labels.numpy().tobytes()] = labels
    reasons = _reasons(flow, classes)
    groups = _with_subsets([*_groups(flow, classes, reasons)], [*values.values()], len(classes))
    return Coupling(flow, classes, tuple(groups), tuple(_fixed(flow, classes, reasons)))


def _with_subsets(groups: list[Group], values: list[Tensor], count: int) -> Iterator[Group]:
    """Yield groups with `keep_one_of`: values all of whose labels are some of the group's."""
    owner = torch.full((count,), -1)
    for number, group in enumerate(groups):
        owner[[unit.label for unit in group.units]] = number
    subsets: list[list[frozenset[int]]] = [[] for _ in groups]
    for labels in values:
        number = int(owner[labels[0]]) if len(labels) else -1
        if number < 0 or len(labels) >= len(groups[number].units):
            continue
        if bool((owner[labels] == number).all()):
            subsets[number].append(frozenset(labels.tolist()))
    for group, sets in zip(groups, subsets, strict=True):
        yield dataclasses.replace(group, keep_one_of=tuple(sets))


def _labels(factor: Tensor, classes: Tensor) -> Tensor:
    """Return the classes of all labels of a factor, each once."""
    unique: Tensor = classes[narrow(factor, constant(factor))].unique()  # type: ignore[no-untyped-call]
    return unique


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


def _with_one_axis(flow: Flow) -> Tensor:
    """Unite labels until no factor varies along several axes; return the classes.

    Where an axis was split (into heads and what is in them) and nothing else decides, whole rows
    are removed: what is in them may be positions or angles. In heads that are kept, what is in them
    is removed.
    """
    joint = [f for f in _factors(flow) if len(varying(f)) > 1]
    while True:
        classes = flow.labels.classes()
        open_axes = [(factor, varying_by_class(factor, classes)) for factor in joint]
        open_axes = [(factor, axes) for factor, axes in open_axes if len(axes) > 1]
        if not open_axes:
            return classes
        dims = _classes_of(flow.dims, classes)
        for factor, axes in open_axes:
            inside = not dims.isdisjoint(_labels(factor, classes).tolist())
            flow.labels.collapse(factor, axes[:-1] if inside else axes[1:])


def _reasons(flow: Flow, classes: Tensor) -> dict[int, str]:
    """Return why labels are kept, by their classes."""
    reasons: dict[int, str] = {}
    for labels, reason in flow.labels.constraints:
        for label in set(classes[labels].tolist()):
            reasons.setdefault(label, reason)
    return reasons


def _groups(flow: Flow, classes: Tensor, reasons: dict[int, str]) -> Iterator[Group]:
    """Yield groups: the units of the same axes, of those without a constraint."""
    heads, dims, sums = (_classes_of(f, classes) for f in (flow.heads, flow.dims, flow.sums))
    sources: dict[Axis, list[Source]] = collections.defaultdict(list)
    for source in flow.sources:
        sources[id(source.tensor), source.axis].append(source)
    order = {axis: number for number, axis in enumerate(sources)}
    alike: dict[tuple[Kind, frozenset[Axis]], list[Unit]] = collections.defaultdict(list)
    for unit in _units(flow, classes, reasons):
        alike[_kind(flow, unit, heads, dims, sums), frozenset(unit.members)].append(unit)
    rows: list[tuple[tuple[int, int], Kind, list[Axis], list[Unit]]] = []
    for (kind, axes), units in alike.items():
        outputs = sorted(axes & sources.keys(), key=order.__getitem__)
        if outputs:
            units.sort(key=lambda unit: int(unit.members[outputs[0]][0]))
            place = order[outputs[0]], int(units[0].members[outputs[0]][0])
            rows.append((place, kind, outputs, units))
    count: collections.Counter[str] = collections.Counter()
    for _, kind, outputs, units in sorted(rows, key=lambda row: row[0]):
        layers = tuple(
            dict.fromkeys(_name(s.component, s.node) for axis in outputs for s in sources[axis])
        )
        count[layers[0]] += 1
        name = layers[0] if count[layers[0]] == 1 else f"{layers[0]}:{count[layers[0]]}"
        yield Group(name, kind, tuple(units), layers, tuple(outputs))


def _units(flow: Flow, classes: Tensor, reasons: dict[int, str]) -> list[Unit]:
    """Return all units that can be removed, with their members."""
    members: dict[int, dict[Axis, Tensor]] = collections.defaultdict(dict)
    for axis, labels in _axes(flow):
        indices: dict[int, list[int]] = collections.defaultdict(list)
        for index, label in enumerate(classes[labels].tolist()):
            indices[label].append(index)
        for label, at in indices.items():
            if label not in reasons:
                members[label][axis] = torch.tensor(at)
    return [Unit(label, axes) for label, axes in members.items()]


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


def _classes_of(factors: Iterable[Tensor], classes: Tensor) -> set[int]:
    return {label for factor in factors for label in _labels(factor, classes).tolist()}


def _fixed(flow: Flow, classes: Tensor, reasons: dict[int, str]) -> Iterator[tuple[str, str]]:
    """Yield the layers of which no output can be removed, and why."""
    seen: set[Axis] = set()
    for source in flow.sources:
        axis = id(source.tensor), source.axis
        if axis in seen:
            continue
        seen.add(axis)
        if axis[1] not in flow.stored[axis[0]]:
            continue  # of size 1
        labels = classes[along(flow.stored[axis[0]][axis[1]], axis[1])].tolist()
        if all(label in reasons for label in labels):
            yield _name(source.component, source.node), reasons[labels[0]]
    for name in dict.fromkeys(_name(*layer) for layer in flow.computed):
        yield name, "its weight is computed"


def _name(component: str, node: fx.Node) -> str:
    path = module_path(node)
    return f"{component}.{path}" if component else path
