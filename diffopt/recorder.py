"""Record what depends on a program's inputs, operator by operator.

`Recorder` sees aten operators, `Functions` what never reaches the dispatcher (numpy, dynamic numbers).
Operators on values that depend on no input run for real; their results are constants when used.
"""

import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffopt import graph as g
from diffopt import tree
from diffopt.errors import CaptureError
from diffopt.modes import Location, location, plain

aten = torch.ops.aten

# Kept small: a constant that is changed in place after use must have been copied.
_COPY_BELOW = 1 << 20

_SAME = (aten.detach.default, aten.alias.default, aten.lift_fresh.default, aten.lift.default)


@dataclasses.dataclass
class _Master:
    """The current value of a storage that was written in place."""

    node: fx.Node
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    version: int
    keep: Tensor


class Sources(Protocol):
    """Where a program's inputs come from; see `diffopt.recipes`."""

    def draw(self, recorder: "Recorder", func: Any, args: Any, kwargs: Any, tracked: list[Tensor]) -> Any:
        """Run a random operator and make its result an input."""

    def given(self, recorder: "Recorder", tensor: Tensor, place: tuple[str | int, ...]) -> None:
        """Make a tensor of the caller's an input."""

    def place_of_list(self, value: Any) -> tuple[str | int, ...] | None:
        """Return the place of a list among the caller's arguments."""


class Recorder(TorchDispatchMode):
    """Record operators on values that depend on a program's inputs."""

    def __init__(self, weights: Mapping[int, tuple[str, Tensor]], sources: Sources) -> None:
        super().__init__()
        self.root = g.new_body("program")
        self.weights = weights
        self.nodes: dict[int, tuple[fx.Node, int]] = {}
        self.masters: dict[int, _Master] = {}
        self.owners: dict[int, Tensor] = {}
        self.keep: list[Tensor] = []
        self.constants: dict[Any, str] = {}
        self.escapes: list[tuple[np.ndarray, fx.Node, Location]] = []
        self.names: dict[str, int] = {}
        self.reads: list[tuple[fx.Node, Any, Location]] = []
        self.known: set[fx.Node] = set()
        self.sources = sources

    # Values

    def node_of(self, tensor: Tensor) -> fx.Node | None:
        """Return the node whose value a tensor holds now; None if it does not depend on an input."""
        entry = self.nodes.get(id(tensor))
        master = self.masters.get(_storage(tensor))
        if master is None:
            return entry[0] if entry else None
        if entry and entry[1] == master.version:
            return entry[0]
        node = self._view(master, tensor)
        self.nodes[id(tensor)] = (node, master.version)
        self.keep.append(tensor)
        return node

    def value(self, tensor: Tensor) -> fx.Node:
        """Return the node of a tensor, a constant where it depends on no input."""
        node = self.node_of(tensor)
        return node if node is not None else self._constant(tensor)

    def bind(self, tensor: Tensor, node: fx.Node) -> None:
        """Say that a tensor holds the value of a node."""
        master = self.masters.get(_storage(tensor))
        self.nodes[id(tensor)] = (node, master.version if master else 0)
        self.keep.append(tensor)
        if _covers(tensor):
            self.owners.setdefault(_storage(tensor), tensor)

    def input(self, name: str, tensor: Tensor) -> fx.Node:
        """Add a program input that the tensor holds."""
        graph = self.root.graph
        count = self.names[name] = self.names.get(name, 0) + 1
        with graph.inserting_after(graph._root):
            node = graph.placeholder(name if count == 1 else f"{name}_{count}")
        node.meta["val"] = g.fake(tensor)
        self.bind(tensor, node)
        return node

    def _constant(self, tensor: Tensor) -> fx.Node:
        weight = self.weights.get(id(tensor))
        if weight is not None:
            name, value = weight
        else:
            name, value = "constant", tensor.detach()
            if tensor.numel() * tensor.element_size() <= _COPY_BELOW:
                content = value.reshape(-1).clone().view(torch.uint8).numpy().tobytes()
                key = (tensor.dtype, tensor.shape, tensor.stride(), content)
                if key in self.constants:
                    return self._get(self.constants[key])
                value = value.clone(memory_format=torch.preserve_format)
                name = g.add_attribute(self.root, name, value)
                self.constants[key] = name
                return self._get(name)
        return self._get(g.add_attribute(self.root, name, value))

    def _get(self, name: str) -> fx.Node:
        node = self.root.graph.get_attr(name)
        node.meta["val"] = g.fake(g.attribute(self.root, name))
        return node

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Add an operator node with its value's type and the pipeline's source line."""
        node = g.call(self.root.graph, target, *args, **kwargs)
        node.meta["where"] = str(location())
        return node

    # Writes in place

    def _view(self, master: _Master, tensor: Tensor) -> fx.Node:
        """Return the value of a tensor that shares a written storage."""
        layout = (tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset())
        if layout == (master.size, master.stride, master.offset):
            return master.node
        sliced = _slice_of(master, *layout)
        if sliced is not None:
            return self.emit(aten.slice.Tensor, master.node, *sliced)
        base = self.emit(aten.clone.default, master.node, memory_format=torch.contiguous_format)
        return self.emit(aten.as_strided.default, base, *layout)

    def _master(self, tensor: Tensor) -> _Master:
        """Return the value of a tensor's whole storage, before a write into it."""
        key = _storage(tensor)
        if key in self.masters:
            return self.masters[key]
        owner = tensor if _covers(tensor) else self.owners.get(key)
        if owner is None:
            owner = tensor._base if tensor._base is not None and _covers(tensor._base) else None
        if owner is None:
            owner = torch.empty(0, dtype=tensor.dtype)
            owner.set_(tensor.untyped_storage(), 0, (tensor.untyped_storage().nbytes() // tensor.element_size(),))
        node = self.value(owner)
        layout = (tuple(owner.shape), tuple(owner.stride()), owner.storage_offset())
        return _Master(node, *layout, version=0, keep=owner)

    def write(self, tensor: Tensor, node: fx.Node, before: _Master | None = None) -> None:
        """Say that the storage of a tensor now holds the value of a node in the tensor's place."""
        before = before or self._master(tensor)
        layout = (tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset())
        if layout == (before.size, before.stride, before.offset):
            merged = node
        elif _covers(tensor):
            merged, before = node, _Master(node, *layout, version=before.version, keep=tensor)
        else:
            sliced = _slice_of(before, *layout)
            if sliced is not None:
                merged = self.emit(aten.slice_scatter.default, before.node, node, *sliced)
            else:
                base = self.emit(aten.clone.default, before.node, memory_format=torch.contiguous_format)
                merged = self.emit(aten.as_strided_scatter.default, base, node, *layout)
        version = before.version + 1
        self.masters[_storage(tensor)] = dataclasses.replace(before, node=merged, version=version)
        self.nodes[id(tensor)] = (node, version)
        self.keep.append(tensor)

    def _mutate(self, func: Any, args: Any, kwargs: Any) -> Any:
        written = [
            (args[i] if i < len(args) else kwargs.get(a.name))
            for i, a in enumerate(func._schema.arguments)
            if a.alias_info is not None and a.alias_info.is_write
        ]
        written = [t for t in written if isinstance(t, Tensor)]
        before = [self._master(t) for t in written]
        nodes = self._functional(func, args, kwargs, written)
        out = func(*args, **kwargs)
        for tensor, node, master in zip(written, nodes, before, strict=True):
            self.write(tensor, node, master)
        return out

    def _functional(self, func: Any, args: Any, kwargs: Any, written: list[Tensor]) -> list[fx.Node]:
        """Record the functional twin of an operator that writes; return the written values."""
        margs, mkwargs = self._map((args, kwargs))
        if func is aten.copy_.default:
            return [self._copied(args[0], margs[1])]
        packet, overload = func._schema.name.split("::")[1], func._overloadname
        mkwargs = {k: v for k, v in mkwargs.items() if k not in ("out", "out0", "out1")}
        if overload.endswith("out"):
            overload = overload.removesuffix("out").removesuffix("_") or "default"
        twin = getattr(getattr(aten, packet.removesuffix("_")), overload, None)
        if twin is None:
            fail(f"{func} writes in place and has no functional twin", "use the operator without the underscore")
        node = self.emit(twin, *margs, **mkwargs)
        if len(written) > 1:
            return [self.emit(operator.getitem, node, i) for i in range(len(written))]
        if node.meta["val"].dtype != written[0].dtype:
            node = self.emit(aten._to_copy.default, node, dtype=written[0].dtype)
        return [node]

    def _copied(self, target: Tensor, source: fx.Node) -> fx.Node:
        value = source.meta["val"]
        if value.dtype != target.dtype:
            source = self.emit(aten._to_copy.default, source, dtype=target.dtype)
        if value.shape != target.shape:
            source = self.emit(aten.expand.default, source, list(target.shape))
        return source

    # Operators

    def _map(self, args: Any) -> Any:
        if isinstance(args, Tensor):
            return self.value(args)
        if isinstance(args, (list, tuple)):
            return type(args)(self._map(a) for a in args)
        if isinstance(args, dict):
            return {k: self._map(v) for k, v in args.items()}
        return args

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record an operator, or run it where no argument depends on an input."""
        kwargs = kwargs or {}
        tensors = tree.flatten((args, kwargs))[0]
        tracked = [t for t in tensors if self.node_of(t) is not None]
        if _is_random(func):
            return self.sources.draw(self, func, args, kwargs, tracked)
        if not tracked:
            return func(*args, **kwargs)
        if func in _SAME:
            out = func(*args, **kwargs)
            self.bind(out, self.value(args[0]))
            return out
        if func is aten._local_scalar_dense.default or torch.Tag.data_dependent_output in func.tags:
            return self._read(func, args, kwargs, tracked)
        if torch.Tag.dynamic_output_shape in func.tags and not self._is_fixed_index(func, args):
            fail(
                f"{func._schema.name.split('::')[1]}: the shape of its result depends on a traced value",
                "use a form with a fixed shape (torch.where, a mask multiply)",
            )
        if func._schema.is_mutable:
            return self._mutate(func, args, kwargs)
        nodes = self._map((args, kwargs))
        out = func(*args, **kwargs)
        node = self.root.graph.call_function(func, *nodes)
        node.meta |= {"val": g.fake(out), "where": str(location())}
        if all(n in self.known for n in node.all_input_nodes if n.op != "get_attr"):
            self.known.add(node)
        self._bind_all(out, node)
        return out

    def _is_fixed_index(self, func: Any, args: Any) -> bool:
        """Tell whether an indexing operator's result has a shape that depends on no traced value."""
        if func is not aten.index.Tensor:
            return False
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        return all(self.node_of(mask) is None for mask in masks)

    def _bind_all(self, out: Any, node: fx.Node) -> None:
        if isinstance(out, Tensor):
            self.bind(out, node)
        elif isinstance(out, (list, tuple)):
            for i, item in enumerate(out):
                if isinstance(item, Tensor):
                    part = self.root.graph.call_function(operator.getitem, (node, i))
                    part.meta |= {"val": g.fake(item), "where": node.meta["where"]}
                    if node in self.known:
                        self.known.add(part)
                    self.bind(item, part)

    def _read(self, func: Any, args: Any, kwargs: Any, tracked: list[Tensor]) -> Any:
        """Read a traced value into Python: an error, but for what the host knows beforehand."""
        if all(self.node_of(t) in self.known for t in tracked):
            out = func(*args, **kwargs)
            self.reads.append((self._read_node(func, args, kwargs, out), out, location()))
            return out
        fail(
            "Python reads a traced value here (.item(), int(), a comparison or `if` on a tensor)",
            "keep it a tensor (torch.where in place of `if`), or compute it from the arguments alone",
        )

    def _read_node(self, func: Any, args: Any, kwargs: Any, out: Any) -> fx.Node:
        """Return the node of the tensor that was read, a comparison's operator node where it is one."""
        if func is aten._local_scalar_dense.default:
            return self.value(args[0])
        margs, mkwargs = self._map((args, kwargs))
        node = self.root.graph.call_function(func, margs, mkwargs)
        node.meta["val"] = g.fake(torch.tensor(out))
        return node

    def escape(self, tensor: Tensor, array: np.ndarray) -> None:
        """Note that a traced value left torch as a numpy array."""
        self.escapes.append((array, self.value(tensor), location()))


def _is_random(func: Any) -> bool:
    """Tell whether an operator draws random numbers; attention and dropout are tagged so as well."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    return func._schema.name.startswith("aten::rand") or any(a.name == "generator" for a in func._schema.arguments)


def fail(what: str, advice: str) -> NoReturn:
    raise CaptureError(f"{location()}: {what}; {advice}")


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _covers(tensor: Tensor) -> bool:
    """Tell whether a tensor is all of its storage, each element once."""
    if tensor.storage_offset() or tensor.numel() * tensor.element_size() != tensor.untyped_storage().nbytes():
        return False
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _slice_of(
    base: _Master, size: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> tuple[int, int, int, int] | None:
    """Return (dim, start, end, step) where a layout is a slice of the base in one dimension."""
    if len(size) != len(base.size):
        return None
    differing = [d for d in range(len(size)) if (size[d], stride[d]) != (base.size[d], base.stride[d])]
    if len(differing) != 1 or offset < base.offset:
        return None
    (dim,) = differing
    unit = base.stride[dim]
    if unit == 0 or stride[dim] % unit or (offset - base.offset) % unit:
        return None
    start, step = (offset - base.offset) // unit, stride[dim] // unit
    end = start + (size[dim] - 1) * step + 1
    return (dim, start, end, step) if step > 0 and end <= base.size[dim] else None


class Scalar(float):
    """A number that stays an input: arithmetic on it is recorded, comparisons become guards."""

    recorder: Recorder
    node: fx.Node
    place: tuple[str | int, ...]
    guards: list[tuple[str, float, bool, str]] | None
    tensor: Tensor

    @staticmethod
    def make(recorder: Recorder, tensor: Tensor, source: "list[tuple[str, float, bool, str]] | None") -> "Scalar":
        """Return the number that a traced 0-d float64 tensor holds."""
        with plain():
            scalar = Scalar(tensor.item())
        scalar.recorder, scalar.tensor, scalar.guards = recorder, tensor, source
        return scalar

    def _fix(self, use: str) -> float:
        """Bind the value: what is done with it can't be recorded."""
        return self._guard("==", float.__float__(self), True)

    def _guard(self, symbol: str, other: float, result: bool) -> Any:
        if self.guards is None:
            fail(
                "Python compares or converts a number computed from a dynamic argument",
                "compare the argument itself, or do not name it in dynamic=",
            )
        guard = (symbol, float(other), result, str(location()))
        if guard[:3] not in [known[:3] for known in self.guards]:
            self.guards.append(guard)
        return result if symbol != "==" else float.__add__(self, 0.0)

    def _arith(self, func: Callable[..., Any], *args: Any) -> Any:
        if any(isinstance(a, Tensor) for a in args):
            return NotImplemented
        values = [a.tensor if isinstance(a, Scalar) else torch.tensor(float(a), dtype=torch.float64) for a in args]
        return Scalar.make(self.recorder, func(*values), None)

    def __add__(self, other: Any) -> Any: return self._arith(torch.add, self, other)  # noqa: D105, E704
    def __radd__(self, other: Any) -> Any: return self._arith(torch.add, other, self)  # noqa: D105, E704
    def __sub__(self, other: Any) -> Any: return self._arith(torch.sub, self, other)  # noqa: D105, E704
    def __rsub__(self, other: Any) -> Any: return self._arith(torch.sub, other, self)  # noqa: D105, E704
    def __mul__(self, other: Any) -> Any: return self._arith(torch.mul, self, other)  # noqa: D105, E704
    def __rmul__(self, other: Any) -> Any: return self._arith(torch.mul, other, self)  # noqa: D105, E704
    def __truediv__(self, other: Any) -> Any: return self._arith(torch.div, self, other)  # noqa: D105, E704
    def __rtruediv__(self, other: Any) -> Any: return self._arith(torch.div, other, self)  # noqa: D105, E704
    def __neg__(self) -> Any: return self._arith(torch.neg, self)  # noqa: D105, E704

    def _compare(self, symbol: str, other: Any, result: bool) -> Any:
        if not isinstance(other, (int, float)) or isinstance(other, Scalar):
            return NotImplemented
        self._guard(symbol, float(other), result)
        return result

    def __gt__(self, o: Any) -> Any: return self._compare(">", o, float.__gt__(self, o))  # noqa: D105, E704
    def __ge__(self, o: Any) -> Any: return self._compare(">=", o, float.__ge__(self, o))  # noqa: D105, E704
    def __lt__(self, o: Any) -> Any: return self._compare("<", o, float.__lt__(self, o))  # noqa: D105, E704
    def __le__(self, o: Any) -> Any: return self._compare("<=", o, float.__le__(self, o))  # noqa: D105, E704
    def __eq__(self, o: Any) -> Any: return self._compare("==", o, float.__eq__(self, o))  # noqa: D105, E704
    def __ne__(self, o: Any) -> Any: return self._compare("!=", o, float.__ne__(self, o))  # noqa: D105, E704
    def __bool__(self) -> bool: return bool(self._compare("!=", 0.0, float.__ne__(self, 0.0)))  # noqa: D105, E704
    def __float__(self) -> float: return self._fix("float()")  # noqa: D105, E704
    def __int__(self) -> int: return int(self._fix("int()"))  # noqa: D105, E704
    def __round__(self, n: Any = None) -> Any: return round(self._fix("round()"), n)  # noqa: D105, E704
    __hash__ = float.__hash__


_READS = {"numpy", "__array__", "tolist"}


class Functions(TorchFunctionMode):
    """See what the dispatcher does not: numpy conversions, dynamic numbers, tensors of arguments."""

    def __init__(self, recorder: Recorder, sources: Sources) -> None:
        super().__init__()
        self.recorder, self.sources = recorder, sources

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Intercept one torch function."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _READS and args and isinstance(args[0], Tensor):
            return self._leave(name, func, args, kwargs)
        if name in ("tensor", "as_tensor") and args:
            place = self.sources.place_of_list(args[0])
            if place is not None:
                out = func(*args, **kwargs)
                self.sources.given(self.recorder, out, place)
                return out
        if any(isinstance(a, Scalar) for a in _flat((args, kwargs))):
            return self._with_scalars(name, func, args, kwargs)
        return func(*args, **kwargs)

    def _leave(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        node = self.recorder.node_of(args[0])
        if node is None or node in self.recorder.known:
            return func(*args, **kwargs)
        if name == "tolist":
            fail("a traced value becomes a Python list here", "keep it a tensor")
        array = np.array(func(*args, **kwargs))
        self.recorder.escape(args[0], array)
        return array

    def _with_scalars(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        if name in ("tensor", "as_tensor", "full", "full_like"):
            value = args[0] if "tensor" in name else args[1]
            scalar = value[0] if isinstance(value, list) and len(value) == 1 else value
            if isinstance(scalar, Scalar):
                dtype = kwargs.get("dtype") or torch.get_default_dtype()
                shape = {"full": lambda: list(args[0]), "full_like": lambda: list(args[0].shape)}.get(
                    name, lambda: [1] if isinstance(value, list) else []
                )()
                return scalar.tensor.to(dtype).expand(shape).clone()
        args, kwargs = _swap((args, kwargs))
        return func(*args, **kwargs)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    elif isinstance(value, dict):
        yield from _flat(list(value.values()))
    else:
        yield value


def _swap(value: Any) -> Any:
    if isinstance(value, Scalar):
        return value.tensor
    if isinstance(value, (list, tuple)):
        return type(value)(_swap(item) for item in value)
    if isinstance(value, dict):
        return {k: _swap(v) for k, v in value.items()}
    return value
