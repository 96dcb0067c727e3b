"""Measure the importance (saliency) of weights, element by element.

- `magnitude`: |w|.
- `random`: a random number for each weight, as a baseline.
- `taylor`: the sum over all calls of |w dL/dw|, with L = <y, u> for the call's result y, scaled to
  a root mean square of 1, and a random u of the same: the first-order change of the result, in a
  random direction, if the weight becomes 0 (Molchanov et al. 2019). It needs no data but requests.
- `diff-pruning` (Fang et al. 2023, https://arxiv.org/abs/2305.10924): |w dL/dw| with L the sum over
  steps of L_t = |prediction - target|^2 on noised samples. Steps are visited from the least noisy
  one on, as long as L_t is at least `threshold` of the largest L_t so far.

Diff-Pruning noises a data set by the scheduler. A program has neither, so x_0 is the sample that it
generates for a request, the steps are those of its sampler, and x_t = a x_0 + b e with noise e that
is drawn once for each request. The target is c x_0 + d e. For each call a, c and d are fitted to
the program's own trajectories (least squares of the call's latents and results on the initial and
the final latents), and b makes the variance of x_t that of the trajectory. So it is the same
whether the model predicts noise, velocity or the sample, and for a body that is the whole step. All
other arguments are those of the trajectory, and both branches of guidance have the same target.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, fx

from diffopt.analysis.scope import choose_scope
from diffopt.errors import DiffoptError
from diffopt.execution import trajectories
from diffopt.execution.differentiable import FLOATS, DifferentiableBody, device, read_weights
from diffopt.ir import call_tags
from diffopt.ir import graph as g
from diffopt.ir.program import Program
from diffopt.progress import Progress, silent

Method = Literal["magnitude", "taylor", "diff-pruning", "random"]
METHODS: tuple[Method, ...] = get_args(Method)


def importance(
    program: Program,
    method: Method,
    inputs: Sequence[Sequence[Tensor]] = (),
    components: Collection[str] | None = None,
    *,
    threshold: float = 0.05,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[int, Tensor]:
    """Return the importance of each element of weights, by the id of the tensor.

    Args:
        program: The program with the weights.
        method: How importance is measured; see above.
        inputs: The flat inputs of requests (see `requests`); for methods that run the program.
        components: Those whose weights are measured; by default those of the sampling loop. All
            calls that read a shared weight add to its importance.
        threshold: Of `diff-pruning`.
        seed: Of random numbers.
        progress: Called with what is being done and the fraction done.
    """
    names = list(choose_scope(program, ("loop",)).loop if components is None else components)
    stored = {id(t): t for n in names for t in read_weights(program.components[n]).values()}
    if method == "magnitude":
        return {key: t.detach().float().abs() for key, t in stored.items()}
    generator = torch.Generator().manual_seed(seed)
    if method == "random":
        return {key: torch.rand(t.shape, generator=generator) for key, t in stored.items()}
    if not inputs:
        raise DiffoptError(f"importance={method} is measured: give it 1 request or more")
    gradients = _Gradients(program, names, stored, generator, progress)
    if method == "taylor":
        return gradients.taylor(inputs)
    return gradients.diff_pruning(inputs, threshold)


class _Gradients:
    """Gradients of calls' results with respect to the weights that they read."""

    def __init__(
        self,
        program: Program,
        names: Sequence[str],
        stored: Mapping[int, Tensor],
        generator: torch.Generator,
        progress: Progress,
    ) -> None:
        self._program, self._names = program, names
        self._generator, self._progress = generator, progress
        self._where = device()
        # Leaves in float32: sums of gradients in 16 bits would lose the small ones.
        self._leaves = {
            key: t.detach().to(self._where, torch.float32).requires_grad_()
            for key, t in stored.items()
        }
        self._reads = {n: read_weights(program.components[n]) for n in names}
        self._bodies = {
            n: DifferentiableBody(program.components[n], self._reads[n], where=self._where)
            for n in names
        }
        self._calls = [c for c in program.calls() if str(c.target) in self._bodies]

    def taylor(self, inputs: Sequence[Sequence[Tensor]]) -> dict[int, Tensor]:
        """Return the sum over calls of |w dL/dw|."""
        total = {key: torch.zeros_like(leaf) for key, leaf in self._leaves.items()}
        count = 0

        def visit(call: fx.Node, arguments: Sequence[Tensor]) -> list[Tensor] | None:
            nonlocal count
            if call not in self._calls:
                return None
            self._progress("measuring importance", count / (len(inputs) * len(self._calls)))
            count += 1
            with torch.enable_grad():
                results = self._run(call, arguments)
                losses = [self._in_random_direction(t) for t in results if t.dtype in FLOATS]
                gradients = self._gradients(torch.stack(losses).sum(), call)
            for key, gradient in gradients.items():
                total[key] += (self._leaves[key].detach() * gradient).abs()
            return [t.detach().cpu() for t in results]

        for tensors in inputs:
            trajectories.run_root(self._program, tensors, visit)
        return {key: t.cpu() for key, t in total.items()}

    def diff_pruning(
        self, inputs: Sequence[Sequence[Tensor]], threshold: float
    ) -> dict[int, Tensor]:
        """Return |w dL/dw| with L summed over steps from the least noisy one on."""
        noising = _Noising(self._program, self._calls)
        runs = [self._sample(tensors, noising, i, len(inputs)) for i, tensors in enumerate(inputs)]
        noising.fit(runs)
        noise = [torch.randn(run.final.shape, generator=self._generator) for run in runs]
        total = {key: torch.zeros_like(leaf) for key, leaf in self._leaves.items()}
        largest, steps = 0.0, sorted(noising.steps, reverse=True)
        for index, step in enumerate(steps):
            self._progress("measuring importance", 0.5 + 0.5 * index / len(steps))
            of_step = {key: torch.zeros_like(leaf) for key, leaf in self._leaves.items()}
            losses = []
            for call in noising.steps[step]:
                for run, drawn in zip(runs, noise, strict=True):
                    arguments, target = noising.noised(call, run, drawn)
                    result = noising.predicted(call, self._run(call, arguments))
                    loss = (result.float() - target.to(self._where)).square().mean()
                    losses.append(float(loss.detach()))
                    for key, gradient in self._gradients(loss, call).items():
                        of_step[key] += gradient
            loss_of_step = sum(losses) / len(losses)
            if not math.isfinite(loss_of_step):
                raise DiffoptError(f"the loss in step {step} is not finite: there is no importance")
            largest = max(largest, loss_of_step)
            if loss_of_step < threshold * largest:
                break
            for key, gradient in of_step.items():
                total[key] += gradient
        return {key: (self._leaves[key].detach() * t).abs().cpu() for key, t in total.items()}

    def _sample(
        self, tensors: Sequence[Tensor], noising: _Noising, index: int, count: int
    ) -> _Trajectory:
        """Run a request; record the arguments and results of its calls."""
        arguments: dict[fx.Node, list[Tensor]] = {}
        results: dict[fx.Node, list[Tensor]] = {}
        self._progress("sampling", 0.5 * index / count)

        def visit(call: fx.Node, actual: Sequence[Tensor]) -> list[Tensor] | None:
            if call not in self._calls:
                return None
            with torch.no_grad():
                results_of_call = [t.cpu() for t in self._run(call, actual)]
            arguments[call], results[call] = list(actual), results_of_call
            return results_of_call

        known = trajectories.root_values(self._program, tensors, visit)
        return _Trajectory(arguments, results, known[noising.final])

    def _run(self, call: fx.Node, arguments: Sequence[Tensor]) -> list[Tensor]:
        name = str(call.target)
        weights = {n: self._leaves[id(t)].to(t.dtype) for n, t in self._reads[name].items()}
        body = self._bodies[name]
        values = body(arguments, weights)
        return [values[n] for n in body.results]

    def _in_random_direction(self, result: Tensor) -> Tensor:
        """Return <y, u> / sqrt(n) with y of root mean square 1 and u random normal."""
        wide = result.float()
        size = wide.detach().square().mean().sqrt().clamp_min(1e-12)
        drawn = torch.randn(wide.shape, generator=self._generator).to(self._where)
        return (wide * drawn).sum() / (size * math.sqrt(wide.numel()))

    def _gradients(self, loss: Tensor, call: fx.Node) -> dict[int, Tensor]:
        keys = list({id(t) for t in self._reads[str(call.target)].values()})
        leaves = [self._leaves[key] for key in keys]
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        return {key: t for key, t in zip(keys, gradients, strict=True) if t is not None}


@dataclass(frozen=True, eq=False)
class _Trajectory:
    """The arguments and results of a request's calls, and the final latents."""

    arguments: dict[fx.Node, list[Tensor]]
    results: dict[fx.Node, list[Tensor]]
    final: Tensor


class _Noising:
    """Noised final latents and the prediction's target for each call.

    Attributes:
        steps: The calls of each step.
        final: The node of the final latents in the root graph.
    """

    def __init__(self, program: Program, calls: Sequence[fx.Node]) -> None:
        self.steps: dict[int, list[fx.Node]] = {}
        for call in calls:
            if (tag := call_tags.tag(call)) is not None:
                self.steps.setdefault(tag.step, []).append(call)
        late = g.descendants(calls)
        self._places: dict[fx.Node, tuple[int, int]] = {}
        self._sizes: dict[fx.Node, tuple[int, ...]] = {}
        for call in (c for tag in self.steps.values() for c in tag):
            body = program.components[str(call.target)]
            same = program.calls(str(call.target))
            parameters = [
                (i, n)
                for i, n in enumerate(g.placeholders(body))
                if any(c.args[i] in late for c in same) and not n.meta.get("reuse")
            ]
            overlaps = [
                (math.prod(sizes), i, j, sizes)
                for i, argument in parameters
                for j, result in enumerate(g.outputs(body))
                if (sizes := _overlap(argument.meta["val"], result.meta["val"])) is not None
            ]
            if len(self.steps) < 2 or not overlaps:
                raise DiffoptError(
                    f"importance=diff-pruning noises what a sampling loop reads and returns, which"
                    f" {call.target} is not called in; write importance=taylor"
                )
            _, i, j, self._sizes[call] = max(overlaps, key=lambda row: (row[0], -row[1], -row[2]))
            self._places[call] = i, j
        self.final = self._find_final(program)
        self._factors: dict[fx.Node, tuple[float, float, float, float]] = {}

    def _find_final(self, program: Program) -> fx.Node:
        """Return the last value of the latents' shape that depends on the last step."""
        last = self.steps[max(self.steps)]
        sizes = self._sizes[last[0]]
        after = g.reachable(
            [user for call in last for user in call.users],
            lambda n: () if n.op == "call_module" else n.users,
        )
        rows = sizes[0]
        candidates = [
            node
            for node in program.root.graph.nodes
            if node in after and node.op == "call_function" and _is_like(node.meta["val"], sizes)
        ]
        # A prediction for both branches of guidance has more rows than the latents have.
        least = min((n.meta["val"].shape[0] for n in candidates), default=rows)
        candidates = [node for node in candidates if node.meta["val"].shape[0] == least]
        if not candidates:
            raise DiffoptError(
                "importance=diff-pruning finds no final latents behind the sampling loop; write"
                " importance=taylor"
            )
        final: fx.Node = candidates[-1]
        return final

    def fit(self, runs: Sequence[_Trajectory]) -> None:
        """Fit the factors a, b, c and d of each call (see the module's docstring)."""
        first = {call: self._first(call) for call in self._places}
        for call in self._places:
            finals = torch.cat([self._rows(r.final, call).flatten() for r in runs])
            noises = torch.cat([self._latents(first[call], r).flatten() for r in runs])
            noises = noises / noises.square().mean().sqrt().clamp_min(1e-12)
            basis = torch.stack([finals, noises], 1).double()
            reads = torch.cat([self._latents(call, r).flatten() for r in runs])
            results = torch.cat([self.predicted(call, r.results[call]).flatten() for r in runs])
            sides = torch.stack([reads, results], 1).double()
            # At the first call x_t is the noise itself, which the fit then finds.
            (a, c), (_, d) = torch.linalg.lstsq(basis, sides).solution.tolist()
            rest = reads.double().square().mean() - a**2 * finals.double().square().mean()
            self._factors[call] = a, math.sqrt(max(float(rest), 0.0)), c, d

    def noised(self, call: fx.Node, run: _Trajectory, noise: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the arguments of a call with noised latents, and the target of its result."""
        a, b, c, d = self._factors[call]
        final, drawn = self._rows(run.final, call), self._rows(noise, call)
        arguments = list(run.arguments[call])
        at = self._places[call][0]
        arguments[at] = arguments[at].clone()
        arguments[at][self._slices(call)] = (a * final + b * drawn).to(arguments[at].dtype)
        return arguments, c * final + d * drawn

    def predicted(self, call: fx.Node, results: Sequence[Tensor]) -> Tensor:
        """Return the part of the results that has a target: without a predicted variance."""
        return results[self._places[call][1]][self._slices(call)]

    def _first(self, call: fx.Node) -> fx.Node:
        """Return the first call that reads latents of the same size."""
        steps = (c for step in sorted(self.steps) for c in self.steps[step])
        return next(c for c in steps if self._sizes[c] == self._sizes[call])

    def _latents(self, call: fx.Node, run: _Trajectory) -> Tensor:
        return run.arguments[call][self._places[call][0]][self._slices(call)]

    def _slices(self, call: fx.Node) -> tuple[slice, ...]:
        return tuple(slice(0, size) for size in self._sizes[call])

    def _rows(self, latents: Tensor, call: fx.Node) -> Tensor:
        """Repeat latents for each branch in the call's batch."""
        count = self._sizes[call][0] // len(latents)
        return torch.cat([latents.float()] * count)


def _overlap(a: object, b: object) -> tuple[int, ...] | None:
    """Return the common shape of latents and prediction; None if two values cannot be these."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.dim() < 2 or a.dim() != b.dim():
        return None
    if a.dtype not in FLOATS or b.dtype not in FLOATS:
        return None
    differs = [i for i, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if m != n]
    # One may have more channels: a mask beside the latents, a variance beside the prediction.
    if len(differs) > 1 or 0 in differs:
        return None
    return tuple(min(m, n) for m, n in zip(a.shape, b.shape, strict=True))


def _is_like(value: object, sizes: Sequence[int]) -> bool:
    """Tell whether a value has the latents' shape, once or for each branch of guidance."""
    if not isinstance(value, Tensor) or value.dim() != len(sizes) or value.dtype not in FLOATS:
        return False
    return tuple(value.shape[1:]) == tuple(sizes[1:]) and sizes[0] % value.shape[0] == 0
