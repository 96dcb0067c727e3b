"""Choose what to reuse, where and when, by optimization on the traced graph.

1. Each value of the denoiser is taken from the step before, alone, on some calibration calls: that
   gives an error a value. Minimum cuts of FLOPs against these errors, at several prices, give the
   sets of values that are worth taking together (`mincut`); no knowledge of modules goes in. The
   denoiser's results are such a set too: then a step computes nothing, as in a multistep solver
   whose weights are those of this model.
2. A value that is taken is a weighted sum of what it was in the last few computed steps, with the
   weights of least squares over the calibration calls. For each cut, and steps with two computed
   steps near before them, the error of the denoiser's results is measured; how much an error of
   each step shows in the output is measured too.
3. A shortest path over the steps gives the best schedules for all budgets (`schedule`). Errors do
   not simply add up: the best few are run, and the true error of the output decides; then computed
   steps are moved about as long as that helps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from diffopt import spec
from diffopt.analysis.denoiser_structure import DenoiserStructure
from diffopt.caching import mincut, schedule_search
from diffopt.caching.apply_plan import Plan, Reuse, Term
from diffopt.caching.error_model import Lab
from diffopt.caching.policy import Policy, option
from diffopt.caching.schedule_search import Kind, Schedule
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

    def plan(self, loop: Loop, parts: DenoiserStructure, ctx: Context) -> Plan:
        """Measure, choose, check."""
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
        found = trajectories.cached(key, lambda: self._search(loop, inputs, ctx))
        if len(found["plan"]):
            error, predicted, cost = found["result"].tolist()
            ctx.note("calibration", {"error": error, "predicted": predicted, "FLOPs": cost})
        return _plan(loop, found["plan"])

    def _search(
        self, loop: Loop, inputs: Sequence[Sequence[Tensor]], ctx: Context
    ) -> dict[str, Tensor]:
        """Return the best plan as a table, and its error, the predicted one and its FLOPs."""
        lab = Lab(loop, inputs, ctx.progress)
        cuts = self._cuts(loop, lab)
        if not cuts:
            return _found(loop, {})
        lab.study(v for cut in cuts for v in cut)
        effects, full = lab.effects(), loop.flops()
        kinds = [
            Kind(
                loop.flops(cut) / full,
                {
                    (step, last, before): (effects[step] * error) ** 2
                    for (step, last, before), error in lab.errors(cut, self.reach).items()
                    # So that the first steps leave as many computed ones as there are terms.
                    if before >= self.terms - 2
                },
            )
            for cut in cuts
        ]
        schedules = sorted(self._schedules(kinds, loop.steps), key=lambda s: (s.cost, s.error))
        search = _Search(lab, cuts, kinds, self.terms, self.trials)
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
        return _found(loop, search.plan(best), search.error(best), best.error**0.5, best.cost)

    def _cuts(self, loop: Loop, lab: Lab) -> list[list[fx.Node]]:
        """Return the sets of values that are worth taking together."""
        nodes = [n for n in loop.body.graph.nodes if n.op == "call_function"]
        costs = {n: float(loop.cost([n])) for n in nodes}
        found = mincut.cuts(nodes, lab.body.results, costs, lab.value_errors(), 16)
        # Of cuts that save about the same the last, which takes the fewest values, stands for all.
        full, results = loop.flops(), list(dict.fromkeys(lab.body.results))
        kept = {round(20 * loop.flops(cut) / full): cut for cut in found if cut}
        if all(n.op == "call_function" and n.meta["val"].is_floating_point() for n in results):
            kept[0] = results
        return [cut for part, cut in kept.items() if part < 19]

    def _schedules(self, kinds: Sequence[Kind], steps: int) -> Iterator[Schedule]:
        """Yield good schedules of few kinds, with the numbers of the kinds in `kinds`."""
        few = min(self.max_bodies - 1, len(kinds))
        for chosen in itertools.combinations(range(len(kinds)), few):
            for found in schedule_search.front([kinds[k] for k in chosen], steps):
                own = tuple(None if k is None else chosen[k] for k in found.kinds)
                yield Schedule(own, found.cost, found.error)


def _found(loop: Loop, plan: Plan, *result: float) -> dict[str, Tensor]:
    """Return a plan as tensors, to be kept on disk: a row for each term."""
    rows = [
        [step, loop.positions[reuse.value], term.step, term.weight]
        for step, own in plan.items()
        for reuse in own
        for term in reuse.terms
    ]
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)
    return {"plan": table, "result": torch.tensor(result, dtype=torch.float64)}


def _plan(loop: Loop, table: Tensor) -> dict[int, list[Reuse]]:
    """Return the plan in a table."""
    nodes = list(loop.body.graph.nodes)
    terms: dict[int, dict[fx.Node, list[Term]]] = {}
    for step, place, source, weight in table.tolist():
        own = terms.setdefault(int(step), {})
        own.setdefault(nodes[int(place)], []).append(Term(int(source), weight))
    return {
        step: [Reuse(value, tuple(parts)) for value, parts in own.items()]
        for step, own in terms.items()
    }


class _Search:
    """Schedules with their true errors, each measured once."""

    def __init__(
        self,
        lab: Lab,
        cuts: Sequence[Sequence[fx.Node]],
        kinds: Sequence[Kind],
        terms: int,
        trials: int,
    ) -> None:
        self.lab = lab
        self.cuts = cuts
        self.kinds = kinds
        self.terms = terms
        self.trials = trials
        self._errors: dict[Schedule, float] = {}

    def plan(self, chosen: Schedule) -> dict[int, list[Reuse]]:
        """Return what each step takes."""
        plan: dict[int, list[Reuse]] = {}
        for step, kind in enumerate(chosen.kinds):
            if kind is not None:
                sources = [s for s in chosen.computed if s < step][: -self.terms - 1 : -1]
                plan[step] = self.lab.reuses(self.cuts[kind], step, sources)
        return plan

    def error(self, chosen: Schedule, limit: float = math.inf) -> float:
        """Return the true error of the output; infinity if that is known to be above a limit."""
        if chosen not in self._errors:
            done = len(self._errors)
            self.lab.progress("checking schedules", min(1.0, done / self.trials))
            self._errors[chosen] = self.lab.error(self.plan(chosen), limit)
        return self._errors[chosen]

    def _best(self, schedules: Iterable[Schedule]) -> Schedule | None:
        """Return the schedule of the least true error."""
        best, least = None, math.inf
        for chosen in schedules:
            if (error := self.error(chosen, least)) < least:
                best, least = chosen, error
        return best

    def best(self, found: Sequence[Schedule], cost: float) -> Schedule | None:
        """Return the schedule of the least true error whose cost is at most `cost`."""
        filled = {self._fill(s, cost) for s in found if s.cost <= cost}
        best = self._best([*self._likely(filled, 4), *self._even(cost)])
        return None if best is None else self._move(best, cost)

    def cheapest(self, found: Sequence[Schedule], budget: float) -> Schedule | None:
        """Return the cheapest schedule whose true error is within the budget."""
        low, high = min(s.cost for s in found), 1.0
        best: Schedule | None = None
        for _ in range(6):  # halving the range of costs
            middle = (low + high) / 2
            filled = {self._fill(s, middle) for s in found if s.cost <= middle}
            tried = self._best([*self._likely(filled, 12), *self._even(middle)])
            if tried is not None and self.error(tried) <= budget:
                best, high = tried, middle
            else:
                low = middle
        return best

    def _likely(self, schedules: Iterable[Schedule], part: int) -> list[Schedule]:
        """Return those of the least predicted error, as many as a part of all trials."""
        return sorted(schedules, key=lambda s: s.error)[: max(1, self.trials // part)]

    def _even(self, cost: float) -> Iterator[Schedule]:
        """Yield for each kind the schedule that computes evenly spaced steps at this cost.

        What is measured on few calls may mislead; nothing can about this one.
        """
        steps = self.lab.loop.steps
        for index, kind in enumerate(self.kinds):
            count = int((cost - kind.cost) * steps / (1.0 - kind.cost))  # computed steps
            if count <= self.terms:
                continue
            apart = (steps - self.terms) / (count - self.terms)
            late = {round(steps - 1 - k * apart) for k in range(count - self.terms)}
            choice = [None if s < self.terms or s in late else index for s in range(steps)]
            if (
                made := schedule_search.evaluate(self.kinds, choice)
            ) is not None and made.cost <= cost:
                yield made

    def _fill(self, chosen: Schedule, cost: float) -> Schedule:
        """Compute more of a schedule, what helps most first, as long as the cost allows it."""
        while True:
            more = [s for s in self._neighbours(chosen, (None,)) if s.cost <= cost]
            better = min(more, key=lambda s: s.error, default=chosen)
            if better.error >= chosen.error:
                return chosen
            chosen = better

    def _move(self, chosen: Schedule, cost: float) -> Schedule:
        """Change two steps at a time as long as the true error falls and trials are left."""
        improved = True
        while improved and len(self._errors) < self.trials:
            improved = False
            near = {
                two
                for one in self._neighbours(chosen, (None, *range(len(self.kinds))))
                for two in self._swaps(chosen, one)
                if two.cost <= cost and two not in self._errors
            }
            for other in sorted(near, key=lambda s: s.error)[: max(1, self.trials // 8)]:
                if len(self._errors) >= self.trials:
                    break
                if self.error(other, self.error(chosen)) < self.error(chosen):
                    chosen, improved = other, True
                    break
        return chosen

    def _swaps(self, chosen: Schedule, one: Schedule) -> Iterator[Schedule]:
        """Yield `one`, and what it becomes when a neighbouring step takes what its change gave."""
        yield one
        (step,) = [
            i for i, (a, b) in enumerate(zip(chosen.kinds, one.kinds, strict=True)) if a != b
        ]
        for other in (step - 1, step + 1):
            if 2 <= other < len(one.kinds):
                kinds = list(one.kinds)
                kinds[other] = chosen.kinds[step]
                if (made := schedule_search.evaluate(self.kinds, kinds)) is not None:
                    yield made

    def _neighbours(self, chosen: Schedule, kinds: Sequence[int | None]) -> Iterator[Schedule]:
        """Yield what a schedule becomes when one step is of another kind."""
        used = {None, *chosen.kinds}
        for step in range(2, len(chosen.kinds)):
            for kind in kinds:
                if kind != chosen.kinds[step] and kind in used:
                    own = list(chosen.kinds)
                    own[step] = kind
                    if (made := schedule_search.evaluate(self.kinds, own)) is not None:
                        yield made
