"""Add a leading dimension for requests to a program's values, whose size no graph fixes.

A value that depends on a request gets one more dimension in front. Reshapes say -1 for it, and
where an operator must know its size, that is read from a value (`aten.sym_size`), so one program
serves every size. Values that depend on no request, such as the rows of a timestep table, have no
such dimension.

Operators that have a batch dimension (convolution, attention, group norm) see both dimensions as
one; operators on the last dimensions and pointwise ones need nothing; the others are rewritten by
`torch.vmap`. What an operator does to an axis is not asked of `axis_rules`: vmap knows it, and
rewrites the call as well.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.errors import DiffoptError, first_line
from diffopt.ir import graph as g
from diffopt.ir.nodes import args
from diffopt.ir.op_sets import FOLDED_BATCH, RESHAPES, ROWWISE
from diffopt.ir.printing import target_name

aten = torch.ops.aten

SUFFIX = "_batch"
SCATTERS = (aten.slice_scatter.default, aten.select_scatter.default)
"""Write the second argument into a part of the first, which the third's dimension names."""
FILLED = (aten.copy.default, aten.fill.Tensor)
ATTENTION = aten.scaled_dot_product_attention.default
FLASH = aten._scaled_dot_product_flash_attention_for_cpu.default
"""What attention is recorded as outside of components; its second result serves training alone."""


class Unbatchable(DiffoptError):
    """An operator that cannot work on several requests at once."""


def batch_root(root: fx.GraphModule, size: int) -> None:
    """Add a leading dimension to every input, and to all that depends on one; in place.

    Args:
        root: The outer graph; components that it calls with such values are rewritten as well.
        size: What the recorded shapes say for that dimension.
    """
    callees = _Components(root, size)
    new = _rewrite(root, [True] * len(g.placeholders(root)), size, callees).graph
    root.graph = new.graph
    root._buffers.update(new._buffers)
    root._parameters.update(new._parameters)
    root._modules.update(callees.rewritten)
    for name in callees.rewritten:
        # The plain name, unless a call with none of the inputs still needs it.
        calls = [n for n in root.graph.nodes if n.op == "call_module"]
        plain = name.removesuffix(SUFFIX)
        if plain not in {n.target for n in calls}:
            root._modules[plain] = root._modules.pop(name)
            for call in calls:
                call.target = plain if call.target == name else call.target


@dataclass(frozen=True)
class Batched:
    """A graph whose values have one more dimension.

    Attributes:
        graph: The new one.
        results: Which of its results have the dimension.
        nodes: New nodes by old ones.
        batched: The old nodes whose new ones have the dimension.
    """

    graph: fx.GraphModule
    results: list[bool]
    nodes: Mapping[fx.Node, fx.Node]
    batched: Collection[fx.Node]


def batch_body(body: fx.GraphModule, batched: Sequence[bool], size: int) -> Batched:
    """Return a component with the dimension on some arguments."""
    return _rewrite(body, batched, size, None)


class _Components:
    """Components rewritten for the arguments that have a leading dimension."""

    def __init__(self, root: fx.GraphModule, size: int) -> None:
        self.root = root
        self.size = size
        self.rewritten: dict[str, fx.GraphModule] = {}
        self._known: dict[tuple[str, tuple[bool, ...]], tuple[str, list[bool]]] = {}

    def get(self, name: str, batched: tuple[bool, ...]) -> tuple[str, list[bool]]:
        """Return the component's new name, and which of its results have the dimension."""
        if (name, batched) not in self._known:
            body = g.attribute(self.root, name)
            try:
                new = batch_body(body, batched, self.size)
            except Unbatchable as error:
                raise Unbatchable(f"{name}: {error.message}") from error
            new_name = name + SUFFIX
            while new_name in self.rewritten or new_name in self.root._modules:
                new_name += SUFFIX
            self.rewritten[new_name] = new.graph
            self._known[name, batched] = new_name, new.results
        return self._known[name, batched]


def _rewrite(
    gm: fx.GraphModule, batched: Sequence[bool], size: int, callees: _Components | None
) -> Batched:
    """Return the graph with the dimension on some arguments.

    The results of the outer graph, which alone has `callees`, all have it.
    """
    new = g.new_body(type(gm).__name__)
    work = _Rewriter(new, size)
    flags = dict(zip(g.placeholders(gm), batched, strict=True))
    for node in gm.graph.nodes:
        if node.op == "output":
            break
        if flags.get(node, False):
            work.parameter(node)
        elif node.op == "call_module":
            assert callees is not None
            work.component(node, callees)
        elif node.target is operator.getitem and node.args[0] in work.results:
            work.item(node)
        elif not any(n in work.batched for n in node.all_input_nodes):
            g.copy_nodes([node], gm, new, work.env)
        else:
            work.operator(node)
    returned = g.outputs(gm)
    if callees is not None:
        for node in returned:
            work.spread(node)
    new.graph.output(tuple(work.env[n] for n in returned))
    g.set_outputs(new, [work.env[n] for n in returned])
    new.recompile()
    return Batched(new, [n in work.batched for n in returned], work.env, work.batched)


@dataclass(frozen=True)
class _Place:
    """Where an operator reads a value, by its position among all that it reads."""

    index: int


@dataclass(frozen=True)
class _Form:
    """All of a call of an operator that decides what `torch.vmap` makes of it.

    Attributes:
        target: The operator.
        text: Its arguments as text, in which 1, 1.0 and True are three; values are places.
        arguments: The same: (args, kwargs).
        values: The shape and the type of each value, and whether it has the dimension.
    """

    target: Callable[..., Any]
    text: str
    arguments: Any = field(compare=False)
    values: tuple[tuple[torch.Size, torch.dtype, bool], ...]

    @classmethod
    def of(cls, node: fx.Node, sources: Sequence[fx.Node], batched: Sequence[bool]) -> _Form:
        """Return the form of a node, which does not keep the node's graph alive."""
        places: dict[fx.Node, Any] = {source: _Place(i) for i, source in enumerate(sources)}
        arguments = fx.map_arg((node.args, node.kwargs), places.__getitem__)
        of_sources = zip((n.meta["val"] for n in sources), batched, strict=True)
        values = tuple((value.shape, value.dtype, many) for value, many in of_sources)
        assert callable(node.target)
        return cls(node.target, repr(arguments), arguments, values)


@functools.lru_cache(maxsize=1024)  # layers are alike, and tracing takes long
def _trace(form: _Form, size: int) -> fx.GraphModule:
    """Return what `torch.vmap` makes of an operator where the dimension has a size."""

    def call(*tensors: Tensor) -> Any:
        args, kwargs = fx.node.map_aggregate(
            form.arguments, lambda a: tensors[a.index] if isinstance(a, _Place) else a
        )
        return form.target(*args, **kwargs)

    examples = [
        torch.zeros([size, *shape] if many else shape, dtype=dtype)
        for shape, dtype, many in form.values
    ]
    dims = tuple(0 if many else None for *_, many in form.values)
    return g.trace_batched(call, dims, examples)


class _Rewriter:
    """Builds a graph node by node.

    Attributes:
        env: New nodes by old ones.
        batched: The old nodes whose new ones have the dimension.
        results: For component calls: which results have it.
        parts: For other calls with several results: these.
    """

    def __init__(self, new: fx.GraphModule, size: int) -> None:
        self.new = new
        self.size = size
        self.env: dict[fx.Node, fx.Node] = {}
        self.batched: set[fx.Node] = set()
        self.results: dict[fx.Node, list[bool]] = {}
        self.parts: dict[fx.Node, list[fx.Node]] = {}
        self._count: fx.Node | None = None

    def parameter(self, node: fx.Node) -> None:
        """Copy an argument, with the dimension."""
        copy = self.new.graph.node_copy(node)
        value = node.meta["val"]
        copy.meta["val"] = g.fake(torch.empty([self.size, *value.shape], dtype=value.dtype))
        self._set(node, copy)

    def component(self, node: fx.Node, callees: _Components) -> None:
        """Copy a component's call; the component is rewritten if an argument has the dimension."""
        flags = tuple(a in self.batched for a in node.args)
        if not any(flags):
            g.copy_nodes([node], callees.root, self.new, self.env)
            self.results[node] = [False] * len(node.meta["val"])
            return
        name, self.results[node] = callees.get(str(node.target), flags)
        copy = self.new.graph.node_copy(node, self.env.__getitem__)
        copy.target = name
        copy.meta["val"] = tuple(n.meta["val"] for n in g.outputs(callees.rewritten[name]))
        self.env[node] = copy

    def item(self, node: fx.Node) -> None:
        """Copy the selection of one result of a component."""
        source, index = node.args
        assert isinstance(source, fx.Node)
        assert isinstance(index, int)
        copy = self.new.graph.node_copy(node, self.env.__getitem__)
        copy.meta["val"] = self.env[source].meta["val"][index]
        self.env[node] = copy
        if self.results[source][index]:
            self.batched.add(node)

    def operator(self, node: fx.Node) -> None:
        """Rewrite an operator of which an argument has the dimension."""
        target, batched = node.target, [n for n in node.all_input_nodes if n in self.batched]
        result: fx.Node | list[fx.Node]
        first = node.args[0] if node.args else None
        if target is operator.getitem:
            result = self._part(node)
        elif target in RESHAPES and node.meta["val"].numel():
            result = self._reshaped(node, self.env[batched[0]], node.meta["val"].shape)
        elif target is aten.expand.default:
            result = self._expanded(node)
        elif (target in ROWWISE and batched == [first]) or self._is_row_lookup(node, batched):
            result = self._call(node, target, *self._mapped(node.args), **self._mapped(node.kwargs))
        elif (
            target in FOLDED_BATCH
            and batched == [first]
            and FOLDED_BATCH[target] in (None, _rank(batched[0]))
        ):
            result = self._folded(node)
        elif target in (ATTENTION, FLASH) and _rank(batched[0]) == 4:
            result = self._attention(node)
        elif target in FILLED:
            result = self._filled(node)
        elif target in SCATTERS:
            result = self._scattered(node)
        elif _fills_where(node):
            result = self._masked(node)
        elif target is aten.as_strided_scatter.default:
            result = self._strided(node)
        elif torch.Tag.pointwise in target.tags:  # type: ignore[union-attr]
            result = self._pointwise(node)
        else:
            result = self._vmapped(node)
        if isinstance(result, fx.Node):
            self._set(node, result)
        else:
            self.parts[node] = result
            self.batched.add(node)

    def spread(self, node: fx.Node) -> None:
        """Repeat a value that depends on no request, once for each."""
        if node in self.batched:
            return
        value = node.meta["val"]
        row = self._call(node, aten.unsqueeze.default, self.env[node], 0)
        sizes = [self._number(1, 0), *value.shape]
        self._set(node, self._call(node, aten.expand.default, row, sizes))

    def _set(self, node: fx.Node, result: fx.Node) -> None:
        self.env[node] = result
        self.batched.add(node)
        if self._count is None and isinstance(result.meta["val"], Tensor):
            self._count = result

    def _call(self, node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return g.call(self.new.graph, target, *args, like=node, **kwargs)

    def _mapped(self, arguments: Any) -> Any:
        return fx.map_arg(arguments, self.env.__getitem__)

    def _number(self, times: int, plus: int) -> fx.Node:
        """Return `times` the number of requests `plus` a number, as a value of the graph."""
        assert self._count is not None
        number = g.call(self.new.graph, aten.sym_size.int, self._count, 0)
        if times != 1:
            number = g.call(self.new.graph, operator.mul, number, times)
        return g.call(self.new.graph, operator.add, number, plus) if plus else number

    def _reshaped(self, node: fx.Node, value: fx.Node, shape: Sequence[int]) -> fx.Node:
        return self._call(node, aten.reshape.default, value, [-1, *shape])

    def _is_row_lookup(self, node: fx.Node, batched: list[fx.Node]) -> bool:
        return node.target is aten.embedding.default and batched == [node.args[1]]

    def _expanded(self, node: fx.Node) -> fx.Node:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        value, shape = self.env[source], list(node.meta["val"].shape)
        missing = len(shape) - _rank(source)
        if missing:
            value = self._reshaped(node, value, [1] * missing + list(source.meta["val"].shape))
        return self._call(node, aten.expand.default, value, [-1, *shape])

    def _flattened(self, node: fx.Node, value: fx.Node) -> fx.Node:
        return self._call(node, aten.flatten.using_ints, value, 0, 1)

    def _folded(self, node: fx.Node) -> fx.Node:
        """Call an operator with the new dimension and that of its batch as one."""
        value, *rest = self._mapped(node.args)
        flat = self._flattened(node, value)
        result = self._call(node, node.target, flat, *rest, **self._mapped(node.kwargs))
        return self._reshaped(node, result, node.meta["val"].shape)

    def _part(self, node: fx.Node) -> fx.Node:
        source, index = node.args
        assert isinstance(source, fx.Node)
        assert isinstance(index, int)
        return self.parts[source][index]

    def _attention(self, node: fx.Node) -> fx.Node | list[fx.Node]:
        """Call attention, in its general form, with the heads of all requests as one batch."""
        heads = [n for n in node.args[:3] if isinstance(n, fx.Node)]
        shape = heads[0].meta["val"].shape
        rest = {
            **dict(zip(_parameters(node)[3:], node.args[3:], strict=False)),
            **node.kwargs,
        }
        mask = rest.get("attn_mask")
        for value in heads:
            self.spread(value)
        if isinstance(mask, fx.Node):
            sizes = list(mask.meta["val"].shape)
            rest["attn_mask"] = self.env[mask]
            if mask in self.batched or (len(sizes) == 4 and sizes[0] > 1):
                self.spread(mask)
                sizes = [1] * (4 - len(sizes)) + sizes
                wide = self._reshaped(node, self.env[mask], sizes)
                wide = self._call(node, aten.expand.default, wide, [-1, shape[0], *sizes[1:]])
                rest["attn_mask"] = self._flattened(node, wide)
        flat = [self._flattened(node, self.env[n]) for n in heads]
        result = self._call(node, ATTENTION, *flat, **rest)
        result = self._reshaped(node, result, [*shape[:-1], result.meta["val"].shape[-1]])
        return [result] if node.target is FLASH else result

    def _pointwise(self, node: fx.Node) -> fx.Node:
        arguments, kwargs = self._aligned((node.args, node.kwargs), node)
        return self._call(node, node.target, *arguments, **kwargs)

    def _aligned(self, arguments: Any, node: fx.Node) -> Any:
        """Return arguments that fit each other by their last dimensions, and with requests."""
        rank = _rank(node)

        def aligned(source: fx.Node) -> fx.Node:
            value = self.env[source]
            if source not in self.batched or _rank(source) == rank:
                return value
            shape = source.meta["val"].shape
            return self._reshaped(node, value, [1] * (rank - len(shape)) + list(shape))

        return fx.map_arg(arguments, aligned)

    def _filled(self, node: fx.Node) -> fx.Node:
        """Expand the second argument to the shape of the first, whose values don't count."""
        source = node.args[1]
        assert isinstance(source, fx.Node)
        self.spread(source)
        shape, inner = node.meta["val"].shape, list(source.meta["val"].shape)
        wide = self._reshaped(node, self.env[source], [1] * (len(shape) - len(inner)) + inner)
        wide = self._call(node, aten.expand.default, wide, [-1, *shape])
        return self._call(node, aten._to_copy.default, wide, dtype=node.meta["val"].dtype)

    def _scattered(self, node: fx.Node) -> fx.Node:
        for source in node.all_input_nodes:
            self.spread(source)
        where, part, dim, *rest = (*args(node), 0)[: max(3, len(node.args))]
        arguments = self._mapped((where, part))
        return self._call(node, node.target, *arguments, dim % _rank(node) + 1, *rest)

    def _masked(self, node: fx.Node) -> fx.Node:
        """Choose by the mask, element by element, between the new value and the old."""
        value, (mask,), new = self._aligned(node.args[:3], node)
        return self._call(node, aten.where.self, mask, new, value)

    def _strided(self, node: fx.Node) -> fx.Node:
        """Write the second argument to places of the first that strides name."""
        for source in node.all_input_nodes:
            self.spread(source)
        whole, part, size, stride, *rest = args(node)
        if not whole.meta["val"].is_contiguous():
            raise Unbatchable(f"{_named(node)} cannot be batched: its first argument has gaps")
        places = torch.arange(whole.meta["val"].numel()).as_strided(size, stride, *rest)
        index = g.get_attr(self.new, "places", places.flatten())
        rows = [self._reshaped(node, self.env[v], [v.meta["val"].numel()]) for v in (whole, part)]
        result = self._call(node, aten.index_copy.default, rows[0], 1, index, rows[1])
        return self._reshaped(node, result, node.meta["val"].shape)

    def _vmapped(self, node: fx.Node) -> fx.Node | list[fx.Node]:
        """Rewrite any other operator as `torch.vmap` does it, at two sizes to see what changes."""
        sources = node.all_input_nodes
        if any(isinstance(a, (list, tuple)) and g.nodes_in(a) for a in node.args):
            for source in sources:  # of a list, such as cat's, every item
                self.spread(source)
        batched = [n in self.batched for n in sources]
        form = _Form.of(node, sources, batched)
        try:
            one, other = (_trace(form, size) for size in (2, 3))
        except Exception as error:  # vmap raises many kinds
            reason = first_line(error)
            raise Unbatchable(f"{_named(node)} cannot be batched: {reason}") from error
        if len(one.graph.nodes) != len(other.graph.nodes):
            raise Unbatchable(f"{_named(node)} cannot be batched: torch.vmap makes a loop of it")
        inner: dict[fx.Node, fx.Node] = {}
        result: Any = None
        for a, b in zip(one.graph.nodes, other.graph.nodes, strict=True):
            if a.op == "placeholder":
                inner[a] = self.env[sources[len(inner)]]
            elif a.op == "output":
                result = a.args[0]
            elif a.op == "call_function":
                arguments, kwargs = self._sized((a.args, a.kwargs), (b.args, b.kwargs), inner, node)
                # Traced on contiguous values, which these need not be.
                target = aten.reshape.default if a.target in RESHAPES else a.target
                inner[a] = self._call(node, target, *arguments, **kwargs)
            else:
                raise Unbatchable(f"{_named(node)} cannot be batched: it needs a constant")
        return [inner[n] for n in result] if isinstance(result, (list, tuple)) else inner[result]

    def _sized(self, one: Any, other: Any, inner: Mapping[fx.Node, fx.Node], node: fx.Node) -> Any:
        """Return arguments traced at sizes 2 and 3 as they are at any size."""
        if isinstance(one, fx.Node):
            return inner[one]
        if isinstance(one, (list, tuple)):
            items = [self._sized(a, b, inner, node) for a, b in zip(one, other, strict=True)]
            return type(one)(items)
        if isinstance(one, dict):
            return {k: self._sized(v, other[k], inner, node) for k, v in one.items()}
        if one == other:
            return one
        if isinstance(one, int) and isinstance(other, int):
            return self._number(other - one, one - 2 * (other - one))
        raise Unbatchable(f"{_named(node)} cannot be batched: {one} becomes {other}")


def _fills_where(node: fx.Node) -> bool:
    """Tell whether a node writes one number wherever a mask is true."""
    if node.target is not aten.index_put.default or len(node.args) > 3:
        return False
    value, indices, new = args(node)
    if not isinstance(indices, (list, tuple)) or len(indices) != 1 or new in (value, indices):
        return False
    mask = indices[0].meta["val"]
    return bool(mask.dtype == torch.bool and mask.dim() == _rank(value) and _rank(new) == 0)


def _parameters(node: fx.Node) -> list[str]:
    return [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]


def _rank(node: fx.Node) -> int:
    return int(node.meta["val"].dim())


def _named(node: fx.Node) -> str:
    return f"{target_name(node)} ({node.name})"
