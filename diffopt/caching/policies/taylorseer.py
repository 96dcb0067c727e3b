"""TaylorSeer: extrapolate every attention's and MLP's output as a Taylor series over the steps.

Derivatives are finite differences of computed steps, so that a value is a sum of earlier values
with weights that are known at compile time.

Jiacheng Liu et al., From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers,
ICCV 2025 (2503.06923).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from diffopt.analysis.denoiser_structure import DenoiserStructure
from diffopt.caching.apply_plan import Loop, Plan, Reuse, Term
from diffopt.caching.policy import ATTENTION_AND_MLP, Needs, Policy, branch_values, option
from diffopt.core import Context
from diffopt.errors import DiffoptError

Weights = Mapping[int, float]


@dataclass(frozen=True)
class Taylorseer(Policy):
    """Continue every attention's and MLP's output as a Taylor series over the steps."""

    needs: ClassVar[Needs] = "branches"

    order: int = option(1, "highest derivative; 0 is plain reuse")
    interval: int = option(5, "compute every N steps")
    warm_up: int = option(3, "compute this many steps at the beginning")

    def __post_init__(self) -> None:
        if self.order < 0 or self.interval < 1 or self.warm_up < 1:
            raise DiffoptError("taylorseer wants order >= 0, interval >= 1 and warm-up >= 1")

    def plan(self, loop: Loop, structure: DenoiserStructure, ctx: Context) -> Plan:
        """Extrapolate the branches' outputs in front of their gates."""
        computed = schedule(loop.steps, self.interval, self.warm_up)
        plan: dict[int, list[Reuse]] = {}
        for step in sorted({*range(loop.steps)} - {*computed}):
            weights = extrapolate([c for c in computed if c < step], step, self.order)
            terms = tuple(Term(source, weight) for source, weight in weights.items())
            values = branch_values(structure, ATTENTION_AND_MLP)
            plan[step] = [Reuse(value, terms) for value, _ in values]
        return plan


def schedule(steps: int, interval: int, warm_up: int) -> list[int]:
    """Return the steps that compute: the first ones, then one an interval."""
    return [s for s in range(steps) if s < warm_up or (s - warm_up - 1) % interval == 0]


def extrapolate(computed: Sequence[int], step: int, order: int) -> Weights:
    """Return the weights of the values at computed steps in the series about the last of them.

    v(t) = sum over k of v^(k)(c) (t - c)^k / k!, where c is the last computed step and
    v^(k)(c_n) = (v^(k-1)(c_n) - v^(k-1)(c_(n-1))) / (c_n - c_(n-1)).
    """
    factors: list[Weights] = []  # derivatives by order, each as weights of computed values
    for k, source in enumerate(computed):
        new: list[Weights] = [{source: 1.0}]
        for known in factors[:order]:
            gap = source - computed[k - 1]
            steps = new[-1].keys() | known.keys()
            new.append({s: (new[-1].get(s, 0.0) - known.get(s, 0.0)) / gap for s in steps})
        factors = new
    ahead = step - computed[-1]
    total: dict[int, float] = {}
    for power, factor in enumerate(factors):
        for source, weight in factor.items():
            scaled = weight * ahead**power / math.factorial(power)
            total[source] = total.get(source, 0.0) + scaled
    return {source: total[source] for source in sorted(total) if total[source]}
