"""Records operators on values that depend on a program's inputs.

Operators on other values run eagerly, and their results become constants when used. Writes in place
are functionalized: a written storage has one current value, of which every tensor on it is a view.
"""

import dataclasses
import operator
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from diffopt.capture import value_tree
from diffopt.capture.dispatch_modes import Location, functional_variant, is_random, location
from diffopt.capture.real_reads import Answers, Key, NeedsRun, ReadCounter, is_read
from diffopt.capture.storage_views import StorageValue, covers, layout_of, slice_of, storage_of
from diffopt.capture.weight_values import WeightValues, named_weights
from diffopt.errors import CaptureError
from diffopt.ir import graph as g

aten = torch.ops.aten

# A constant up to this size is copied; a larger one when it is written after its use.
_MAX_COPY = 1 << 20

_IDENTITIES = (aten.detach.default, aten.alias.default, aten.lift_fresh.default, aten.lift.default)


_EMPTY = frozenset(
    f"aten::{name}"
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
)
"""Operators that return memory as it was left."""

_INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


class InputSource(Protocol):
    """The origin of a program's inputs; see `input_recipes.RunInputs`."""

    def draw(
        self, recorder: "Recorder", func: Any, args: Any, kwargs: Any, tracked: list[Tensor]
    ) -> Any:
        """Run a random operator and make its result an input."""

    def add_input(self, recorder: "Recorder", tensor: Tensor, place: tuple[str | int, ...]) -> None:
        """Make the argument at a place an input."""

    def in_host(self) -> bool:
        """Tell whether a tokenizer or image processor runs, which is called and not recorded."""

    def place_of_list(self, value: Any) -> tuple[str | int, ...] | None:
        """Return the place of a list among the caller's arguments."""

    def are_tokens(self, value: Any) -> bool:
        """Tell whether a list depends on the tokens that host components returned."""

    def add_tokens(self, recorder: "Recorder", tensor: Tensor) -> None:
        """Make a tensor of the list that `are_tokens` has seen last an input."""

    def output(self, array: np.ndarray, number: int) -> np.ndarray:
        """Return the values of a traced tensor as an array whose operations are recorded."""


class Recorder(TorchDispatchMode):
    """Record operators on values that depend on a program's inputs."""

    supports_higher_order_operators = True

    def __init__(
        self, weights: WeightValues, sources: InputSource, answers: Answers | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.root = g.new_body("program")
        self.weights = weights
        self._weight_names = {
            id(t): name for name, t in reversed(list(named_weights(weights.modules)))
        }
        self.nodes: dict[int, tuple[fx.Node, int]] = {}
        self.storages: dict[int, StorageValue] = {}
        self.owners: dict[int, Tensor] = {}
        self.keep: list[Tensor] = []
        self._weight_storages = {
            storage_of(t): name
            for name, t in named_weights(weights.modules)
            if type(t) in (Tensor, torch.nn.Parameter) and not t.is_meta
        }
        self.used_weights: set[str] = set()
        """Names of the weights of which the pipeline has computed constants."""
        self.constants: dict[Any, str] = {}
        self._lent: dict[int, dict[Any, str]] = {}
        self.escapes: list[tuple[np.ndarray, fx.Node, Location]] = []
        self.names: dict[str, int] = {}
        self.reads: list[tuple[fx.Node, Any, Location]] = []
        self.answers = answers
        self.checks: list[tuple[fx.Node, Any, Location]] = []
        self._counter = ReadCounter()
        self._shared: set[int] = set()
        self.host_values: set[fx.Node] = set()
        self.sources = sources

    # Values

    def node_of(self, tensor: Tensor) -> fx.Node | None:
        """Return the node of a tensor's current value; None if it depends on no input."""
        entry = self.nodes.get(id(tensor))
        storage = self.storages.get(storage_of(tensor))
        if storage is None:
            return entry[0] if entry else None
        if entry and entry[1] == storage.version:
            return entry[0]
        node = self._view(storage, tensor)
        self.nodes[id(tensor)] = (node, storage.version)
        self.keep.append(tensor)
        return node

    def value(self, tensor: Tensor) -> fx.Node:
        """Return the node of a tensor's current value, a constant if it depends on no input."""
        node = self.node_of(tensor)
        return node if node is not None else self.constant(tensor)

    def is_written(self, tensor: Tensor) -> bool:
        """Tell whether the memory of a tensor has been written."""
        return storage_of(tensor) in self.storages

    def bind(self, tensor: Tensor, node: fx.Node) -> None:
        """Record that a tensor has the value of a node."""
        storage = self.storages.get(storage_of(tensor))
        self.nodes[id(tensor)] = (node, storage.version if storage else 0)
        self.keep.append(tensor)
        if covers(tensor):
            self.owners.setdefault(storage_of(tensor), tensor)

    def input(self, name: str, tensor: Tensor) -> fx.Node:
        """Add a program input whose value the tensor has."""
        graph, name = self.root.graph, g.identifier(name)
        count = self.names[name] = self.names.get(name, 0) + 1
        with graph.inserting_after(graph._root):
            node = graph.placeholder(name if count == 1 else f"{name}_{count}")
        node.meta["val"] = g.fake(tensor)
        self.bind(tensor, node)
        return node

    def constant(self, tensor: Tensor) -> fx.Node:
        """Return the node of a tensor's value now, which no call changes."""
        if id(tensor) in self._weight_names:
            value = self.weights.value(tensor)
            return self._get(g.add_attribute(self.root, self._weight_names[id(tensor)], value))
        value = tensor.detach()
        self._use([value])
        if tensor.numel() * tensor.element_size() > _MAX_COPY:
            lent = self._lent.setdefault(storage_of(value), {})
            key = layout_of(value), value.dtype
            if key not in lent:
                lent[key] = g.register(self.root, "constant", value)
            return self._get(lent[key])
        flat = torch.empty(value.numel(), dtype=value.dtype).copy_(value.reshape(-1))
        content = flat.view(torch.uint8).numpy().tobytes()
        known = (tensor.dtype, tensor.shape, tensor.stride(), content)
        if known not in self.constants:
            value = value.clone(memory_format=torch.preserve_format)
            # Else a free name would be sought among all that are taken.
            name = f"constant_{len(self.constants)}" if self.constants else "constant"
            self.constants[known] = g.register(self.root, name, value)
        return self._get(self.constants[known])

    def _use(self, tensors: list[Tensor]) -> None:
        """Note that values of these tensors, maybe weights or views of them, become constants."""
        names = {self._weight_storages.get(storage_of(tensor)) for tensor in tensors}
        self.used_weights.update(name for name in names if name is not None)

    def _before_write(self, tensor: Tensor) -> None:
        """Keep what weights and constants in the memory of a tensor hold, before it is written."""
        if storage_of(tensor) in self._shared:
            fail(
                "a tensor is written here whose memory a numpy array shares",
                "write before it becomes an array, or a clone",
            )
        if self.weights.is_written(tensor):
            self.weights.before_write(tensor)
        for name in self._lent.pop(storage_of(tensor), {}).values():
            value = g.attribute(self.root, name)
            setattr(self.root, name, value.clone(memory_format=torch.preserve_format))

    def _get(self, name: str) -> fx.Node:
        node = self.root.graph.get_attr(name)
        node.meta["val"] = g.fake(g.attribute(self.root, name))
        return node

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Add an operator node, with its fake value and the source line of the pipeline."""
        node = g.call(self.root.graph, target, *args, **kwargs)
        node.meta["where"] = str(location())
        return node

    # Writes in place

    def _view(self, storage: StorageValue, tensor: Tensor) -> fx.Node:
        """Return the current value of a tensor on a written storage."""
        layout = layout_of(tensor)
        if layout == (storage.size, storage.stride, storage.offset):
            return storage.node
        sliced = slice_of(storage, *layout)
        if sliced is not None:
            return self.emit(aten.slice.Tensor, storage.node, *sliced)
        base = self.emit(aten.clone.default, storage.node, memory_format=torch.contiguous_format)
        return self.emit(aten.as_strided.default, base, *layout)

    def _storage(self, tensor: Tensor) -> StorageValue:
        """Return the value of a tensor's storage before a write into it."""
        key = storage_of(tensor)
        if key in self.storages:
            return self.storages[key]
        owner = tensor if covers(tensor) else self.owners.get(key)
        if owner is None:
            owner = tensor._base if tensor._base is not None and covers(tensor._base) else None
        if owner is None:
            owner = torch.empty(0, dtype=tensor.dtype)
            count = tensor.untyped_storage().nbytes() // tensor.element_size()
            owner.set_(tensor.untyped_storage(), 0, (count,), (1,))
        node = self.value(owner)
        layout = layout_of(owner)
        return StorageValue(node, *layout, version=0, keep=owner)

    def write(self, tensor: Tensor, node: fx.Node, before: StorageValue | None = None) -> None:
        """Record that the elements of a tensor in its storage have the value of a node."""
        before = before or self._storage(tensor)
        layout = layout_of(tensor)
        if layout == (before.size, before.stride, before.offset):
            merged = node
        elif covers(tensor):
            merged, before = node, StorageValue(node, *layout, version=before.version, keep=tensor)
        else:
            sliced = slice_of(before, *layout)
            if sliced is not None:
                merged = self.emit(aten.slice_scatter.default, before.node, node, *sliced)
            else:
                base = self.emit(
                    aten.clone.default, before.node, memory_format=torch.contiguous_format
                )
                merged = self.emit(aten.as_strided_scatter.default, base, node, *layout)
        version = before.version + 1
        self.storages[storage_of(tensor)] = dataclasses.replace(
            before, node=merged, version=version
        )
        self.nodes[id(tensor)] = (node, version)
        self.keep.append(tensor)

    def _mutate(self, func: Any, args: Any, kwargs: Any) -> Any:
        written = _written(func, args, kwargs)
        before = [self._storage(t) for t in written]
        nodes = self._functional(func, args, kwargs, written)
        out = func(*args, **kwargs)
        for tensor, node, storage in zip(written, nodes, before, strict=True):
            self.write(tensor, node, storage)
        return out

    def _functional(
        self, func: Any, args: Any, kwargs: Any, written: list[Tensor]
    ) -> list[fx.Node]:
        """Record the functional variant of an operator that writes; return the written values."""
        margs, mkwargs = self._map((args, kwargs))
        if func is aten.copy_.default:
            return [self._copied(args[0], margs[1])]
        mkwargs = {k: v for k, v in mkwargs.items() if not k.startswith("out")}
        variant = functional_variant(func)
        if variant is None:
            fail(
                f"{func} writes in place and has no functional twin",
                "use the operator without the underscore",
            )
        node = self.emit(variant, *margs, **mkwargs)
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
        """Record an operator, or only run it if no argument depends on an input."""
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.HigherOrderOperator):
            fail(
                f"{func} takes functions, which no graph holds",
                "use an operator of tensors (scaled_dot_product_attention)",
            )
        tensors = value_tree.flatten((args, kwargs))[0]
        tracked = [t for t in tensors if self.node_of(t) is not None]
        if func._schema.is_mutable:
            for tensor in _written(func, args, kwargs):
                self._before_write(tensor)
        if is_random(func):
            return self.sources.draw(self, func, args, kwargs, tracked)
        if func._schema.name in _EMPTY:
            # What is in it is nobody's, but is to be the same in each run.
            return func(*args, **kwargs).zero_()
        key = self._counter.next(location()) if is_read(func) else None
        if not tracked:
            if not _is_copy(func):
                self._use(tensors)
            return func(*args, **kwargs)
        if key is not None:
            return self._read(func, args, kwargs, tracked, key)
        if func in _INDEXED:
            args = (args[0], self._positions(args[1]), *args[2:])
        if func in _IDENTITIES:
            out = func(*args, **kwargs)
            self.bind(out, self.value(args[0]))
            return out
        if torch.Tag.dynamic_output_shape in func.tags and not self._is_fixed_index(func, args):
            return self._select(func, args, kwargs, tracked)
        if func._schema.is_mutable:
            return self._mutate(func, args, kwargs)
        if func is aten.as_strided.default:  # which counts from the beginning of the memory
            out = func(*args, **kwargs)
            self.bind(out, self._view(self._storage(args[0]), out))
            return out
        nodes = self._map((args, kwargs))
        out = func(*args, **kwargs)
        node = self.root.graph.call_function(func, *nodes)
        node.meta |= {"val": g.fake(out), "where": str(location())}
        if all(n in self.host_values for n in node.all_input_nodes if n.op != "get_attr"):
            self.host_values.add(node)
        self._bind_all(out, node)
        return out

    def _select(self, func: Any, args: Any, kwargs: Any, tracked: list[Tensor]) -> Any:
        """Record an operator whose result's shape depends on values, which the host must have.

        Then the number of selected elements is known; a guard binds the shape.
        """
        if func is aten.index.Tensor:
            with self:
                return self._mask_index(*args)
        if func is aten.nonzero.default:
            with self:
                return torch.stack(self._selected(args[0]), 1)
        if func is aten.masked_select.default:
            with self:
                values, mask = torch.broadcast_tensors(*args)  # type: ignore[no-untyped-call]
                return self._mask_index(values, [mask])
        if all(self.node_of(t) in self.host_values for t in tracked):
            for tensor in tracked:  # a result that guards make a constant
                self.reads.append((self.value(tensor), tensor.tolist(), location()))
            return func(*args, **kwargs)
        fail(
            f"{func._schema.name.split('::')[1]}: its result's shape depends on a traced value",
            "use a form with a fixed shape (torch.where, a mask multiply)",
        )

    def _selected(self, mask: Tensor) -> list[Tensor]:
        """Return the coordinates of elements that a mask selects; a guard binds their number."""
        if self.node_of(mask) is not None and self.node_of(mask) not in self.host_values:
            fail(
                "what a mask selects has a shape that depends on a traced value",
                "use a form with a fixed shape (torch.where, a mask multiply)",
            )
        flat = mask.reshape(-1) != 0
        count = int(flat.sum())
        index = torch.sort(flat.to(torch.uint8), descending=True, stable=True)[1][:count]
        coordinates = []
        for size in reversed(mask.shape):
            coordinates.append(index % size)
            index = torch.div(index, size, rounding_mode="floor")
        return coordinates[::-1]

    def _mask_index(self, values: Tensor, indices: Any) -> Tensor:
        places: list[Tensor | None] = []
        for index in indices:
            is_mask = index is not None and index.dtype in (torch.bool, torch.uint8)
            places.extend(self._selected(index) if is_mask else [index])
        return aten.index.Tensor(values, places)  # type: ignore[no-any-return]

    def _positions(self, indices: Any) -> list[Tensor | None]:
        """Return indices with the positions that constant masks select in place of the masks.

        They are one operator with a fixed shape; what a mask selects is known to no fake tensor.
        """
        result: list[Tensor | None] = []
        for index in indices:
            is_mask = index is not None and index.dtype in (torch.bool, torch.uint8)
            if is_mask and self.node_of(index) is None:
                result.extend(index.nonzero(as_tuple=True))
            else:
                result.append(index)
        return result

    def _is_fixed_index(self, func: Any, args: Any) -> bool:
        """Tell whether the shape of an indexing operator's result depends on no input."""
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
                    if node in self.host_values:
                        self.host_values.add(part)
                    self.bind(item, part)

    def _read(self, func: Any, args: Any, kwargs: Any, tracked: list[Tensor], key: Key) -> Any:
        """Return a value that Python reads: of the host guarded, of a model the real one, checked.

        Raises:
            CaptureError: It is a number that any other run would change.
        """
        out = func(*args, **kwargs)
        if func is aten.equal.default and args[0].shape != args[1].shape:
            return out  # whatever their values
        if all(self.node_of(t) in self.host_values for t in tracked):
            if not self.sources.in_host():
                self.reads.append((self._read_node(func, args, kwargs, out), out, location()))
            return out
        if isinstance(out, (bool, int)) and self._has_answer(key):
            assert self.answers is not None
            return self._checked(self._read_node(func, args, kwargs, self.answers[key]), key)
        fail(
            "Python reads a traced value here (.item(), int(), a comparison or `if` on a tensor)",
            "keep it a tensor (torch.where in place of `if`), or compute it from the arguments",
        )

    def read_list(self, tensor: Tensor) -> Any:
        """Return the real values of a traced tensor, which Python reads as a list."""
        key = self._counter.next(location())
        if tensor.is_floating_point() or tensor.is_complex() or not self._has_answer(key):
            fail("a traced value becomes a Python list here", "keep it a tensor")
        return self._checked(self.value(tensor), key)

    def skip_list(self) -> None:
        """Count a list that is made of values which are no model's."""
        self._counter.next(location())

    def _has_answer(self, key: Key) -> bool:
        if self.answers is None:
            error = NeedsRun(f"{location()}: Python reads a traced value here")
            FAILURES.append(error)
            raise error
        return key in self.answers

    def _checked(self, node: fx.Node, key: Key) -> Any:
        assert self.answers is not None
        value = self.answers[key]
        if (node, value) not in [(known, other) for known, other, _ in self.checks]:
            self.checks.append((node, value, key[0]))
        return value

    def _read_node(self, func: Any, args: Any, kwargs: Any, out: Any) -> fx.Node:
        """Return the node of the value that was read: a tensor's, or a comparison's."""
        margs, mkwargs = self._map((args, kwargs))
        if func in (aten._local_scalar_dense.default, aten.is_nonzero.default):
            node = self.emit(aten.reshape.default, margs[0], []) if args[0].ndim else margs[0]
            is_flag = func is aten._local_scalar_dense.default or args[0].dtype == torch.bool
            return node if is_flag else self.emit(aten.ne.Scalar, node, 0)
        if func is aten.equal.default:
            return self.emit(aten.all.default, self.emit(aten.eq.Tensor, *margs))
        if func is aten.allclose.default:
            return self.emit(aten.all.default, self.emit(aten.isclose.default, *margs, **mkwargs))
        node = self.root.graph.call_function(func, margs, mkwargs)
        node.meta |= {"val": g.fake(torch.tensor(out)), "where": str(location())}
        return node

    def escape(self, tensor: Tensor, array: np.ndarray) -> np.ndarray:
        """Record that a traced value became a numpy array, and return that."""
        self._shared.add(storage_of(tensor))
        self.keep.append(tensor)
        self.escapes.append((array, self.value(tensor), location()))
        return self.sources.output(array, len(self.escapes) - 1)


def _is_copy(func: Any) -> bool:
    """Tell whether an operator computes nothing: a view, a copy, a comparison of two tensors."""
    is_view = any(result.alias_info for result in func._schema.returns)
    return is_view or func in (aten.clone.default, aten.equal.default)


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the arguments that an operator writes in place."""
    written = [
        (args[i] if i < len(args) else kwargs.get(a.name))
        for i, a in enumerate(func._schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    ]
    values = value_tree.flatten(written)[0]
    return [value for value in values if isinstance(value, Tensor)]


FAILURES: list[Exception] = []
"""Errors of the run, which a pipeline may catch itself."""


def fail(problem: str, advice: str) -> NoReturn:
    """Raise a `CaptureError` about the running line of the pipeline."""
    error = CaptureError(f"{location()}: {problem}; {advice}")
    FAILURES.append(error)
    raise error
