"""Run a rewritten program and its reference in lockstep, so that their calls read equal latents.

One of them leads: its calls return what they compute. The calls of the other with the same tags
return these values in place of their own, whatever their bodies and other arguments are by now.
So both calls' arguments are known, and the reference's results for them.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from diffopt.analysis.denoiser_structure import analyze_denoiser
from diffopt.analysis.reachability import packet
from diffopt.errors import DiffoptError
from diffopt.execution import trajectories
from diffopt.execution.differentiable import DifferentiableBody
from diffopt.ir import call_tags
from diffopt.ir import graph as g
from diffopt.ir.printing import format_type
from diffopt.ir.program import Program

_ALIKE = 0.5
"""The largest relative difference of latents that are considered the same."""


@dataclass(frozen=True, eq=False)
class CallPair:
    """A call of the program and the corresponding one of the reference.

    Attributes:
        where: Request, step and branch, for messages.
        name: The program's component.
        arguments: Of the program's call.
        reference: The reference's component.
        reference_arguments: Of the reference's call.
        targets: The results of the reference's call.
    """

    where: str
    name: str
    arguments: list[Tensor]
    reference: str
    reference_arguments: list[Tensor]
    targets: list[Tensor]


def check_same_pipeline(program: Program, reference: Program) -> None:
    """Raise DiffoptError where a reference has other inputs than the program."""
    types, wanted = (
        [format_type(n.meta["val"]) for n in g.placeholders(p.root)] for p in (program, reference)
    )
    if types != wanted:
        raise DiffoptError(
            f"the reference is of another pipeline: it takes {', '.join(wanted) or 'nothing'}, this"
            f" program {', '.join(types) or 'nothing'}"
        )


class PairedProgram:
    """One of two programs that run in lockstep."""

    def __init__(self, program: Program, names: Collection[str], where: torch.device) -> None:
        """Prepare to run it.

        Args:
            program: The program.
            names: The components whose calls have counterparts in the other.
            where: The device that these run on.
        """
        self.program = program
        self.bodies = {n: DifferentiableBody(program.components[n], where=where) for n in names}
        self.calls = {call_key(program, c): c for c in program.calls() if str(c.target) in names}
        self._needed = g.ancestors(self.calls.values())

    def compute(self, name: str, arguments: Sequence[Tensor]) -> list[Tensor]:
        """Return the results of a component."""
        body = self.bodies[name]
        with torch.no_grad():
            values = body(arguments, straight=False)
        return [values[n].cpu() for n in body.results]

    def run(
        self, inputs: Sequence[Tensor], forced: Mapping[Hashable, Sequence[Tensor]]
    ) -> tuple[dict[Hashable, list[Tensor]], dict[Hashable, list[Tensor]]]:
        """Run a request; return each call's arguments and results.

        Args:
            inputs: The flat inputs of the request.
            forced: By call, values that replace as many of its first results.
        """
        keys = {call: key for key, call in self.calls.items()}
        arguments: dict[Hashable, list[Tensor]] = {}
        results: dict[Hashable, list[Tensor]] = {}

        def visit(call: fx.Node, actual: Sequence[Tensor]) -> list[Tensor] | None:
            if call not in self._needed:  # behind the loop: its results are not read
                return [torch.zeros(v.shape, dtype=v.dtype) for v in call.meta["val"]]
            if call not in keys:
                return None
            key, name = keys[call], str(call.target)
            values, count = forced.get(key, ()), len(self.bodies[name].results)
            computed = [] if len(values) >= count else self.compute(name, actual)
            cast = (t.to(v.dtype) for t, v in zip(values, call.meta["val"], strict=False))
            arguments[key] = list(actual)
            results[key] = [*cast, *computed[len(values) :]][:count]
            return results[key]

        trajectories.run_root(self.program, inputs, visit)
        return arguments, results


def call_key(program: Program, call: fx.Node) -> Hashable:
    """Return the key that a call shares with its counterpart."""
    tag = call_tags.tag(call)
    name = str(call.target)
    return tag if tag is not None else (name, program.calls(name).index(call))


def pair_programs(
    program: Program, names: Sequence[str], reference: Program, where: torch.device
) -> tuple[PairedProgram, PairedProgram]:
    """Pair a program, of which `names` are the components to train, with its reference."""
    check_same_pipeline(program, reference)
    calls = {call_key(program, c): c for c in program.calls() if str(c.target) in names}
    reference_calls = {call_key(reference, c): c for c in reference.calls()}
    missing = [at for at in calls if at not in reference_calls]
    if missing or not calls:
        what = missing[0] if missing else ", ".join(names)
        raise DiffoptError(f"the reference has no call of {what}: it is of another sampling loop")
    for at, call in calls.items():
        other = reference_calls[at]
        shapes, wanted = (list(map(_shape, c.meta["val"])) for c in (call, other))
        if shapes[: len(wanted)] != wanted:
            raise DiffoptError(
                f"{call.target} returns {format_type(call.meta['val'])} and the reference's"
                f" {other.target} {format_type(other.meta['val'])} in {at}: recover where"
                " both have the same calls, such as in front of `fuse`"
            )
    reference_names = {str(reference_calls[at].target) for at in calls}
    return PairedProgram(program, names, where), PairedProgram(reference, reference_names, where)


def _shape(value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape)


def gather_pairs(
    program: PairedProgram,
    reference: PairedProgram,
    inputs: Sequence[Tensor],
    request: int,
    program_leads: bool = False,
) -> list[CallPair]:
    """Run a request in both programs; return its pairs of calls.

    Args:
        program: The program.
        reference: Its reference.
        inputs: The flat inputs of the request.
        request: Its number, for messages.
        program_leads: Whether the program leads, not the reference.
    """
    leader, follower = (program, reference) if program_leads else (reference, program)
    led, results = leader.run(inputs, {})
    counts = {at: len(reference.bodies[str(c.target)].results) for at, c in reference.calls.items()}
    forced = {at: values[: counts[at]] for at, values in results.items() if at in counts}
    followed, _ = follower.run(inputs, {at: v for at, v in forced.items() if at in program.calls})
    mine, theirs = (led, followed) if program_leads else (followed, led)
    pairs = []
    for at, call in program.calls.items():
        where, name = f"request {request}, {at}", str(call.target)
        other = str(reference.calls[at].target)
        targets = reference.compute(other, theirs[at]) if program_leads else results[at]
        pairs.append(CallPair(where, name, mine[at], other, theirs[at], targets))
    _check_latents(program, pairs[-1], reference)
    return pairs


def _check_latents(program: PairedProgram, pair: CallPair, reference: PairedProgram) -> None:
    """Raise where the last calls of both do not read the same latents."""
    late = g.descendants(program.calls.values())
    last = list(program.calls.values())[-1]
    latents = [t for t, n in zip(pair.arguments, last.args, strict=True) if n in late]
    for tensor in latents:
        others = pair.reference_arguments
        alike = [t for t in others if t.shape == tensor.shape and t.dtype == tensor.dtype]
        norm = tensor.float().norm().clamp_min(1e-12)
        if alike and min(float((t.float() - tensor.float()).norm() / norm) for t in alike) > _ALIKE:
            raise DiffoptError(
                f"in {pair.where}, {pair.name} and the reference's {pair.reference} read other"
                " latents: their calls mean different things; recover in front of `fuse`"
            )


@dataclass(frozen=True, eq=False)
class FeaturePair:
    """A value of both bodies, whose difference is part of the loss.

    Attributes:
        node: The program's.
        reference: The reference's.
        axis: The axis that is shorter in the program, as of pruned channels; None: none is.
        index: The indices of the reference along it that the program has, once `aligned`.
    """

    node: fx.Node
    reference: fx.Node
    axis: int | None = None
    index: Tensor | None = None

    def targets(self, values: Tensor) -> Tensor:
        """Select the program's part of the reference's values [calls, ...]."""
        if self.axis is None or self.index is None:
            return values
        return values.index_select(self.axis + 1, self.index.to(values.device))

    def aligned(self, node: Tensor, reference: Tensor) -> FeaturePair:
        """Match the program's slices to the reference's in order, by the largest sum of cosines."""
        if self.axis is None:
            return self
        rows, others = (
            torch.nn.functional.normalize(t.detach().float().cpu().movedim(self.axis, 0).flatten(1))
            for t in (node, reference)
        )
        return replace(self, index=_increasing(rows @ others.T))


def _increasing(likeness: Tensor) -> Tensor:
    """Return an increasing sequence of columns, one for each row, with the largest sum.

    best[i+1][j] = max(best[i+1][j-1], best[i][j-1] + likeness[i][j-1]).
    """
    count, most = likeness.shape
    best = torch.full((count + 1, most + 1), -torch.inf)
    best[0] = 0.0
    for i in range(count):
        # Row i is matched to column j, or to one before it.
        best[i + 1, 1:] = (best[i, :-1] + likeness[i]).cummax(0).values
    columns, j = [], most
    for i in range(count, 0, -1):
        while j > i and best[i, j - 1] == best[i, j]:
            j -= 1
        j -= 1
        columns.append(j)
    return torch.tensor(columns[::-1])


def matching_blocks(body: fx.GraphModule, reference: fx.GraphModule) -> list[FeaturePair]:
    """Return the blocks' results with equal names, operators and shapes in both bodies.

    Along one axis the first body's may be shorter.
    """
    blocks = analyze_denoiser(reference, g.placeholders(reference)).blocks
    by_name = {node.name: node for node in body.graph.nodes}
    results = {*g.outputs(reference)}
    features = []
    for last in dict.fromkeys(block.last for block in blocks):
        node = by_name.get(last.name)
        if node is None or last in results or packet(node) is not packet(last):
            continue
        pair = _shape(node.meta["val"]), _shape(last.meta["val"])
        axes = [i for i, (m, n) in enumerate(zip(*pair, strict=False)) if m != n]
        is_part = len(pair[0]) == len(pair[1]) and all(pair[0][i] < pair[1][i] for i in axes)
        if is_part and len(axes) < 2:
            features.append(FeaturePair(node, last, axes[0] if axes else None))
    return features
