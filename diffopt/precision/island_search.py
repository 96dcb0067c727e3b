"""Search the islands of a component: run it in lower precision on calibration calls."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from diffopt.analysis.dtype_regions import SOFTMAX, DtypePlan, IslandKind, is_pointwise
from diffopt.analysis.reachability import packet
from diffopt.errors import first_line
from diffopt.execution import trajectories
from diffopt.ir import graph as g
from diffopt.ir.interpreter import Interpreter
from diffopt.ir.program import Program
from diffopt.precision.cast_body import LowWeights, cast_body


class UnsupportedDtype(Exception):
    """An operator has no kernel for the type."""

    def __init__(self, node: str, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason


def record_calls(
    program: Program, names: Collection[str], inputs: Sequence[Tensor], count: int
) -> dict[str, list[list[Tensor]]]:
    """Return the arguments of up to `count` calls of each component, spread evenly over a run."""
    sampled: dict[tuple[int, int], fx.Node] = {}
    for name in names:
        sites = program.calls(name)
        number = min(count, len(sites))
        for k in range(number):
            sampled[len(sampled), 0] = sites[k * (len(sites) - 1) // max(1, number - 1)]
    arguments: dict[str, list[list[Tensor]]] = {}
    for visit in trajectories.steps(program, sampled, inputs):
        call = sampled[visit.step, visit.branch]
        arguments.setdefault(str(call.target), []).append(visit.arguments)
    return arguments


@dataclass(frozen=True)
class CastError:
    """The error of a dtype plan.

    Attributes:
        error: The mean over results and calls of |low - wide|² / |wide|².
        overflown: The first nodes whose values are not finite, where those in float32 are.
    """

    error: float
    overflown: frozenset[str]


class CastTrial:
    """A component and some of its calls, on which dtype plans are compared with float32."""

    def __init__(
        self, plan: DtypePlan, calls: Sequence[Sequence[Tensor]], weights: LowWeights
    ) -> None:
        self.plan, self.calls, self.weights = plan, calls, weights
        self.overflows = torch.finfo(plan.low).max < torch.finfo(torch.float32).max / 2
        self.reference = [_run(plan.body, call, self.overflows) for call in calls]
        self.unsupported: dict[str, str] = {}

    def measure(self, wide: Collection[fx.Node]) -> CastError:
        """Cast the component with these nodes in float32, and run it."""
        while True:
            lacking = {n for n in self.plan.body.graph.nodes if n.name in self.unsupported}
            self.plan.float32_nodes = {*wide, *lacking}
            try:
                return self._measure()
            except UnsupportedDtype as error:
                names = {n.name for n in self.plan.body.graph.nodes} - {n.name for n in lacking}
                if error.node not in names:
                    raise
                self.unsupported[error.node] = error.reason

    def _measure(self) -> CastError:
        plan, body = self.plan, cast_body(self.plan, self.weights)
        is_low = [node in plan.low_arguments for node in g.placeholders(plan.body)]
        errors: list[float] = []
        overflown: set[str] = set()
        for call, reference in zip(self.calls, self.reference, strict=True):
            arguments = [t.to(plan.low) if low else t for t, low in zip(call, is_low, strict=True)]
            run = _run(body, arguments, self.overflows)
            errors += map(_error, run.results, reference.results)
            overflown |= run.infinite - reference.infinite
        error = sum(errors) / max(1, len(errors))
        if not overflown and not math.isfinite(error):
            overflown = {g.outputs(plan.body)[0].name}
        return CastError(error, _first(plan.body, overflown))


@dataclass(frozen=True)
class IslandChoice:
    """The islands of a component.

    Attributes:
        kinds: The kinds of islands that are kept in float32.
        shares: By kind, the fraction of the squared error that it removes.
        error: Squared relative error with these islands.
        without: Squared relative error without any.
        unsupported: Operators that have no kernel for the type, each with torch's reason.
        reason: Why the component is kept in float32; else "".
    """

    kinds: tuple[IslandKind, ...] = ()
    shares: Mapping[IslandKind, float] = field(default_factory=dict)
    error: float = 0.0
    without: float = 0.0
    unsupported: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""


def search_islands(
    trial: CastTrial,
    kinds: Mapping[IslandKind, set[fx.Node]],
    fixed: Sequence[IslandKind] | None,
    least: float,
) -> IslandChoice:
    """Choose the kinds of islands greedily by measured error, and set them in the trial's plan.

    Args:
        trial: Of the component.
        kinds: The nodes of each kind to choose from.
        fixed: The kinds to keep in float32; None: those that measurements favour.
        least: The least fraction of the squared error that a kind has to remove.
    """

    def measure(chosen: Collection[IslandKind]) -> CastError:
        return trial.measure({n for kind in chosen for n in kinds[kind]})

    chosen = list(fixed or ())
    base = without = measure(chosen)
    while base.overflown:
        names = base.overflown
        more = [k for k, ns in kinds.items() if k not in chosen and names & {n.name for n in ns}]
        if not more or fixed is not None:
            low = str(trial.plan.low).removeprefix("torch.")
            return IslandChoice(reason=f"stays in float32, since {min(names)} overflows {low}")
        chosen += more
        base = measure(chosen)
    shares: dict[IslandKind, float] = {}
    for kind in kinds if fixed is None else ():
        if kind not in chosen and base.error > 0:
            shares[kind] = 1 - measure([*chosen, kind]).error / base.error
    # Two kinds may remove the same error, so that each has to pay beside the ones before it.
    best = base
    for kind in sorted(shares, key=lambda k: -shares[k]):
        if shares[kind] < least:
            break
        extended = measure([*chosen, kind])
        if extended.error <= (1 - least) * best.error:
            chosen, best = [*chosen, kind], extended
    error = measure(chosen).error
    return IslandChoice(tuple(chosen), shares, error, without.error, trial.unsupported)


def fixed_islands(
    plan: DtypePlan, kinds: Mapping[IslandKind, set[fx.Node]], fixed: Sequence[IslandKind]
) -> IslandChoice:
    """Set islands in a plan, without running the component.

    Of each operator that is to compute in the low type one is run on zeros, the smallest, to see
    whether torch has a kernel.
    """
    plan.float32_nodes = {n for kind in fixed for n in kinds[kind]}
    smallest: dict[Any, fx.Node] = {}
    nodes = [n for n in plan.low_nodes() if n.op == "call_function"]
    for node in sorted(nodes, key=lambda n: -_elements(n)):
        smallest[node.target] = node
    unsupported: dict[str, str] = {}
    for target, node in smallest.items():
        try:
            _run_on_zeros(node, plan.low)
        except (RuntimeError, NotImplementedError) as error:
            lacking = [n for n in nodes if n.target == target]
            unsupported |= dict.fromkeys([n.name for n in lacking], first_line(error))
            plan.float32_nodes |= set(lacking)
    return IslandChoice(tuple(fixed), unsupported=unsupported)


def _elements(node: fx.Node) -> int:
    """Return the number of elements that a node reads."""
    values = [source.meta["val"] for source in node.all_input_nodes]
    return sum(value.numel() for value in values if isinstance(value, Tensor))


def _run_on_zeros(node: fx.Node, low: torch.dtype) -> None:
    """Compute a node in the low type."""

    def zeros(source: fx.Node) -> Any:
        return tree_map_only(Tensor, lambda t: _zeros(t, low), source.meta["val"])

    with torch.no_grad():
        node.target(*fx.map_arg(node.args, zeros), **fx.map_arg(node.kwargs, zeros))  # type: ignore[operator]


def _zeros(value: Tensor, low: torch.dtype) -> Tensor:
    is_wide = value.dtype == torch.float32
    return torch.zeros(value.shape, dtype=low if is_wide else value.dtype)


def _first(body: fx.GraphModule, bad: Collection[str]) -> frozenset[str]:
    """Return the names of nodes in `bad` that depend on no other of them."""
    nodes = {n for n in body.graph.nodes if n.name in bad}
    return frozenset(n.name for n in nodes if len(g.ancestors([n]) & nodes) == 1)


@dataclass(frozen=True)
class _Run:
    """A run of a body: its results, and the names of nodes whose values are not all finite."""

    results: tuple[Tensor, ...]
    infinite: set[str]


def _run(body: fx.GraphModule, arguments: Sequence[Tensor], watch: bool) -> _Run:
    """Run a body; look for values that are not finite if `watch` is set."""
    infinite: set[str] = set()
    scores = _scores(body) if watch else set()

    def look(node: fx.Node, value: Any) -> None:
        if not watch or not isinstance(value, Tensor) or not value.is_floating_point():
            return
        if value.itemsize == 1:  # 8-bit floats have few operators
            value = value.float()
        fine = value.isfinite() | (value == -torch.inf) if node in scores else value.isfinite()
        if not bool(fine.all()):
            infinite.add(node.name)

    def compute(run: Interpreter, node: fx.Node) -> Any:
        try:
            value = run.run_node(node)
        except (RuntimeError, NotImplementedError) as error:
            raise UnsupportedDtype(node.name, first_line(error)) from error
        look(node, value)
        return value

    with torch.no_grad():
        for node, value in zip(g.placeholders(body), arguments, strict=True):
            look(node, value)
        results = Interpreter(body, also=body.graph.nodes).run(*arguments, hook=compute)
    return _Run(results, infinite)


def _error(low: Tensor, wide: Tensor) -> float:
    if not wide.is_floating_point():
        return float((low != wide).double().mean())
    a, b = low.double(), wide.double()
    equal = a == b  # infinite values too, of which the difference is nan
    norm = float(torch.where(b.isfinite(), b, 0.0).square().sum())
    error = float(torch.where(equal, 0.0, a - b).square().sum())
    return error / norm if norm else error


def _scores(body: fx.GraphModule) -> set[fx.Node]:
    """Return values that are only added to softmax scores, as masks: there -inf is a weight 0."""
    scores: set[fx.Node] = set()
    for node in reversed(body.graph.nodes):
        if node.op != "call_function" or not is_pointwise(node) or not node.users:
            continue
        if all(user in scores or packet(user) in SOFTMAX for user in node.users):
            scores.add(node)
    return scores
