"""The roofline: what a program's steps cost on a device at best, found without the device.

A kernel takes as long as its products at the device's peak rate, or as moving what it reads and
writes at the memory's, whichever is longer; kernels follow each other. What is one kernel decides
what is moved. Three models of that bracket a run:

- `most`: every operator is a kernel of its own, which reads its arguments and writes its results.
- `bytes`: operators that multiply (matrix products, convolutions, attention) are kernels of their
  own; all between them that touch each other are one kernel. So only what crosses from one to the
  other is moved. Compilers aim at that: Inductor fuses elementwise operators and reductions and
  leaves products to libraries. A group norm reads its input twice, and writes what it is computed
  from, as its sums are known only at the end. The predicted time is made of this.
- `least`: the component's weights, inputs and outputs alone, as if everything between stayed in
  caches. With the products at their peak rate it gives the limit, which only a cache that keeps
  weights from call to call can beat.

Weights count in the format in which they are stored: what widens them is part of the kernel that
reads them. Not counted are what launching kernels takes, and that few kernels reach peak rates.
float32 products count as those of fp32, not of tf32, which rounds their factors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from diffopt.errors import DiffoptError
from diffopt.ir import call_tags, qdq, step_tables
from diffopt.ir import graph as g
from diffopt.ir.flops import node_flops
from diffopt.ir.nodes import is_call
from diffopt.ir.program import Program
from diffopt.lowering import legality
from diffopt.lowering.hardware import Hardware

aten = torch.ops.aten

Bound = Literal["compute", "memory"]

# They read the rows of their first argument that the others name.
_GATHERS = (
    aten.embedding.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.gather.default,
)


@dataclass
class Kernel:
    """What runs without memory in between.

    Attributes:
        number: The format of its products.
        flops: How many operations these are.
        bytes: What it reads and writes.
    """

    number: str = "fp32"
    flops: int = 0
    bytes: int = 0

    def seconds(self, hardware: Hardware) -> tuple[float, Bound]:
        """Return how long it takes, and what that is bound by."""
        compute = self.flops / hardware.rate(self.number)
        memory = self.bytes / hardware.bandwidth
        return (compute, "compute") if compute > memory else (memory, "memory")


@dataclass
class Work:
    """What one call of a component has to do, on whatever device; see the module for `most`."""

    kernels: list[Kernel] = field(default_factory=list)
    most: int = 0
    least: int = 0

    @property
    def bytes(self) -> int:
        """What all kernels move."""
        return sum(kernel.bytes for kernel in self.kernels)

    @property
    def flops(self) -> dict[str, int]:
        """Operations by format of numbers."""
        found: dict[str, int] = {}
        for kernel in self.kernels:
            if kernel.flops:
                found[kernel.number] = found.get(kernel.number, 0) + kernel.flops
        return found


@dataclass(frozen=True)
class Row:
    """A component on a device.

    Attributes:
        component: Its name; `program` for what is between the calls.
        calls: How many calls a run makes.
        steps: Which steps make them.
        flops: Operations of a call, by format.
        bytes: What a call moves between kernels; see the module for this and the next two.
        most: What it would move with every operator a kernel of its own.
        least: What it moves at least.
        bound: Where most of the time goes.
        seconds: What a call is predicted to take.
        limit: What it takes at least.
    """

    component: str
    calls: int
    steps: tuple[int, ...]
    flops: dict[str, int]
    bytes: int
    most: int
    least: int
    bound: Bound
    seconds: float
    limit: float


@dataclass(frozen=True)
class Roofline:
    """A program on a device.

    Attributes:
        hardware: The device.
        rows: Components in the order in which they are called first.
        weights: What all weights take, in bytes.
    """

    hardware: Hardware
    rows: list[Row]
    weights: int

    @property
    def seconds(self) -> float:
        """What a run is predicted to take."""
        return sum(row.calls * row.seconds for row in self.rows)

    @property
    def limit(self) -> float:
        """What a run takes at least."""
        return sum(row.calls * row.limit for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON."""
        return {
            "hardware": self.hardware.to_json(),
            "seconds": self.seconds,
            "limit": self.limit,
            "weights": self.weights,
            "components": [asdict(row) for row in self.rows],
        }


def roofline(program: Program, hardware: Hardware) -> Roofline:
    """Return what a program costs on a device, which has to have the formats of its numbers."""
    if reason := legality.unsupported(program, hardware):
        raise DiffoptError(f"{hardware.name} cannot run this program: {reason}")
    steps: dict[str, set[int]] = {}
    counts: dict[str, int] = {}
    for call in program.calls():
        name = str(call.target)
        counts[name] = counts.get(name, 0) + 1
        tag = call_tags.tag(call)
        steps.setdefault(name, set()).update([] if tag is None else [tag.step])
    rows = [
        _row(name, count, steps[name], work(program.components[name]), hardware)
        for name, count in counts.items()
    ]
    rows.append(_row("program", 1, (), work(program.root), hardware))
    return Roofline(hardware, rows, g.tensor_bytes(program.weights().values()))


def _row(name: str, calls: int, steps: Iterable[int], own: Work, hardware: Hardware) -> Row:
    spent: dict[Bound, float] = {"compute": 0.0, "memory": 0.0}
    for kernel in own.kernels:
        seconds, bound = kernel.seconds(hardware)
        spent[bound] += seconds
    flops = own.flops
    compute = sum(count / hardware.rate(number) for number, count in flops.items())
    return Row(
        component=name,
        calls=calls,
        steps=tuple(sorted(steps)),
        flops=flops,
        bytes=own.bytes,
        most=own.most,
        least=own.least,
        bound="compute" if spent["compute"] > spent["memory"] else "memory",
        seconds=sum(spent.values()),
        limit=max(compute, own.least / hardware.bandwidth),
    )


def work(gm: fx.GraphModule) -> Work:
    """Return what one run of a graph has to do, without the components that it calls."""
    return _Graph(gm).work()


# What they divide by is known only after all of a group was read, which no kernel can hold.
_TWICE = (aten.group_norm.default, aten.native_group_norm.default)

# By kernel, what it reads: by who wrote that, which parts of it.
_Reads = dict[fx.Node, dict[fx.Node, int]]


class _Graph:
    """A graph cut into kernels.

    Only kernels of nodes in one stage are joined: a stage is how many products a value waits for,
    one after the other, so that no kernel would have to wait for a product of its own result.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        self._constant: dict[fx.Node, list[fx.Node]] = {}  # the stored tensors that it is made of
        self._flops: dict[fx.Node, int] = {}
        self._stage: dict[fx.Node, int] = {}
        self._joined: dict[fx.Node, fx.Node] = {}  # union-find: the next node of the same kernel
        for node in gm.graph.nodes:
            if node.op in ("call_function", "call_module", "get_attr"):
                self._place(node)

    def _place(self, node: fx.Node) -> None:
        sources = node.all_input_nodes
        if node.op != "call_module" and all(n in self._constant for n in sources):
            leaves = [leaf for n in sources for leaf in self._constant[n]]
            self._constant[node] = [node] if node.op == "get_attr" else leaves
            return
        free = _is_free(node)
        if node.op == "call_function" and not free:
            self._flops[node] = node_flops(node)
        alone = node.op == "call_module" or self._flops.get(node, 0) > 0
        self._stage[node] = alone + max((self._stage.get(n, 0) for n in sources), default=0)
        if alone or free:
            return
        for source in map(_base, sources if not is_call(node, *_TWICE) else ()):
            if self._flops.get(source) == 0 and self._stage[source] == self._stage[node]:
                self._join(source, node)

    def _join(self, one: fx.Node, other: fx.Node) -> None:
        if self._kernel(one) is not self._kernel(other):
            self._joined[self._kernel(one)] = self._kernel(other)

    def _kernel(self, node: fx.Node) -> fx.Node:
        """Return the node that stands for the kernel of a node."""
        while node in self._joined:
            node = self._joined[node]
        return node

    def work(self) -> Work:
        """Add up what the kernels do."""
        kernels: dict[fx.Node, Kernel] = {}
        reads: dict[fx.Node, _Reads] = {}
        written = {_base(node) for node in g.outputs(self._gm)}
        most = 0
        for node, flops in self._flops.items():
            own = self._kernel(node)
            kernel = kernels.setdefault(own, Kernel())
            if flops:
                kernel.number, kernel.flops = legality.product_format(node), flops
            taken = self._reads(node)
            again = (
                g.value_bytes(node.all_input_nodes[0].meta["val"]) if is_call(node, *_TWICE) else 0
            )
            most += _total(taken) + again + g.value_bytes(node.meta["val"])
            # The first time that is part of what computes it elementwise.
            kernel.bytes += again if self._flops.get(_base(node.all_input_nodes[0])) != 0 else 0
            for source, parts in taken.items():
                if source not in self._flops or self._kernel(source) is not own:
                    reads.setdefault(own, {}).setdefault(source, {}).update(parts)
                    written.add(source)
        for node in self._gm.graph.find_nodes(op="call_module"):
            written.update(self._reads(node))
        for own, taken in reads.items():
            kernels[own].bytes += _total(taken)
        for node in written & self._flops.keys():
            kernels[self._kernel(node)].bytes += g.value_bytes(node.meta["val"])
        return Work(list(kernels.values()), most, self._least(reads.values()))

    def _reads(self, node: fx.Node) -> _Reads:
        """Return what a node reads of stored tensors and of what others have written."""
        layer = qdq.layer(node)
        narrow = None if layer is None else legality.low_precision_input(layer)
        found: _Reads = {}
        for position, source in enumerate(node.all_input_nodes):
            if narrow is not None and source is narrow.node:
                source = narrow.quantized
            base, part = _base(source), source.meta["val"]
            if position == 0 and is_call(node, *_GATHERS):
                part = node.meta["val"]
            if base.op != "get_attr" and base in self._constant:
                for leaf in self._constant[base]:
                    found[leaf] = {leaf: min(g.value_bytes(leaf.meta["val"]), g.value_bytes(part))}
            else:
                found.setdefault(base, {})[source] = g.value_bytes(part)
        return found

    def _least(self, reads: Iterable[_Reads]) -> int:
        """Return the bytes of the weights and inputs that are read, and of the outputs."""
        outside: _Reads = {}
        for taken in reads:
            for source, parts in taken.items():
                if source not in self._flops:
                    outside.setdefault(source, {}).update(parts)
        ends = {_base(node) for node in g.outputs(self._gm)} & self._flops.keys()
        return _total(outside) + sum(g.value_bytes(node.meta["val"]) for node in ends)


def _total(reads: _Reads) -> int:
    """Return the bytes that are read: of each value its parts, together at most the whole."""
    return sum(
        min(sum(parts.values()), g.value_bytes(source.meta["val"]))
        for source, parts in reads.items()
    )


def _is_free(node: fx.Node) -> bool:
    """Tell whether a node only says how another one's memory is read, or picks a result."""
    if node.op != "call_function":
        return False
    viewing = isinstance(node.target, torch._ops.OpOverload) and node.target.is_view
    return viewing or step_tables.is_view(node)


def _base(node: fx.Node) -> fx.Node:
    """Return the node whose memory a value is in."""
    while _is_free(node):
        node = node.all_input_nodes[0]
    return node
