"""Where stored tensors come from: how each changes with the weights of the pipeline.

Passes replace weights by others: merged, scaled by a norm's weight, in another type. Which change
of such a tensor follows from a change of the pipeline's weights (a LoRA's) is linear in that, and
is kept as a small expression, an `Origin`:

    qkv.weight    Joined([Weight(q), Weight(k), Weight(v)])
    proj.weight   Scaled(Weight(proj.weight), the norm's weight)
    proj.bias     Product(Weight(proj.weight), the norm's bias)

Origins belong to tensors, which graphs share by reference; so no pass has to hand them on. What a
pass computes of weights in any other way is `Unknown`, and these weights are closed: no change of
them can be followed (see `Program.closed`). A tensor without an origin is either a constant or made
by a pass that says nothing; `core.pass_manager` closes the weights that such a pass has used up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakIdKeyDictionary

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """A weight of the pipeline: `name` is that of its component, a dot, and its own there."""

    name: str
    shape: Shape


@dataclass(frozen=True, eq=False)
class Scaled:
    """Something times a tensor of as many dimensions, which broadcasts to it."""

    of: Origin
    factor: Tensor


@dataclass(frozen=True, eq=False)
class Product:
    """A layer's weight [outputs, inputs, …], summed over pixels, times a vector of inputs."""

    of: Origin
    vector: Tensor


@dataclass(frozen=True, eq=False)
class Sum:
    """The sum of several of one shape."""

    parts: tuple[Origin, ...]


@dataclass(frozen=True, eq=False)
class Joined:
    """Several one after the other along the first dimension."""

    parts: tuple[Origin, ...]


@dataclass(frozen=True)
class Constant:
    """What depends on no weight of the pipeline."""

    shape: Shape


@dataclass(frozen=True)
class Unknown:
    """What depends on these weights of the pipeline, and nobody knows how."""

    names: frozenset[str]
    shape: Shape


@dataclass(frozen=True, eq=False)
class Computed:
    """What calls of components compute of constants, and so of these weights of the pipeline.

    `graph` does that as an outer graph does, with the names of components and no inputs. Passes
    change components and not it; so whether it still gives the tensor has to be tried.
    """

    names: frozenset[str]
    shape: Shape
    graph: fx.GraphModule


Origin = Weight | Scaled | Product | Sum | Joined | Constant | Unknown | Computed
Leaf = Weight | Constant | Unknown | Computed

_origins = WeakIdKeyDictionary()


def record(tensor: Tensor, origin: Origin) -> None:
    """Say where a tensor comes from."""
    _origins[tensor] = origin


def is_recorded(tensor: Tensor) -> bool:
    """Tell whether anybody has said where a tensor comes from."""
    return tensor in _origins


def origin_of(tensor: Tensor) -> Origin:
    """Return where a tensor comes from; of one that nobody has recorded, that it is a constant."""
    origin: Origin = _origins.get(tensor) or Constant(tuple(tensor.shape))  # type: ignore[no-untyped-call]
    return origin


def record_computed(tensor: Tensor, sources: Iterable[Tensor]) -> None:
    """Say that a tensor was computed of others, nobody knows how."""
    record(tensor, unknown(sources, tensor.shape))


def unknown(sources: Iterable[Tensor], shape: Sequence[int]) -> Origin:
    """Return the origin of what is computed of tensors, nobody knows how."""
    names = frozenset(name for source in sources for name in every_name(origin_of(source)))
    return Unknown(names, tuple(shape)) if names else Constant(tuple(shape))


def merge(tensor: Tensor, other: Tensor) -> None:
    """Say that a tensor also takes the place of another, which holds the same."""
    one, two = origin_of(tensor), origin_of(other)
    is_same = isinstance(one, Computed) and isinstance(two, Computed) and one.names == two.names
    if not is_same:
        record_computed(tensor, (tensor, other))


def scaled(origin: Origin, factor: Tensor) -> Origin:
    """Return the origin of what is multiplied by a tensor that broadcasts to it."""
    return origin if isinstance(origin, Constant) else Scaled(origin, factor)


def product(origin: Origin, vector: Tensor) -> Origin:
    """Return the origin of a layer's weight times a vector of inputs."""
    if isinstance(origin, Constant):
        return Constant(origin.shape[:1])
    return Product(origin, vector)


def total(parts: Sequence[Origin]) -> Origin:
    """Return the origin of a sum of at least one term."""
    kept = tuple(part for part in parts if not isinstance(part, Constant))
    return Sum(kept) if len(kept) > 1 else (*kept, parts[0])[0]


def joined(parts: Sequence[Origin]) -> Origin:
    """Return the origin of what is concatenated along the first dimension."""
    result = Joined(tuple(parts))
    is_constant = all(isinstance(part, Constant) for part in parts)
    return Constant(shape_of(result)) if is_constant else result


def shape_of(origin: Origin) -> Shape:
    """Return the shape of the tensor."""
    if isinstance(origin, Leaf):
        return origin.shape
    if isinstance(origin, Scaled):
        return shape_of(origin.of)
    if isinstance(origin, Product):
        return shape_of(origin.of)[:1]
    shapes = [shape_of(part) for part in origin.parts]
    if isinstance(origin, Sum):
        return shapes[0]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def leaves(origin: Origin) -> list[Leaf]:
    """Return what an origin consists of, from left to right."""
    if isinstance(origin, Leaf):
        return [origin]
    parts = origin.parts if isinstance(origin, Sum | Joined) else (origin.of,)
    return [leaf for part in parts for leaf in leaves(part)]


def weights(origin: Origin) -> list[Weight]:
    """Return the weights of the pipeline of whose changes the tensor's is known."""
    return [leaf for leaf in leaves(origin) if isinstance(leaf, Weight)]


def unknown_names(origin: Origin) -> set[str]:
    """Return the names of the weights of which nobody knows how the tensor depends on them."""
    return {n for leaf in leaves(origin) if isinstance(leaf, Unknown) for n in leaf.names}


def every_name(origin: Origin) -> set[str]:
    """Return the names of all weights that the tensor depends on."""
    computed = {n for leaf in leaves(origin) if isinstance(leaf, Computed) for n in leaf.names}
    return unknown_names(origin) | computed | {weight.name for weight in weights(origin)}


def change(origin: Origin, changes: Mapping[str, Tensor]) -> Tensor | None:
    """Return how a tensor changes, None if it does not.

    Args:
        origin: Of the tensor.
        changes: Of the pipeline's weights by name, all of one type, which is the result's.
    """
    if isinstance(origin, Weight):
        return changes.get(origin.name)
    if isinstance(origin, Constant | Unknown | Computed):
        return None
    if isinstance(origin, Scaled | Product):
        inner = change(origin.of, changes)
        if inner is None:
            return None
        if isinstance(origin, Scaled):
            return inner * origin.factor.to(inner.dtype)
        rows = inner.flatten(2).sum(2) if inner.dim() > 2 else inner
        return rows @ origin.vector.to(rows.dtype)
    parts = [change(part, changes) for part in origin.parts]
    known = [part for part in parts if part is not None]
    if not known:
        return None
    if isinstance(origin, Sum):
        return torch.stack(known).sum(0) if len(known) > 1 else known[0]
    return torch.cat(
        [
            known[0].new_zeros(shape_of(part)) if inner is None else inner
            for part, inner in zip(origin.parts, parts, strict=True)
        ]
    )


def to_json(origin: Origin, key_of: Callable[[Tensor], str]) -> dict[str, Any]:
    """Return an origin as JSON; `key_of` returns the key under which a tensor is stored.

    What is unknown depends on closed weights alone, and is written as a constant; what is computed
    by components is that only as a whole (see `Program.to_members`).
    """
    if isinstance(origin, Weight):
        return {"weight": [origin.name, list(origin.shape)]}
    if isinstance(origin, Constant | Unknown | Computed):
        return {"constant": list(origin.shape)}
    if isinstance(origin, Scaled):
        return {"scaled": [to_json(origin.of, key_of), key_of(origin.factor)]}
    if isinstance(origin, Product):
        return {"product": [to_json(origin.of, key_of), key_of(origin.vector)]}
    kind = "sum" if isinstance(origin, Sum) else "joined"
    return {kind: [to_json(part, key_of) for part in origin.parts]}


def from_json(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Origin:
    """Return the origin that `to_json` gave; one that does not fit together is a `ValueError`."""
    ((kind, value),) = data.items()
    if kind == "weight":
        return Weight(value[0], tuple(value[1]))
    if kind == "constant":
        return Constant(tuple(value))
    if kind in ("scaled", "product"):
        inner, tensor = from_json(value[0], tensors), tensors[value[1]]
        shape = shape_of(inner)
        if kind == "scaled":
            sizes = zip(tensor.shape, shape, strict=False)
            if tensor.dim() != len(shape) or any(size not in (1, full) for size, full in sizes):
                raise ValueError(f"a factor of shape {list(tensor.shape)} for {list(shape)}")
            return Scaled(inner, tensor)
        if tuple(tensor.shape) != shape[1:2] or not shape[1:2]:
            raise ValueError(f"a vector of shape {list(tensor.shape)} for {list(shape)}")
        return Product(inner, tensor)
    parts = tuple(from_json(part, tensors) for part in value)
    skipped = 1 if kind == "joined" else 0
    shapes = {shape_of(part)[skipped:] for part in parts}
    if len(shapes) != 1 or any(len(shape_of(part)) < skipped for part in parts):
        raise ValueError(f"parts of the shapes {sorted(shapes)} for one tensor")
    return Sum(parts) if kind == "sum" else Joined(parts)
