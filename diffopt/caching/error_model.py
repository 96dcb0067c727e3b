"""Measures what taking values from earlier steps does to a program's outputs, on calibration calls.

Errors are those against the exact program on the same inputs. A body is evaluated only as far as
what is asked for needs it, which is what makes hundreds of trials affordable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, fx

from diffopt.caching.apply_plan import Plan, Reuse, Term
from diffopt.execution.partial_evaluation import Evaluator, Values
from diffopt.execution.trajectories import run_root
from diffopt.ir import graph as g
from diffopt.ir.nodes import is_call
from diffopt.ir.sampling_loop import CallKey, Loop
from diffopt.ir.step_tables import is_view
from diffopt.progress import Progress

aten = torch.ops.aten


# At how many steps errors and effects are measured; between them they are interpolated.
_PROBES = 12
# On how many calls, where more would cost much and tell little.
_FEW = 4
# Of one value in one call: enough for a few weights, and little enough to keep every step.
_SAMPLE = 2**14
_SUMS = (aten.add.Tensor, aten.cat.default)


Errors = dict[tuple[int, int, int], float]
"""By the step, the last computed one, and the one before."""


class Lab:
    """A loop on calibration calls, with everything that can be measured of it."""

    def __init__(self, loop: Loop, inputs: Sequence[Sequence[Tensor]], progress: Progress) -> None:
        self.loop = loop
        self.inputs = inputs
        self.progress = progress
        self.body = Evaluator(loop.body)
        self._keys = {call: key for key, call in loop.calls.items()}
        self._arguments: list[dict[CallKey, list[Tensor]]] = []
        self._results: list[list[Tensor]] = []
        self._products: dict[fx.Node, Tensor] = {}
        self._hardness = [0.0] * len(inputs)
        for index, tensors in enumerate(inputs):
            progress(f"calibration: call {index + 1} of {len(inputs)}", None)
            arguments: dict[CallKey, list[Tensor]] = {}

            def exact(
                key: CallKey,
                given: list[Tensor],
                arguments: dict[CallKey, list[Tensor]] = arguments,
            ) -> Values:
                arguments[key] = given
                return self.body.run(given)

            self._results.append(self._run(tensors, exact))
            self._arguments.append(arguments)

    def _run(
        self, inputs: Sequence[Tensor], visit: Callable[[CallKey, list[Tensor]], Values]
    ) -> list[Tensor]:
        """Run the program with `visit` in place of the loop's calls."""

        def results(call: fx.Node, given: Sequence[Tensor]) -> list[Tensor] | None:
            if call not in self._keys:
                return None
            made = visit(self._keys[call], list(given))
            return [made[r] for r in self.body.results]

        return run_root(self.loop.program, inputs, results)

    @cached_property
    def candidates(self) -> list[fx.Node]:
        """The values worth taking: what costly operators and sums give that changes in the loop."""
        takes = g.placeholders(self.loop.body)
        sites = list(self.loop.calls.values())
        changing = [t for i, t in enumerate(takes) if len({c.args[i] for c in sites}) > 1]
        nodes = g.descendants(changing)
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
        """Return how far the body's results go astray if one value is of the step before.

        That is the squared relative error, a mean over some steps and two calls.
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
                        made = self.body.run(
                            arguments[step, branch], {value: before[value]}, known=known
                        )
                        got = [made[r] for r in self.body.results]
                        total[value] += _square(got, exact) / norm
        return {value: error / max(1, count) for value, error in total.items()}

    def effects(self) -> list[float]:
        """Return how much a change of the body's results at each step changes the outputs.

        The change tried is that of extrapolating them, at some steps of a few calls; in between the
        logarithm is interpolated.
        """
        self.study(self.body.results)
        known: list[tuple[int, float]] = []
        probes = self._probes(_PROBES, begin=2)
        for index, probe in enumerate(probes):
            self.progress("measuring steps", index / len(probes))
            moved = changed = 0.0
            for request in range(min(_FEW, len(self.inputs))):
                more = self._disturb(request, probe)
                moved, changed = moved + more[0], changed + more[1]
            known.append((probe, (moved / changed) ** 0.5 if changed else 0.0))
        return _interpolate(known, self.loop.steps)

    def _disturb(self, request: int, probe: int) -> tuple[float, float]:
        """Extrapolate the results of a step; return what that changes of the outputs.

        Both numbers are squares: of the outputs' relative change, and of the change of the results.
        """
        past: dict[CallKey, Values] = {}
        changed = 0.0
        # Not from the step before: the change should be well above rounding.
        sources = [s for s in (probe - 2, probe - 3, probe - 4) if s >= 0]

        def visit(key: CallKey, given: list[Tensor]) -> Values:
            nonlocal changed
            made = past[key] = self.body.run(given)
            step, branch = key
            if step != probe or not self._has(probe, sources):
                return made
            other = {}
            for value in made:
                weights = self.weights(value, probe, sources)
                parts = zip(weights, sources, strict=True)
                other[value] = torch.stack([w * past[s, branch][value] for w, s in parts]).sum(0)
            changed += _square(list(other.values()), list(made.values()))
            return other

        outputs, exact = self._run(self.inputs[request], visit), self._results[request]
        return _square(outputs, exact) / (_square(exact) or 1.0), changed

    def study(self, values: Iterable[fx.Node]) -> None:
        """Learn what `weights` needs to know of values: how they resemble themselves over steps.

        That is the scalar products of a value at any two steps, summed over all calls. Of large
        values some elements stand for all.
        """
        values = [v for v in dict.fromkeys(values) if v not in self._products]
        branches = {b for b in range(self.loop.branches) if self._is_everywhere(b)} or {0}
        rows: dict[fx.Node, list[list[Tensor]]] = {v: [] for v in values}
        places = {v: _sample(v.meta["val"].numel()) for v in values}
        with torch.no_grad():
            for step in range(self.loop.steps if values else 0):
                self.progress("comparing steps", step / self.loop.steps)
                for own in rows.values():
                    own.append([])
                for arguments in self._arguments:
                    for branch in branches:
                        # A step without a call resembles none.
                        given = arguments.get((step, branch))
                        made = {} if given is None else self.body.run(given, keep=values)
                        for v in values:
                            flat = made[v].flatten() if made else torch.zeros(v.meta["val"].numel())
                            rows[v][-1].append(flat[places[v]])
        for v, own in rows.items():
            matrix = torch.stack([torch.cat(parts) for parts in own]).double()
            self._products[v] = matrix @ matrix.T

    def _is_everywhere(self, branch: int) -> bool:
        return all((step, branch) in self.loop.calls for step in range(self.loop.steps))

    def weights(self, value: fx.Node, step: int, sources: Sequence[int]) -> list[float]:
        """Return the weights with which a value at earlier steps is nearest to that at a step.

        They are those of least squares over all calls; `study` has to be done.
        """
        products, at = self._products[value], torch.tensor(sources)
        square, right = products[at][:, at], products[at, step]
        # Nearly equal values have no weights of their own: then plain reuse is kept in sight.
        ridge = 1e-6 * float(square.diagonal().mean()) or 1.0
        right[0] += ridge
        square = square + ridge * torch.eye(len(sources), dtype=square.dtype)
        return [float(w) for w in torch.linalg.solve(square, right)]

    def reuses(self, cut: Sequence[fx.Node], step: int, sources: Sequence[int]) -> list[Reuse]:
        """Return what a step takes of a cut from computed steps, the last one first."""
        return [
            Reuse(value, tuple(map(Term, sources, self.weights(value, step, sources))))
            for value in cut
        ]

    def errors(self, cut: Sequence[fx.Node], reach: int) -> Errors:
        """Return what taking a cut changes of the body's results, by where it is taken from.

        It is the norm of the change, over branches, for sources at most `reach` steps apart. Steps
        in between those measured are interpolated.
        """
        found: dict[tuple[int, int], list[tuple[int, float]]] = {}
        probes = self._probes(_PROBES, begin=2)
        values: dict[int, dict[tuple[int, int], Values]] = {}  # of the steps near the probe
        with torch.no_grad():
            for index, step in enumerate(probes):
                self.progress("measuring cuts", index / len(probes))
                near = range(max(0, step - 2 * reach), step + 1)
                values = {at: values.get(at) or self._values(at, cut) for at in near}
                for last, before in _pairs(step, reach):
                    error = self._error(cut, step, (last, before), values)
                    found.setdefault((step - last, last - before), []).append((step, error))
        known = {gaps: _interpolate(own, self.loop.steps) for gaps, own in found.items()}
        return {
            (step, last, before): known[step - last, last - before][step]
            for step in range(2, self.loop.steps)
            for last, before in _pairs(step, reach)
            if (step - last, last - before) in known and self._has(step, (last, before))
        }

    def _has(self, step: int, sources: Sequence[int]) -> bool:
        """Tell whether the sources have a call of each branch that the step has one of."""
        own = [b for b in range(self.loop.branches) if (step, b) in self.loop.calls]
        return all((source, b) in self.loop.calls for source in sources for b in own)

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
            given = {
                v: sum(w * row[v] for w, row in zip(own, past, strict=True) if row is not None)
                for v, own in weights.items()
            }
            made = self.body.run(self._arguments[request][step, branch], given)  # type: ignore[arg-type]
            error += _square(
                [made[r] for r in self.body.results], [exact[r] for r in self.body.results]
            )
        return float((error / min(_FEW, len(self.inputs))) ** 0.5)

    def error(self, plan: Plan, limit: float = math.inf) -> float:
        """Return the relative error of the outputs of the whole program under a plan.

        Args:
            plan: What each step takes.
            limit: Above it the error need not be known: infinity stands for all that is.
        """
        norm = sum(map(_square, self._results)) or 1.0
        wrong = 0.0
        # What went astray most under other plans comes first, as it tells soonest.
        for request in sorted(range(len(self.inputs)), key=lambda r: -self._hardness[r]):
            if wrong > limit**2 * norm:
                return math.inf
            own = _square(self._planned(request, plan), self._results[request])
            self._hardness[request] += own
            wrong += own
        return float((wrong / norm) ** 0.5)

    def _planned(self, request: int, plan: Plan) -> list[Tensor]:
        """Return the outputs of a call under a plan."""
        kept = {reuse.value for own in plan.values() for reuse in own}
        past: dict[CallKey, Values] = {}

        def visit(key: CallKey, arguments: list[Tensor]) -> Values:
            step, branch = key
            given = {
                r.value: sum(t.weight * past[t.step, branch][r.value] for t in r.terms)
                for r in plan.get(step, ())
            }
            made = self.body.run(arguments, given, keep=() if given else kept)  # type: ignore[arg-type]
            past[key] = made
            return made

        return self._run(self.inputs[request], visit)

    def _probes(self, count: int, begin: int) -> list[int]:
        """Return steps spread evenly over the loop, the last one among them."""
        end = self.loop.steps - 1
        count = min(count, end - begin + 1)
        return sorted({round(end - k * (end - begin) / max(1, count - 1)) for k in range(count)})


def _pairs(step: int, reach: int) -> Iterator[tuple[int, int]]:
    """Yield the computed step before a step and the one before that, as far as they may be."""
    for last in range(max(1, step - reach), step):
        for before in range(max(0, last - reach), last):
            yield last, before


def _sample(count: int) -> Tensor:
    """Return the places of some of a value's elements, or of all if they are few."""
    if count <= _SAMPLE:
        return torch.arange(count)
    return torch.randint(count, (_SAMPLE,), generator=torch.Generator().manual_seed(0))


def _square(tensors: Sequence[Tensor], others: Sequence[Tensor] | None = None) -> float:
    """Return the sum of the squares of all elements, or of their differences."""
    total = 0.0
    for index, tensor in enumerate(tensors):
        own = tensor.double() if others is None else tensor.double() - others[index].double()
        total += float(own.abs().square().sum())
    return total


def _interpolate(known: Sequence[tuple[int, float]], count: int) -> list[float]:
    """Return a number for each of `count` places, with the logarithm linear between known ones."""
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
