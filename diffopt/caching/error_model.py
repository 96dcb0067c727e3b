"""Model the error that reuse plans cause in a program's outputs, measured on calibration calls.

Errors are relative to the exact program on the same inputs. Only the part of a body that a result
depends on is evaluated, which makes hundreds of trials affordable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, fx

from diffopt.caching.apply_plan import Plan, Reuse, Term
from diffopt.execution.partial_evaluation import PartialEvaluator, Values
from diffopt.execution.trajectories import run_root
from diffopt.ir import graph as g
from diffopt.ir.nodes import is_call
from diffopt.ir.sampling_loop import CallKey, Loop
from diffopt.ir.step_tables import is_view
from diffopt.progress import Progress

aten = torch.ops.aten


# Steps at which errors and sensitivities are measured; between them they are interpolated.
_PROBES = 12
# Calls to measure on where more would cost much and tell little.
_FEW = 4
# Elements of one value in one call: enough to fit a few weights, and every step's fit in memory.
_SAMPLE = 2**14
_SUMS = (aten.add.Tensor, aten.cat.default)


CutErrors = dict[tuple[int, int, int], float]
"""Errors by (step, last computed step before it, the computed step before that)."""


class ErrorModel:
    """Errors of a sampling loop under reuse plans, on the flat inputs of calibration calls."""

    def __init__(self, loop: Loop, inputs: Sequence[Sequence[Tensor]], progress: Progress) -> None:
        self.loop = loop
        self.inputs = inputs
        self.progress = progress
        self.body = PartialEvaluator(loop.body)
        self._keys = {call: key for key, call in loop.calls.items()}
        self._arguments: list[dict[CallKey, list[Tensor]]] = []
        self._results: list[list[Tensor]] = []
        self._products: dict[fx.Node, Tensor] = {}
        self._hardness = [0.0] * len(inputs)
        for index, tensors in enumerate(inputs):
            progress(f"calibration: call {index + 1} of {len(inputs)}", None)
            self._arguments.append({})

            def exact(key: CallKey, actual: list[Tensor], index: int = index) -> Values:
                self._arguments[index][key] = actual
                return self.body.run(actual)

            self._results.append(self._run(tensors, exact))

    def _run(
        self, inputs: Sequence[Tensor], visit: Callable[[CallKey, list[Tensor]], Values]
    ) -> list[Tensor]:
        """Run the program with `visit` in place of the loop's calls."""

        def results(call: fx.Node, arguments: Sequence[Tensor]) -> list[Tensor] | None:
            if call not in self._keys:
                return None
            values = visit(self._keys[call], list(arguments))
            return [values[r] for r in self.body.results]

        return run_root(self.loop.program, inputs, results)

    @cached_property
    def candidates(self) -> list[fx.Node]:
        """The values worth reusing: loop-variant results of costly operators and of sums."""
        parameters = g.placeholders(self.loop.body)
        sites = list(self.loop.calls.values())
        variant = [t for i, t in enumerate(parameters) if len({c.args[i] for c in sites}) > 1]
        nodes = g.descendants(variant)
        return [
            n
            for n in self.loop.body.graph.nodes
            if n in nodes
            and n.op == "call_function"
            and isinstance(n.meta["val"], Tensor)
            and n.meta["val"].is_floating_point()
            and not is_view(n)
            and (self.loop.cost([n]) or is_call(n, *_SUMS))
        ]

    def value_errors(self) -> dict[fx.Node, float]:
        """Return the error of the body's results if one value is that of the step before.

        It is the squared relative error, averaged over some steps and calls.
        """
        total = dict.fromkeys(self.candidates, 0.0)
        probes = [
            (r, s) for s in self._probes(4, begin=1) for r in range(min(_FEW, len(self.inputs)))
        ]
        count = 0
        with torch.no_grad():
            for index, (request, step) in enumerate(probes):
                self.progress("measuring values", index / len(probes))
                for branch in range(self.loop.branches):
                    if (step, branch) not in self._keys.values():
                        continue
                    arguments = self._arguments[request]
                    if (step - 1, branch) not in arguments:
                        continue
                    before = self.body.run(arguments[step - 1, branch], keep=self.candidates)
                    known = self.body.everything(arguments[step, branch])
                    exact = [known[r] for r in self.body.results]
                    norm = _square(exact) or 1.0
                    count += 1
                    for value in self.candidates:
                        changed = self.body.run(
                            arguments[step, branch], {value: before[value]}, known=known
                        )
                        results = [changed[r] for r in self.body.results]
                        total[value] += _square(results, exact) / norm
        return {value: error / max(1, count) for value, error in total.items()}

    def output_sensitivity(self) -> list[float]:
        """Return, by step, relative change of the outputs / change of the body's results (norms).

        The results are extrapolated from earlier steps at some steps of a few calls; between these
        the logarithm is interpolated.
        """
        self.fit(self.body.results)
        measured: list[tuple[int, float]] = []
        probes = self._probes(_PROBES, begin=2)
        for index, probe in enumerate(probes):
            self.progress("measuring steps", index / len(probes))
            moved = changed = 0.0
            for request in range(min(_FEW, len(self.inputs))):
                change = self._disturb(request, probe)
                moved, changed = moved + change[0], changed + change[1]
            measured.append((probe, (moved / changed) ** 0.5 if changed else 0.0))
        return _interpolate(measured, self.loop.steps)

    def _disturb(self, request: int, probe: int) -> tuple[float, float]:
        """Extrapolate the results of a step; return the changes of the outputs and of the results.

        Both are squared norms, that of the outputs relative.
        """
        past: dict[CallKey, Values] = {}
        changed = 0.0
        # Not from the step before: the change should be well above rounding.
        sources = [s for s in (probe - 2, probe - 3, probe - 4) if s >= 0]

        def visit(key: CallKey, arguments: list[Tensor]) -> Values:
            nonlocal changed
            values = past[key] = self.body.run(arguments)
            step, branch = key
            if step != probe or not self._has(probe, sources):
                return values
            other = {}
            for value in values:
                weights = self.weights(value, probe, sources)
                parts = zip(weights, sources, strict=True)
                other[value] = torch.stack([w * past[s, branch][value] for w, s in parts]).sum(0)
            changed += _square(list(other.values()), list(values.values()))
            return other

        outputs, exact = self._run(self.inputs[request], visit), self._results[request]
        return _square(outputs, exact) / (_square(exact) or 1.0), changed

    def fit(self, values: Iterable[fx.Node]) -> None:
        """Accumulate the Gram matrices of values over steps, from which `weights` solves.

        G[i, j] = sum over calls of <v@i, v@j>; of large values on a random sample of elements.
        """
        values = [v for v in dict.fromkeys(values) if v not in self._products]
        branches = {b for b in range(self.loop.branches) if self._is_everywhere(b)} or {0}
        samples_of: dict[fx.Node, list[list[Tensor]]] = {v: [] for v in values}
        places = {v: _sample(v.meta["val"].numel()) for v in values}
        with torch.no_grad():
            for step in range(self.loop.steps if values else 0):
                self.progress("comparing steps", step / self.loop.steps)
                for samples in samples_of.values():
                    samples.append([])
                for arguments in self._arguments:
                    for branch in branches:
                        # A step without a call is orthogonal to all.
                        actual = arguments.get((step, branch))
                        env = {} if actual is None else self.body.run(actual, keep=values)
                        for v in values:
                            flat = env[v].flatten() if env else torch.zeros(v.meta["val"].numel())
                            samples_of[v][-1].append(flat[places[v]])
        for v, samples in samples_of.items():
            matrix = torch.stack([torch.cat(parts) for parts in samples]).double()
            self._products[v] = matrix @ matrix.T

    def _is_everywhere(self, branch: int) -> bool:
        return all((step, branch) in self.loop.calls for step in range(self.loop.steps))

    def weights(self, value: fx.Node, step: int, sources: Sequence[int]) -> list[float]:
        """Return the weights w that minimise |v@step - sum w[k] v@sources[k]|^2 over all calls.

        The normal equations are solved with the Gram matrix that `fit` has accumulated.
        """
        products, at = self._products[value], torch.tensor(sources)
        gram, right = products[at][:, at], products[at, step]
        # Nearly equal values make the system singular: the ridge pulls the weights to plain reuse.
        ridge = 1e-6 * float(gram.diagonal().mean()) or 1.0
        right[0] += ridge
        gram = gram + ridge * torch.eye(len(sources), dtype=gram.dtype)
        return [float(w) for w in torch.linalg.solve(gram, right)]

    def reuses(self, cut: Sequence[fx.Node], step: int, sources: Sequence[int]) -> list[Reuse]:
        """Return a step's reuses of a cut's values from computed steps, the last one first."""
        return [
            Reuse(value, tuple(map(Term, sources, self.weights(value, step, sources))))
            for value in cut
        ]

    def cut_errors(self, cut: Sequence[fx.Node], max_gap: int) -> CutErrors:
        """Return the error of the body's results if a cut is reused, by step and source steps.

        It is the norm of the change, over branches, for sources at most `max_gap` steps apart.
        Between measured steps it is interpolated.
        """
        measured: dict[tuple[int, int], list[tuple[int, float]]] = {}
        probes = self._probes(_PROBES, begin=2)
        values: dict[int, dict[tuple[int, int], Values]] = {}  # of the steps near the probe
        with torch.no_grad():
            for index, step in enumerate(probes):
                self.progress("measuring cuts", index / len(probes))
                window = range(max(0, step - 2 * max_gap), step + 1)
                values = {at: values.get(at) or self._values(at, cut) for at in window}
                for last, before in _pairs(step, max_gap):
                    error = self._error(cut, step, (last, before), values)
                    measured.setdefault((step - last, last - before), []).append((step, error))
        curves = {gaps: _interpolate(at, self.loop.steps) for gaps, at in measured.items()}
        return {
            (step, last, before): curves[step - last, last - before][step]
            for step in range(2, self.loop.steps)
            for last, before in _pairs(step, max_gap)
            if (step - last, last - before) in curves and self._has(step, (last, before))
        }

    def _has(self, step: int, sources: Sequence[int]) -> bool:
        """Tell whether the sources have a call of each branch that the step has one of."""
        branches = [b for b in range(self.loop.branches) if (step, b) in self.loop.calls]
        return all((source, b) in self.loop.calls for source in sources for b in branches)

    def _values(self, step: int, cut: Sequence[fx.Node]) -> dict[tuple[int, int], Values]:
        """Return the results and a cut's values at a step, by call and branch, of a few calls."""
        return {
            (r, branch): self.body.run(arguments[at, branch], keep=cut)
            for r, arguments in enumerate(self._arguments[:_FEW])
            for at, branch in arguments
            if at == step
        }

    def _error(
        self,
        cut: Sequence[fx.Node],
        step: int,
        sources: Sequence[int],
        values: Mapping[int, Mapping[tuple[int, int], Values]],
    ) -> float:
        weights = {v: self.weights(v, step, sources) for v in cut}
        error = 0.0
        for (request, branch), exact in values[step].items():
            past = [values[source].get((request, branch)) for source in sources]
            reused = {
                v: sum(w * old[v] for w, old in zip(factors, past, strict=True) if old is not None)
                for v, factors in weights.items()
            }
            changed = self.body.run(self._arguments[request][step, branch], reused)  # type: ignore[arg-type]
            error += _square(
                [changed[r] for r in self.body.results], [exact[r] for r in self.body.results]
            )
        return float((error / min(_FEW, len(self.inputs))) ** 0.5)

    def plan_error(self, plan: Plan, limit: float = math.inf) -> float:
        """Return the relative error of the outputs of the whole program under a plan.

        Args:
            plan: The reuses of each step.
            limit: An error above it is returned as infinity, without running all requests.
        """
        norm = sum(map(_square, self._results)) or 1.0
        total = 0.0
        # The requests with the largest errors under other plans exceed the limit soonest.
        for request in sorted(range(len(self.inputs)), key=lambda r: -self._hardness[r]):
            if total > limit**2 * norm:
                return math.inf
            request_error = _square(self._planned(request, plan), self._results[request])
            self._hardness[request] += request_error
            total += request_error
        return float((total / norm) ** 0.5)

    def _planned(self, request: int, plan: Plan) -> list[Tensor]:
        """Return the outputs of a call under a plan."""
        reused = {reuse.value for reuses in plan.values() for reuse in reuses}
        past: dict[CallKey, Values] = {}

        def visit(key: CallKey, arguments: list[Tensor]) -> Values:
            step, branch = key
            replaced = {
                r.value: sum(t.weight * past[t.step, branch][r.value] for t in r.terms)
                for r in plan.get(step, ())
            }
            values = self.body.run(arguments, replaced, keep=() if replaced else reused)  # type: ignore[arg-type]
            past[key] = values
            return values

        return self._run(self.inputs[request], visit)

    def _probes(self, count: int, begin: int) -> list[int]:
        """Return steps spread evenly over the loop, the last one among them."""
        end = self.loop.steps - 1
        count = min(count, end - begin + 1)
        return sorted({round(end - k * (end - begin) / max(1, count - 1)) for k in range(count)})


def _pairs(step: int, max_gap: int) -> Iterator[tuple[int, int]]:
    """Yield the two last computed steps before a step, with gaps of at most `max_gap`."""
    for last in range(max(1, step - max_gap), step):
        for before in range(max(0, last - max_gap), last):
            yield last, before


def _sample(count: int) -> Tensor:
    """Return indices of a random sample of a value's elements, or of all if they are few."""
    if count <= _SAMPLE:
        return torch.arange(count)
    return torch.randint(count, (_SAMPLE,), generator=torch.Generator().manual_seed(0))


def _square(tensors: Sequence[Tensor], others: Sequence[Tensor] | None = None) -> float:
    """Return the sum of the squares of all elements, or of their differences."""
    total = 0.0
    for index, tensor in enumerate(tensors):
        difference = tensor.double() if others is None else tensor.double() - others[index].double()
        total += float(difference.abs().square().sum())
    return total


def _interpolate(known: Sequence[tuple[int, float]], count: int) -> list[float]:
    """Interpolate the logarithm linearly from known (place, value) to all of `count` places."""
    places = torch.tensor([float(place) for place, _ in known])
    logs = torch.tensor([max(value, 1e-12) for _, value in known]).log()
    result = []
    for index in range(count):
        right = int(torch.searchsorted(places, float(index)).clamp(1, max(1, len(known) - 1)))
        left = max(0, right - 1)
        right = min(right, len(known) - 1)
        width = float(places[right] - places[left])
        part = min(1.0, max(0.0, (index - float(places[left])) / width)) if width else 0.0
        result.append(float((logs[left] + part * (logs[right] - logs[left])).exp()))
    return result
