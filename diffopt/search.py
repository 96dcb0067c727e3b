"""Measures what taking values from earlier steps does to a program's outputs, on calibration calls.

All numbers are relative to the exact program on the same inputs. A body is evaluated only as far as
what is asked for needs it, which is what makes hundreds of trials affordable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from diffopt import graph as g
from diffopt import rewrite
from diffopt.loop import Key, Loop
from diffopt.reuse import Reuse, Term
from diffopt.tables import is_view

aten = torch.ops.aten

Report = Callable[[str, float | None], None]
Values = dict[fx.Node, Tensor]

# At how many steps effects are measured; between them they are interpolated.
_PROBES = 12
# Of the results' size: enough to be far above rounding.
_NOISE = 0.05
# On how many calls, where more would cost much and tell little.
_FEW = 2
_SUMS = (aten.add.Tensor, aten.cat.default)


class Evaluator:
    """Runs a body, or the part of it that is needed."""

    def __init__(self, body: fx.GraphModule) -> None:
        self.results = g.outputs(body)
        self._takes = g.placeholders(body)
        self._nodes = [n for n in body.graph.nodes if n.op == "call_function"]
        self._constants: Values = {
            n: g.attribute(body, str(n.target)) for n in body.graph.nodes if n.op == "get_attr"
        }
        self._orders: dict[Any, list[fx.Node]] = {}

    def run(
        self,
        arguments: Sequence[Tensor],
        given: Mapping[fx.Node, Tensor] | None = None,
        keep: Iterable[fx.Node] = (),
        known: Mapping[fx.Node, Tensor] | None = None,
    ) -> Values:
        """Return the results and the values of `keep`, by node.

        Args:
            arguments: Of the body.
            given: Values that are not computed.
            keep: What to return beside the results.
            known: All values for the same arguments without `given`, to use where that changes
                nothing.
        """
        given = given or {}
        wanted = [*self.results, *keep]
        env: dict[fx.Node, Any] = {**self._constants}
        env.update(zip(self._takes, arguments, strict=True))
        env.update(given)
        for node in self._order(frozenset(given), tuple(wanted), known is not None):
            args, kwargs = fx.map_arg(
                (node.args, node.kwargs),
                lambda n: env[n] if n in env else known[n],  # type: ignore[index]
            )
            env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return {n: env[n] if n in env else known[n] for n in wanted}  # type: ignore[index]

    def everything(self, arguments: Sequence[Tensor]) -> Values:
        """Return all values."""
        return self.run(arguments, keep=self._nodes)

    def _order(
        self, given: frozenset[fx.Node], wanted: tuple[fx.Node, ...], is_partial: bool
    ) -> list[fx.Node]:
        key = given, wanted, is_partial
        if key not in self._orders:
            changed = (g.descendants(given) if is_partial else set(self._nodes)) - given
            needed = g.reach(
                changed.intersection(wanted), lambda n: changed.intersection(n.all_input_nodes)
            )
            self._orders[key] = [n for n in self._nodes if n in needed]
        return self._orders[key]


@dataclass(frozen=True)
class Fit:
    """How a step can take the values of a cut from two earlier steps.

    Attributes:
        weights: For each value of the cut, of the last computed step and of the one before.
        error: The norm of what that changes of the body's results, over requests and branches.
    """

    weights: list[tuple[float, float]]
    error: float


Fits = dict[tuple[int, int, int], Fit]
"""By the step, the last computed one, and the one before."""


class Lab:
    """A loop on calibration calls, with everything that can be measured of it."""

    def __init__(self, loop: Loop, inputs: Sequence[Sequence[Tensor]], report: Report) -> None:
        self.loop = loop
        self.inputs = inputs
        self.report = report
        self.body = Evaluator(loop.body)
        self._keys = {call: key for key, call in loop.calls.items()}
        self._arguments: list[dict[Key, list[Tensor]]] = []
        self._results: list[list[Tensor]] = []
        for index, tensors in enumerate(inputs):
            report(f"calibration: call {index + 1} of {len(inputs)}", None)
            arguments: dict[Key, list[Tensor]] = {}

            def exact(
                key: Key, given: list[Tensor], arguments: dict[Key, list[Tensor]] = arguments
            ) -> Values:
                arguments[key] = given
                return self.body.run(given)

            self._results.append(self._run(tensors, exact))
            self._arguments.append(arguments)

    def _run(
        self, inputs: Sequence[Tensor], visit: Callable[[Key, list[Tensor]], Values]
    ) -> list[Tensor]:
        """Run the program with `visit` in place of the loop's calls."""
        keys, results = self._keys, self.body.results

        class Run(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                if n not in keys:
                    return super().run_node(n)
                given, _ = self.fetch_args_kwargs_from_env(n)
                made = visit(keys[n], list(given))
                return tuple(made[r] for r in results)

        with torch.no_grad():
            made: list[Tensor] = list(Run(self.loop.program.root).run(*inputs))
        return made

    @cached_property
    def candidates(self) -> list[fx.Node]:
        """The values worth taking: what costly operators and sums give that changes in the loop."""
        takes = g.placeholders(self.loop.body)
        calls = list(self.loop.calls.values())
        changing = [t for i, t in enumerate(takes) if len({c.args[i] for c in calls}) > 1]
        nodes = g.descendants(changing)
        return [
            n
            for n in self.loop.body.graph.nodes
            if n in nodes
            and n.op == "call_function"
            and isinstance(n.meta["val"], Tensor)
            and not is_view(n)
            and (self.loop.cost([n]) or rewrite.calls(n, *_SUMS))
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
                self.report("measuring values", index / len(probes))
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

        The change tried is a little noise, at some steps of two calls; in between the logarithm is
        interpolated.
        """
        known: list[tuple[int, float]] = []
        probes = self._probes(_PROBES, begin=1)
        for index, probe in enumerate(probes):
            self.report("measuring steps", index / len(probes))
            moved = changed = 0.0
            for request in range(min(_FEW, len(self.inputs))):
                more = self._disturb(request, probe)
                moved, changed = moved + more[0], changed + more[1]
            known.append((probe, (moved / changed) ** 0.5 if changed else 0.0))
        return _interpolate(known, self.loop.steps)

    def _disturb(self, request: int, probe: int) -> tuple[float, float]:
        """Add noise to the results of a step; return what that changes of the outputs.

        Both numbers are squares: of the outputs' relative change, and of the change of the results.
        """
        noise = torch.Generator().manual_seed(probe)
        changed = 0.0

        def visit(key: Key, given: list[Tensor]) -> Values:
            nonlocal changed
            made = self.body.run(given)
            if key[0] != probe:
                return made
            other = {}
            for node, value in made.items():
                size = _NOISE * float(value.float().square().mean()) ** 0.5
                other[node] = value + size * torch.randn(value.shape, generator=noise).to(value)
            changed += _square(list(other.values()), list(made.values()))
            return other

        outputs, exact = self._run(self.inputs[request], visit), self._results[request]
        return _square(outputs, exact) / (_square(exact) or 1.0), changed

    def fits(self, cuts: Sequence[Sequence[fx.Node]], reach: int) -> list[Fits]:
        """Return, for each cut, how steps can take it from steps at most `reach` apart.

        Weights are those of least squares over all calls, one pair for each value.
        """
        union = list(dict.fromkeys(v for cut in cuts for v in cut))
        window: dict[int, dict[tuple[int, int], Values]] = {}
        found: list[Fits] = [{} for _ in cuts]
        with torch.no_grad():
            for step in range(self.loop.steps):
                self.report("fitting", step / self.loop.steps)
                window[step] = {
                    (r, key[1]): self.body.run(arguments[key], keep=union)
                    for r, arguments in enumerate(self._arguments)
                    for key in arguments
                    if key[0] == step
                }
                window.pop(step - 2 * reach - 1, None)
                for last in range(max(1, step - reach), step):
                    for before in range(max(0, last - reach), last):
                        if not window[step].keys() <= window[last].keys() & window[before].keys():
                            continue
                        for cut, fits in zip(cuts, found, strict=True):
                            rows = window[step], window[last], window[before]
                            fits[step, last, before] = self._fit(step, cut, *rows)
        return found

    def _fit(
        self,
        step: int,
        cut: Sequence[fx.Node],
        now: Mapping[tuple[int, int], Values],
        last: Mapping[tuple[int, int], Values],
        before: Mapping[tuple[int, int], Values],
    ) -> Fit:
        weights = [_least_squares(v, now, last, before) for v in cut]
        error = 0.0
        few = [key for key in now if key[0] < _FEW]
        for request, branch in few:
            values = now[request, branch]
            one, two = last[request, branch], before[request, branch]
            given = {v: a * one[v] + b * two[v] for v, (a, b) in zip(cut, weights, strict=True)}
            made = self.body.run(self._arguments[request][step, branch], given)
            results = self.body.results
            error += _square([made[r] for r in results], [values[r] for r in results])
        return Fit(weights, (error / min(_FEW, len(self.inputs))) ** 0.5)

    def error(self, plan: Mapping[int, Sequence[Reuse]]) -> float:
        """Return the relative error of the outputs of the whole program under a plan."""
        kept = {reuse.value for own in plan.values() for reuse in own}
        wrong = norm = 0.0
        for tensors, exact in zip(self.inputs, self._results, strict=True):
            past: dict[Key, Values] = {}

            def visit(key: Key, arguments: list[Tensor], past: dict[Key, Values] = past) -> Values:
                step, branch = key
                given = {
                    r.value: sum(t.weight * past[t.step, branch][r.value] for t in r.terms)
                    for r in plan.get(step, ())
                }
                made = self.body.run(arguments, given, keep=() if given else kept)  # type: ignore[arg-type]
                past[key] = made
                return made

            wrong += _square(self._run(tensors, visit), exact)
            norm += _square(exact)
        return float((wrong / norm) ** 0.5) if norm else 0.0

    def _probes(self, count: int, begin: int) -> list[int]:
        """Return steps spread evenly over the loop."""
        left = self.loop.steps - begin
        count = min(count, left)
        return sorted({begin + (2 * k + 1) * left // (2 * count) for k in range(count)})


def reuses(cut: Sequence[fx.Node], fit: Fit, last: int, before: int) -> list[Reuse]:
    """Return what a step takes of a cut from two computed steps."""
    made = []
    for value, weights in zip(cut, fit.weights, strict=True):
        terms = [Term(step, w) for step, w in zip((last, before), weights, strict=True) if w]
        made.append(Reuse(value, tuple(terms) or (Term(last, 0.0),)))
    return made


def _least_squares(
    value: fx.Node,
    now: Mapping[tuple[int, int], Values],
    last: Mapping[tuple[int, int], Values],
    before: Mapping[tuple[int, int], Values],
) -> tuple[float, float]:
    """Return the weights of two values whose sum is nearest to a third, over all calls."""
    aa = ab = bb = ay = by = 0.0
    for key, values in now.items():
        y, a, b = (rows[value].flatten().double() for rows in (values, last[key], before[key]))
        aa, ab, bb = aa + float(a @ a), ab + float(a @ b), bb + float(b @ b)
        ay, by = ay + float(a @ y), by + float(b @ y)
    # Nearly equal values have no two weights of their own: then plain reuse is kept in sight.
    ridge = 1e-6 * (aa + bb) or 1.0
    ay, aa, bb = ay + ridge, aa + ridge, bb + ridge
    determinant = aa * bb - ab * ab
    return (bb * ay - ab * by) / determinant, (aa * by - ab * ay) / determinant


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
