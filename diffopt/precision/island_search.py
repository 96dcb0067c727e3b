"""Runs components in lower precision on the values of calibration calls, and measures the error."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.analysis.dtype_regions import SOFTMAX, Cut, Kind, is_pointwise
from diffopt.analysis.reachability import packet
from diffopt.execution import trajectories
from diffopt.ir import graph as g
from diffopt.ir.program import Program
from diffopt.precision.cast_body import Weights, cast_body


class Unsupported(Exception):
    """An operator has no kernel for the type."""

    def __init__(self, node: str, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason


def record(
    program: Program, names: Collection[str], inputs: Sequence[Tensor], count: int
) -> dict[str, list[list[Tensor]]]:
    """Run a program; return the arguments of up to `count` calls of each component, spread."""
    chosen: dict[tuple[int, int], fx.Node] = {}
    for name in names:
        sites = program.calls(name)
        number = min(count, len(sites))
        for k in range(number):
            chosen[len(chosen), 0] = sites[k * (len(sites) - 1) // max(1, number - 1)]
    found: dict[str, list[list[Tensor]]] = {}
    for visit in trajectories.steps(program, chosen, inputs):
        site = chosen[visit.step, visit.branch]
        found.setdefault(str(site.target), []).append(visit.arguments)
    return found


@dataclass(frozen=True)
class Measured:
    """What a way to cast a component does.

    Attributes:
        error: The mean over results and calls of |low - wide|² / |wide|².
        overflown: The first nodes whose values are not finite, where those in float32 are.
    """

    error: float
    overflown: frozenset[str]


class Trial:
    """A component and some of its calls, on which ways to cast it are compared with float32."""

    def __init__(self, cut: Cut, calls: Sequence[Sequence[Tensor]], weights: Weights) -> None:
        self.cut, self.calls, self.weights = cut, calls, weights
        self.overflows = torch.finfo(cut.low).max < torch.finfo(torch.float32).max / 2
        self.reference = [_Run(cut.body, call, self.overflows) for call in calls]
        self.unsupported: dict[str, str] = {}

    def measure(self, wide: Collection[fx.Node]) -> Measured:
        """Cast the component with these nodes in float32, and run it."""
        while True:
            lacking = {n for n in self.cut.body.graph.nodes if n.name in self.unsupported}
            self.cut.wide = {*wide, *lacking}
            try:
                return self._measure()
            except Unsupported as error:
                own = {n.name for n in self.cut.body.graph.nodes} - {n.name for n in lacking}
                if error.node not in own:
                    raise
                self.unsupported[error.node] = error.reason

    def _measure(self) -> Measured:
        cut, body = self.cut, cast_body(self.cut, self.weights)
        takes = [node in cut.takes for node in g.placeholders(cut.body)]
        errors: list[float] = []
        bad: set[str] = set()
        for call, reference in zip(self.calls, self.reference, strict=True):
            given = [t.to(cut.low) if low else t for t, low in zip(call, takes, strict=True)]
            run = _Run(body, given, self.overflows)
            errors += map(_error, run.results, reference.results)
            bad |= run.infinite - reference.infinite
        error = sum(errors) / max(1, len(errors))
        if not bad and not math.isfinite(error):
            bad = {g.outputs(cut.body)[0].name}
        return Measured(error, _first(cut.body, bad))


@dataclass(frozen=True)
class Chosen:
    """The islands of a component.

    Attributes:
        kinds: Which.
        shares: By kind, which part of the squared error it takes away.
        error: Squared and relative, with these islands.
        without: The same with none.
        unsupported: Operators that have no kernel for the type, each with torch's reason.
        reason: Why the component stays in float32; else "".
    """

    kinds: tuple[Kind, ...] = ()
    shares: Mapping[Kind, float] = field(default_factory=dict)
    error: float = 0.0
    without: float = 0.0
    unsupported: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""


def choose(
    trial: Trial,
    kinds: Mapping[Kind, set[fx.Node]],
    fixed: Sequence[Kind] | None,
    least: float,
) -> Chosen:
    """Choose which kinds stay in float32, and leave the trial's cut so.

    Args:
        trial: Of the component.
        kinds: What there is to choose from.
        fixed: What to choose; None: by measuring.
        least: The share of the squared error that makes a kind worth it.
    """

    def measure(chosen: Collection[Kind]) -> Measured:
        return trial.measure({n for kind in chosen for n in kinds[kind]})

    chosen = list(fixed or ())
    base = without = measure(chosen)
    while base.overflown:
        names = base.overflown
        more = [k for k, ns in kinds.items() if k not in chosen and names & {n.name for n in ns}]
        if not more or fixed is not None:
            low = str(trial.cut.low).removeprefix("torch.")
            return Chosen(reason=f"stays in float32, since {min(names)} overflows {low}")
        chosen += more
        base = measure(chosen)
    shares: dict[Kind, float] = {}
    for kind in kinds if fixed is None else ():
        if kind not in chosen and base.error > 0:
            shares[kind] = 1 - measure([*chosen, kind]).error / base.error
    # Two kinds may take away the same error, so that each has to be worth it beside the others.
    best = base
    for kind in sorted(shares, key=lambda k: -shares[k]):
        if shares[kind] < least:
            break
        found = measure([*chosen, kind])
        if found.error <= (1 - least) * best.error:
            chosen, best = [*chosen, kind], found
    error = measure(chosen).error
    return Chosen(tuple(chosen), shares, error, without.error, trial.unsupported)


def _first(body: fx.GraphModule, bad: Collection[str]) -> frozenset[str]:
    """Return those of some nodes that depend on no other of them."""
    nodes = {n for n in body.graph.nodes if n.name in bad}
    return frozenset(n.name for n in nodes if len(g.ancestors([n]) & nodes) == 1)


class _Run(fx.Interpreter):
    """Runs a body once, and keeps its results and the names of nodes that are not finite."""

    def __init__(self, body: fx.GraphModule, given: Sequence[Tensor], watch: bool) -> None:
        super().__init__(body)
        self.infinite: set[str] = set()
        self.watch = watch
        self.scores = _scores(body) if watch else set()
        with torch.no_grad():
            self.results: tuple[Tensor, ...] = self.run(*given, enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        try:
            value = super().run_node(n)
        except (RuntimeError, NotImplementedError) as error:
            raise Unsupported(n.name, str(error).splitlines()[0]) from error
        if self.watch and isinstance(value, Tensor) and value.is_floating_point():
            fine = (
                value.isfinite() | (value == -torch.inf) if n in self.scores else value.isfinite()
            )
            if not bool(fine.all()):
                self.infinite.add(n.name)
        return value


def _error(low: Tensor, wide: Tensor) -> float:
    if not wide.is_floating_point():
        return float((low != wide).double().mean())
    a, b = low.double(), wide.double()
    equal = a == b  # infinite values too, of which the difference is nan
    norm = float(torch.where(b.isfinite(), b, 0.0).square().sum())
    error = float(torch.where(equal, 0.0, a - b).square().sum())
    return error / norm if norm else error


def _scores(body: fx.GraphModule) -> set[fx.Node]:
    """Return what is only added to scores, such as masks: there -inf is a weight of 0."""
    found: set[fx.Node] = set()
    for node in reversed(body.graph.nodes):
        if node.op != "call_function" or not is_pointwise(node) or not node.users:
            continue
        if all(user in found or packet(user) in SOFTMAX for user in node.users):
            found.add(node)
    return found
