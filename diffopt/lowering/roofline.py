"""The roofline model: the least time of a program's steps on a device, without the device.

A kernel takes as long as its products at the device's peak rate, or as its reads and writes at the
memory's bandwidth, whichever is longer; kernels run one after another (Samuel Williams et al.,
2009). What is one kernel decides what is moved. Three models of that bracket a run:

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

# They read only some rows of their first argument.
_GATHERS = (
    aten.embedding.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.gather.default,
)


@dataclass
class Kernel:
    """Operators that are computed without memory traffic between them.

    Attributes:
        number: The format of its products.
        flops: The number of operations.
        bytes: The bytes that it reads and writes.
    """

    number: str = "fp32"
    flops: int = 0
    bytes: int = 0

    def seconds(self, hardware: Hardware) -> tuple[float, Bound]:
        """Return the time that it takes, and what bounds that."""
        compute = self.flops / hardware.rate(self.number)
        memory = self.bytes / hardware.bandwidth
        return (compute, "compute") if compute > memory else (memory, "memory")


@dataclass
class Work:
    """The kernels of one call of a component, on any device; see the module for `most`, `least`."""

    kernels: list[Kernel] = field(default_factory=list)
    most: int = 0
    least: int = 0

    @property
    def bytes(self) -> int:
        """The bytes that all kernels read and write."""
        return sum(kernel.bytes for kernel in self.kernels)

    @property
    def flops(self) -> dict[str, int]:
        """Operations by format of numbers."""
        flops: dict[str, int] = {}
        for kernel in self.kernels:
            if kernel.flops:
                flops[kernel.number] = flops.get(kernel.number, 0) + kernel.flops
        return flops


@dataclass(frozen=True)
class Row:
    """A component on a device.

    Attributes:
        component: Its name; `program` for the operators between the calls.
        calls: The number of calls in a run.
        steps: The steps with calls.
        flops: Operations of a call, by format.
        bytes: Bytes that a call moves; see the module for this and the next two.
        most: Bytes if every operator were a kernel of its own.
        least: The least bytes.
        bound: What bounds most of the time.
        seconds: The predicted time of a call.
        limit: The least time of a call.
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
        rows: Components in the order of their first calls.
        weights: Bytes of all weights.
    """

    hardware: Hardware
    rows: list[Row]
    weights: int

    @property
    def seconds(self) -> float:
        """The predicted time of a run."""
        return sum(row.calls * row.seconds for row in self.rows)

    @property
    def limit(self) -> float:
        """The least time of a run."""
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
    """Return the roofline of a program on a device.

    Raises:
        DiffoptError: The device lacks a format of the program.
    """
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


def _row(name: str, calls: int, steps: Iterable[int], work: Work, hardware: Hardware) -> Row:
    spent: dict[Bound, float] = {"compute": 0.0, "memory": 0.0}
    for kernel in work.kernels:
        seconds, bound = kernel.seconds(hardware)
        spent[bound] += seconds
    flops = work.flops
    compute = sum(count / hardware.rate(number) for number, count in flops.items())
    return Row(
        component=name,
        calls=calls,
        steps=tuple(sorted(steps)),
        flops=flops,
        bytes=work.bytes,
        most=work.most,
        least=work.least,
        bound="compute" if spent["compute"] > spent["memory"] else "memory",
        seconds=sum(spent.values()),
        limit=max(compute, work.least / hardware.bandwidth),
    )


def work(gm: fx.GraphModule) -> Work:
    """Return the work of one run of a graph, without the components that it calls."""
    return _KernelGraph(gm).work()


# Mean and variance need all of a group, which no kernel can hold: the input is read again.
_TWO_PASS = (aten.group_norm.default, aten.native_group_norm.default)

# Bytes that are read: by the node that wrote them, and by view of its value.
_Reads = dict[fx.Node, dict[fx.Node, int]]


class _KernelGraph:
    """A graph partitioned into kernels.

    Only nodes of one stage are fused. The stage of a value is the largest number of products on a
    path to it, so no kernel depends on a product that depends on it.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        self._constant: dict[fx.Node, list[fx.Node]] = {}  # by constant node: its weights
        self._flops: dict[fx.Node, int] = {}
        self._stage: dict[fx.Node, int] = {}
        self._parent: dict[fx.Node, fx.Node] = {}  # union-find
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
        for source in map(_base, sources if not is_call(node, *_TWO_PASS) else ()):
            if self._flops.get(source) == 0 and self._stage[source] == self._stage[node]:
                self._union(source, node)

    def _union(self, one: fx.Node, other: fx.Node) -> None:
        if self._kernel(one) is not self._kernel(other):
            self._parent[self._kernel(one)] = self._kernel(other)

    def _kernel(self, node: fx.Node) -> fx.Node:
        """Return the representative of a node's kernel."""
        while node in self._parent:
            node = self._parent[node]
        return node

    def work(self) -> Work:
        """Add up what the kernels do."""
        kernels: dict[fx.Node, Kernel] = {}
        reads: dict[fx.Node, _Reads] = {}
        written = {_base(node) for node in g.outputs(self._gm)}
        most = 0
        for node, flops in self._flops.items():
            representative = self._kernel(node)
            kernel = kernels.setdefault(representative, Kernel())
            if flops:
                kernel.number, kernel.flops = legality.product_format(node), flops
            node_reads = self._reads(node)
            again = (
                g.value_bytes(node.all_input_nodes[0].meta["val"])
                if is_call(node, *_TWO_PASS)
                else 0
            )
            most += _total(node_reads) + again + g.value_bytes(node.meta["val"])
            # The first pass is fused with elementwise operators that compute the input.
            kernel.bytes += again if self._flops.get(_base(node.all_input_nodes[0])) != 0 else 0
            for source, views in node_reads.items():
                if source not in self._flops or self._kernel(source) is not representative:
                    reads.setdefault(representative, {}).setdefault(source, {}).update(views)
                    written.add(source)
        for node in self._gm.graph.find_nodes(op="call_module"):
            written.update(self._reads(node))
        for representative, kernel_reads in reads.items():
            kernels[representative].bytes += _total(kernel_reads)
        for node in written & self._flops.keys():
            kernels[self._kernel(node)].bytes += g.value_bytes(node.meta["val"])
        return Work(list(kernels.values()), most, self._least(reads.values()))

    def _reads(self, node: fx.Node) -> _Reads:
        """Return what a node reads of weights and of other nodes' values."""
        layer = qdq.layer(node)
        narrow = None if layer is None else legality.low_precision_input(layer)
        reads: _Reads = {}
        for position, source in enumerate(node.all_input_nodes):
            if narrow is not None and source is narrow.node:
                source = narrow.quantized
            base, view = _base(source), source.meta["val"]
            if position == 0 and is_call(node, *_GATHERS):
                view = node.meta["val"]
            if base.op != "get_attr" and base in self._constant:
                for leaf in self._constant[base]:
                    reads[leaf] = {leaf: min(g.value_bytes(leaf.meta["val"]), g.value_bytes(view))}
            else:
                reads.setdefault(base, {})[source] = g.value_bytes(view)
        return reads

    def _least(self, reads: Iterable[_Reads]) -> int:
        """Return the bytes of the weights and inputs that are read, and of the outputs."""
        external: _Reads = {}
        for kernel_reads in reads:
            for source, views in kernel_reads.items():
                if source not in self._flops:
                    external.setdefault(source, {}).update(views)
        outputs = {_base(node) for node in g.outputs(self._gm)} & self._flops.keys()
        return _total(external) + sum(g.value_bytes(node.meta["val"]) for node in outputs)


def _total(reads: _Reads) -> int:
    """Return the bytes that are read: the views of each value, at most the whole value."""
    return sum(
        min(sum(views.values()), g.value_bytes(source.meta["val"]))
        for source, views in reads.items()
    )


def _is_free(node: fx.Node) -> bool:
    """Tell whether a node is a view, or selects one of several results."""
    if node.op != "call_function":
        return False
    viewing = isinstance(node.target, torch._ops.OpOverload) and node.target.is_view
    return viewing or step_tables.is_view(node)


def _base(node: fx.Node) -> fx.Node:
    """Return the node that allocates the memory of a value."""
    while _is_free(node):
        node = node.all_input_nodes[0]
    return node
