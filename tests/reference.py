"""The reference of caching: the uncached program, interpreted step by step with reuse."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.caching.apply_plan import Loop, Plan, Reuse

Record = dict[tuple[int, fx.Node], Tensor]


class Body(fx.Interpreter):
    """Interpret a body; values that `reuses` has are looked up in `record`, which grows."""

    def __init__(self, body: fx.GraphModule, step: int, plan: Plan, record: Record) -> None:
        super().__init__(body, garbage_collect_values=False)
        self.step, self.record = step, record
        self.reuses = {reuse.value: reuse for reuse in plan.get(step, ())}

    def run_node(self, n: fx.Node) -> Any:
        reuse = self.reuses.get(n)
        result = self.look_up(reuse) if reuse else super().run_node(n)
        if isinstance(result, Tensor):
            self.record[self.step, n] = result
        return result

    def look_up(self, reuse: Reuse) -> Tensor:
        if reuse.base is None and [term.weight for term in reuse.terms] == [1.0]:
            return self.record[reuse.terms[0].step, reuse.value]
        total: Any = 0.0
        for term in reuse.terms:
            value = self.record[term.step, reuse.value]
            if reuse.base is not None:
                value = value - self.record[term.step, reuse.base]
            total = total + term.weight * value
        return total if reuse.base is None else self.env[reuse.base] + total


class Root(fx.Interpreter):
    """Interpret a program, the calls of its loop with the reuses of a plan."""

    def __init__(self, loop: Loop, plan: Plan) -> None:
        super().__init__(loop.program.root)
        self.loop, self.plan = loop, plan
        self.keys = {call: key for key, call in loop.calls.items()}
        self.records: Mapping[int, Record] = {b: {} for b in range(loop.branches)}

    def run_node(self, n: fx.Node) -> Any:
        if n not in self.keys:
            return super().run_node(n)
        step, branch = self.keys[n]
        arguments, _ = self.fetch_args_kwargs_from_env(n)
        return Body(self.loop.body, step, self.plan, self.records[branch]).run(*arguments)


def run(loop: Loop, plan: Plan, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the outputs of the loop's program with the reuses of a plan."""
    with torch.no_grad():
        return list(Root(loop, plan).run(*inputs))
