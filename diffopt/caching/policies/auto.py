"""Choose what to reuse, where and when, by optimization on the traced graph.

1. Each value of the denoiser is reused from the step before, alone, on some calibration calls: that
   is the error of the value. Minimum cuts of FLOPs against these errors, at several prices, are the
   sets of values that are worth reusing together (`mincut`); no knowledge of modules is used. The
   denoiser's results are such a set too: then a step computes nothing, as in a multistep solver
   whose weights are fitted to this model.
2. A reused value is a weighted sum of its values in the last few computed steps, with the weights
   of least squares over the calibration calls. For each cut, and steps with two computed steps
   close before them, the error of the denoiser's results is measured; so is the sensitivity of the
   output to an error at each step (`error_model`).
3. A shortest path over the steps finds the best schedules for all budgets (`schedule_search`).
   Errors do not simply add up: the best few are run, and the true error of the output decides; then
   computed steps are moved by local search as long as that helps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from diffopt import spec
from diffopt.analysis.denoiser_structure import DenoiserStructure
from diffopt.caching import mincut, schedule_search
from diffopt.caching.apply_plan import Plan, Reuse, Term
from diffopt.caching.error_model import ErrorModel
from diffopt.caching.policy import Policy, option
from diffopt.caching.schedule_search import ReuseMode, Schedule
from diffopt.core import Context
from diffopt.errors import DiffoptError
from diffopt.execution import trajectories
from diffopt.execution.calibration_inputs import representative
from diffopt.ir.sampling_loop import Loop


@dataclass(frozen=True)
class Auto(Policy):
    """Choose what to reuse, where and when, by optimization on calibration calls."""

    speedup: float | None = option(None, "how many times fewer FLOPs the denoiser is to take")
    calls: int = option(16, "calibration calls")
    terms: int = option(3, "computed steps that a value is taken from")
    reach: int = option(6, "most steps between one that computes everything and the next")
    max_bodies: int = option(3, "most bodies of the denoiser, the one with everything included")
    trials: int = option(40, "whole runs to check schedules with")

    def __post_init__(self) -> None:
        if self.speedup is not None and self.speedup <= 1:
            raise DiffoptError(f"speedup={self.speedup:g}: wants more than 1")
        if min(self.calls, self.reach, self.trials) < 1 or min(self.terms, self.max_bodies) < 2:
            raise DiffoptError("auto wants calls, reach, trials >= 1 and terms, max-bodies >= 2")

    def runs(self) -> float:
        """Return those of calls and of trials; the sensitivity of steps takes as many again."""
        return 2.0 * self.calls + self.trials

    def plan(self, loop: Loop, structure: DenoiserStructure, ctx: Context) -> Plan:
        """Measure errors, search schedules, and verify the best ones on whole runs."""
        budget = ctx.budget
        if (self.speedup is None) == (budget is None):
            raise DiffoptError("auto wants either speedup, as in speedup=2, or a budget of error")
        if loop.steps <= self.terms:
            return {}
        inputs = representative(
            f"cache({self.name})", loop.program, ctx.prompts, self.calls, ctx.seed
        )
        key = {
            "auto": 1,  # another number for another way to search
            **trajectories.loop_identity(loop.program, loop.calls, inputs),
            "options": spec.unparse("auto", self),
            "budget": budget,
        }
        best = trajectories.cached(key, lambda: self._search(loop, inputs, ctx))
        if len(best["plan"]):
            error, predicted, cost = best["result"].tolist()
            ctx.note("calibration", {"error": error, "predicted": predicted, "FLOPs": cost})
        return _as_plan(loop, best["plan"])

    def _search(
        self, loop: Loop, inputs: Sequence[Sequence[Tensor]], ctx: Context
    ) -> dict[str, Tensor]:
        """Return the best plan as a table, and [measured error, predicted error, FLOPs]."""
        model = ErrorModel(loop, inputs, ctx.progress)
        cuts = self._cuts(loop, model)
        if not cuts:
            return _as_tensors(loop, {})
        model.fit(v for cut in cuts for v in cut)
        sensitivity, full = model.output_sensitivity(), loop.flops()
        modes = [
            ReuseMode(
                loop.flops(cut) / full,
                {
                    (step, last, before): (sensitivity[step] * error) ** 2
                    for (step, last, before), error in model.cut_errors(cut, self.reach).items()
                    # Before the first reuse there are as many computed steps as terms.
                    if before >= self.terms - 2
                },
            )
            for cut in cuts
        ]
        schedules = sorted(self._schedules(modes, loop.steps), key=lambda s: (s.cost, s.error))
        search = _ScheduleSearch(model, cuts, modes, self.terms, self.trials)
        if self.speedup is not None:
            goal = f"speedup={self.speedup:g}"
            best = search.best(schedules, 1 / self.speedup)
        else:
            assert ctx.budget is not None
            goal = f"budget={ctx.budget:g}"
            best = search.cheapest(schedules, ctx.budget)
        if best is None:
            least = min(s.cost for s in schedules)
            raise DiffoptError(
                f"auto cannot meet {goal}: with reach={self.reach} the denoiser's FLOPs"
                f" can be cut to {least:.3g} of what they are"
            )
        return _as_tensors(loop, search.plan(best), search.error(best), best.error**0.5, best.cost)

    def _cuts(self, loop: Loop, model: ErrorModel) -> list[list[fx.Node]]:
        """Return the sets of values that are worth reusing together."""
        nodes = [n for n in loop.body.graph.nodes if n.op == "call_function"]
        costs = {n: float(loop.cost([n])) for n in nodes}
        cuts = mincut.cuts(nodes, model.body.results, costs, model.value_errors(), 16)
        # Of cuts that save about the same only the last is kept, which reuses the fewest values.
        full, results = loop.flops(), list(dict.fromkeys(model.body.results))
        by_saving = {round(20 * loop.flops(cut) / full): cut for cut in cuts if cut}
        if all(n.op == "call_function" and n.meta["val"].is_floating_point() for n in results):
            by_saving[0] = results
        return [cut for twentieths, cut in by_saving.items() if twentieths < 19]

    def _schedules(self, modes: Sequence[ReuseMode], steps: int) -> Iterator[Schedule]:
        """Yield Pareto-optimal schedules of few modes, by their indices in `modes`."""
        few = min(self.max_bodies - 1, len(modes))
        for chosen in itertools.combinations(range(len(modes)), few):
            for schedule in schedule_search.pareto_front([modes[k] for k in chosen], steps):
                numbered = tuple(None if k is None else chosen[k] for k in schedule.modes)
                yield Schedule(numbered, schedule.cost, schedule.error)


def _as_tensors(loop: Loop, plan: Plan, *result: float) -> dict[str, Tensor]:
    """Return a plan as a table [terms, 4] to be cached: step, value, source step, weight."""
    rows = [
        [step, loop.positions[reuse.value], term.step, term.weight]
        for step, reuses in plan.items()
        for reuse in reuses
        for term in reuse.terms
    ]
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)
    return {"plan": table, "result": torch.tensor(result, dtype=torch.float64)}


def _as_plan(loop: Loop, table: Tensor) -> dict[int, list[Reuse]]:
    """Return the plan of a table."""
    nodes = list(loop.body.graph.nodes)
    terms: dict[int, dict[fx.Node, list[Term]]] = {}
    for step, index, source, weight in table.tolist():
        of_value = terms.setdefault(int(step), {})
        of_value.setdefault(nodes[int(index)], []).append(Term(int(source), weight))
    return {
        step: [Reuse(value, tuple(parts)) for value, parts in of_value.items()]
        for step, of_value in terms.items()
    }


@dataclass(eq=False)
class _ScheduleSearch:
    """Search schedules by their true errors, each measured once; `cuts` are those of `modes`."""

    model: ErrorModel
    cuts: Sequence[Sequence[fx.Node]]
    modes: Sequence[ReuseMode]
    terms: int
    trials: int
    _errors: dict[Schedule, float] = field(default_factory=dict)

    def plan(self, chosen: Schedule) -> dict[int, list[Reuse]]:
        """Return the reuses of each step."""
        plan: dict[int, list[Reuse]] = {}
        for step, mode in enumerate(chosen.modes):
            if mode is not None:
                sources = [s for s in chosen.computed if s < step][: -self.terms - 1 : -1]
                plan[step] = self.model.reuses(self.cuts[mode], step, sources)
        return plan

    def error(self, chosen: Schedule, limit: float = math.inf) -> float:
        """Return the measured error of the output; infinity if it is above a limit."""
        if chosen not in self._errors:
            done = len(self._errors)
            self.model.progress("checking schedules", min(1.0, done / self.trials))
            self._errors[chosen] = self.model.plan_error(self.plan(chosen), limit)
        return self._errors[chosen]

    def _best(self, schedules: Iterable[Schedule]) -> Schedule | None:
        """Return the schedule of least measured error."""
        best, least = None, math.inf
        for chosen in schedules:
            if (error := self.error(chosen, least)) < least:
                best, least = chosen, error
        return best

    def best(self, schedules: Sequence[Schedule], cost: float) -> Schedule | None:
        """Return the schedule of least measured error whose cost is at most `cost`."""
        filled = {self._fill(s, cost) for s in schedules if s.cost <= cost}
        best = self._best([*self._likely(filled, 4), *self._even(cost)])
        return None if best is None else self._move(best, cost)

    def cheapest(self, schedules: Sequence[Schedule], budget: float) -> Schedule | None:
        """Return the cheapest schedule whose measured error is within the budget, by bisection."""
        low, high = min(s.cost for s in schedules), 1.0
        best: Schedule | None = None
        for _ in range(6):
            middle = (low + high) / 2
            filled = {self._fill(s, middle) for s in schedules if s.cost <= middle}
            tried = self._best([*self._likely(filled, 12), *self._even(middle)])
            if tried is not None and self.error(tried) <= budget:
                best, high = tried, middle
            else:
                low = middle
        return best

    def _likely(self, schedules: Iterable[Schedule], part: int) -> list[Schedule]:
        """Return the schedules of least predicted error, as many as `trials / part`."""
        return sorted(schedules, key=lambda s: s.error)[: max(1, self.trials // part)]

    def _even(self, cost: float) -> Iterator[Schedule]:
        """Yield for each mode the schedule that computes evenly spaced steps at this cost.

        It depends on no measurement, so that errors measured on few calls cannot mislead it.
        """
        steps = self.model.loop.steps
        for index, mode in enumerate(self.modes):
            count = int((cost - mode.cost) * steps / (1.0 - mode.cost))  # computed steps
            if count <= self.terms:
                continue
            apart = (steps - self.terms) / (count - self.terms)
            late = {round(steps - 1 - k * apart) for k in range(count - self.terms)}
            choice = [None if s < self.terms or s in late else index for s in range(steps)]
            even = schedule_search.evaluate(self.modes, choice)
            if even is not None and even.cost <= cost:
                yield even

    def _fill(self, chosen: Schedule, cost: float) -> Schedule:
        """Turn reused steps into computed ones, those that help most first, within the cost."""
        while True:
            more = [s for s in self._neighbours(chosen, (None,)) if s.cost <= cost]
            better = min(more, key=lambda s: s.error, default=chosen)
            if better.error >= chosen.error:
                return chosen
            chosen = better

    def _move(self, chosen: Schedule, cost: float) -> Schedule:
        """Change two steps at a time while the measured error falls and trials are left."""
        improved = True
        while improved and len(self._errors) < self.trials:
            improved = False
            near = dict.fromkeys(
                two
                for one in self._neighbours(chosen, (None, *range(len(self.modes))))
                for two in self._swaps(chosen, one)
                if two.cost <= cost and two not in self._errors
            )
            for other in sorted(near, key=lambda s: s.error)[: max(1, self.trials // 8)]:
                if len(self._errors) >= self.trials:
                    break
                if self.error(other, self.error(chosen)) < self.error(chosen):
                    chosen, improved = other, True
                    break
        return chosen

    def _swaps(self, chosen: Schedule, one: Schedule) -> Iterator[Schedule]:
        """Yield `one`, and the schedules in which its changed step swapped with a neighbour."""
        yield one
        (step,) = [
            i for i, (a, b) in enumerate(zip(chosen.modes, one.modes, strict=True)) if a != b
        ]
        for other in (step - 1, step + 1):
            if 2 <= other < len(one.modes):
                modes = list(one.modes)
                modes[other] = chosen.modes[step]
                if (schedule := schedule_search.evaluate(self.modes, modes)) is not None:
                    yield schedule

    def _neighbours(self, chosen: Schedule, modes: Sequence[int | None]) -> Iterator[Schedule]:
        """Yield the schedules that differ in one step, which has one of `modes`."""
        used = {None, *chosen.modes}
        for step in range(2, len(chosen.modes)):
            for mode in modes:
                if mode != chosen.modes[step] and mode in used:
                    modes_of_steps = [*chosen.modes[:step], mode, *chosen.modes[step + 1 :]]
                    schedule = schedule_search.evaluate(self.modes, modes_of_steps)
                    if schedule is not None:
                        yield schedule
