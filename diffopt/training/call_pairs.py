"""Runs a rewritten program beside its reference, so that their calls see the same latents.

One of them leads: its calls return what they compute. The calls of the other with the same tags
return the same values in place of their own, whatever their bodies and other arguments are by now.
So each call's arguments are known for both, and what the reference returns for them.
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
from diffopt.execution.differentiable import Body
from diffopt.ir import call_tags
from diffopt.ir import graph as g
from diffopt.ir.printing import format_type
from diffopt.ir.program import Program

_ALIKE = 0.5
"""Latents of both that differ by more, relative to their norm, are not the same thing."""


@dataclass(frozen=True, eq=False)
class Pair:
    """A call of the program and the one of the reference that it stands for.

    Attributes:
        where: Request, step and branch, for messages.
        name: The program's component.
        arguments: Of the program's call.
        other: The reference's component.
        others: The arguments of the reference's call.
        targets: What the reference returns for them.
    """

    where: str
    name: str
    arguments: list[Tensor]
    other: str
    others: list[Tensor]
    targets: list[Tensor]


def check_same_pipeline(program: Program, reference: Program) -> None:
    """Raise where a reference does not take what the program takes."""
    own, other = (
        [format_type(n.meta["val"]) for n in g.placeholders(p.root)] for p in (program, reference)
    )
    if own != other:
        raise DiffoptError(
            f"the reference is of another pipeline: it takes {', '.join(other) or 'nothing'}, this"
            f" program {', '.join(own) or 'nothing'}"
        )


class Side:
    """One of the two programs."""

    def __init__(self, program: Program, names: Collection[str], where: torch.device) -> None:
        """Prepare to run it.

        Args:
            program: The program.
            names: The components whose calls have counterparts in the other.
            where: What these run on.
        """
        self.program = program
        self.bodies = {n: Body(program.components[n], where=where) for n in names}
        self.calls = {key(program, c): c for c in program.calls() if str(c.target) in self.bodies}
        self._needed = g.ancestors(self.calls.values())

    def compute(self, name: str, arguments: Sequence[Tensor]) -> list[Tensor]:
        """Return what a component returns."""
        body = self.bodies[name]
        with torch.no_grad():
            values = body(arguments, straight=False)
        return [values[n].cpu() for n in body.results]

    def run(
        self,
        inputs: Sequence[Tensor],
        given: Mapping[Hashable, Sequence[Tensor]],
    ) -> tuple[dict[Hashable, list[Tensor]], dict[Hashable, list[Tensor]]]:
        """Run a request; return each call's arguments and results.

        Args:
            inputs: The flat inputs of the request.
            given: Results of calls, which take the place of the first of their own.
        """
        keys = {call: at for at, call in self.calls.items()}
        arguments: dict[Hashable, list[Tensor]] = {}
        results: dict[Hashable, list[Tensor]] = {}

        def visit(call: fx.Node, read: Sequence[Tensor]) -> list[Tensor] | None:
            if call not in self._needed:  # behind the loop: nobody reads what it returns
                return [torch.zeros(v.shape, dtype=v.dtype) for v in call.meta["val"]]
            if call not in keys:
                return None
            at, name = keys[call], str(call.target)
            own = given.get(at, ())
            count = len(self.bodies[name].results)
            made = [] if len(own) >= count else self.compute(name, read)
            wanted = [v.dtype for v in call.meta["val"]]
            made = [*(t.to(d) for t, d in zip(own, wanted, strict=False)), *made[len(own) :]]
            arguments[at], results[at] = list(read), made[:count]
            return results[at]

        trajectories.run_root(self.program, inputs, visit)
        return arguments, results


def key(program: Program, call: fx.Node) -> Hashable:
    """Return what a call and its counterpart have in common."""
    own = call_tags.tag(call)
    name = str(call.target)
    return own if own is not None else (name, program.calls(name).index(call))


def match(
    program: Program, names: Sequence[str], reference: Program, where: torch.device
) -> tuple[Side, Side]:
    """Return the sides of a program, of which some components are meant, and of its reference."""
    check_same_pipeline(program, reference)
    own = {key(program, c): c for c in program.calls() if str(c.target) in names}
    other = {key(reference, c): c for c in reference.calls()}
    missing = [at for at in own if at not in other]
    if missing or not own:
        what = missing[0] if missing else ", ".join(names)
        raise DiffoptError(f"the reference has no call of {what}: it is of another sampling loop")
    for at, call in own.items():
        mine, theirs = (list(map(_shape, c.meta["val"])) for c in (call, other[at]))
        if mine[: len(theirs)] != theirs:
            raise DiffoptError(
                f"{call.target} returns {format_type(call.meta['val'])} and the reference's"
                f" {other[at].target} {format_type(other[at].meta['val'])} in {at}: recover where"
                " both have the same calls, such as in front of `fuse`"
            )
    sides = (
        Side(program, names, where),
        Side(reference, {str(other[at].target) for at in own}, where),
    )
    return sides


def _shape(value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape)


def gather(
    program: Side, reference: Side, inputs: Sequence[Tensor], request: int, *, own: bool = False
) -> list[Pair]:
    """Return the calls of a request.

    Args:
        program: The program.
        reference: Its reference.
        inputs: The flat inputs of the request.
        request: Its number, for messages.
        own: Let the program lead, in place of the reference.
    """
    leader, follower = (program, reference) if own else (reference, program)
    led, made = leader.run(inputs, {})
    counts = {at: len(reference.bodies[str(c.target)].results) for at, c in reference.calls.items()}
    given = {at: values[: counts[at]] for at, values in made.items() if at in counts}
    followed, _ = follower.run(inputs, {at: v for at, v in given.items() if at in program.calls})
    mine, theirs = (led, followed) if own else (followed, led)
    pairs = []
    for at, call in program.calls.items():
        other = str(reference.calls[at].target)
        targets = reference.compute(other, theirs[at]) if own else made[at]
        name = str(call.target)
        pair = Pair(f"request {request}, {at}", name, mine[at], other, theirs[at], targets)
        pairs.append(pair)
    _check_latents(program, pairs[-1], reference)
    return pairs


def _check_latents(program: Side, pair: Pair, reference: Side) -> None:
    """Raise where the last calls of both do not read the same latents."""
    late = g.descendants(program.calls.values())
    last = list(program.calls.values())[-1]
    moving = [t for t, n in zip(pair.arguments, last.args, strict=True) if n in late]
    for tensor in moving:
        alike = [t for t in pair.others if t.shape == tensor.shape and t.dtype == tensor.dtype]
        norm = tensor.float().norm().clamp_min(1e-12)
        if alike and min(float((t.float() - tensor.float()).norm() / norm) for t in alike) > _ALIKE:
            raise DiffoptError(
                f"in {pair.where}, {pair.name} and the reference's {pair.other} read other latents:"
                " their calls mean different things; recover in front of `fuse`"
            )


@dataclass(frozen=True, eq=False)
class Tap:
    """A value that both bodies have.

    Attributes:
        own: The program's node.
        other: The reference's.
        axis: Along which the program has fewer, as channels that were pruned; None: along none.
        index: Which of the reference's are left, once they are `aligned`.
    """

    own: fx.Node
    other: fx.Node
    axis: int | None = None
    index: Tensor | None = None

    def targets(self, values: Tensor) -> Tensor:
        """Return what is left of the reference's values in several calls [calls, ...]."""
        if self.axis is None or self.index is None:
            return values
        return values.index_select(self.axis + 1, self.index.to(values.device))

    def aligned(self, own: Tensor, other: Tensor) -> Tap:
        """Find out what is left: of all choices that keep the order, the most alike."""
        if self.axis is None:
            return self
        rows, others = (
            torch.nn.functional.normalize(t.detach().float().cpu().movedim(self.axis, 0).flatten(1))
            for t in (own, other)
        )
        return replace(self, index=_increasing(rows @ others.T))


def _increasing(likeness: Tensor) -> Tensor:
    """Return a column for each row, each behind the one before, with the largest sum."""
    count, most = likeness.shape
    best = torch.full((count + 1, most + 1), -torch.inf)
    best[0] = 0.0
    for i in range(count):
        # Either row i takes column j, or what it takes comes before it.
        best[i + 1, 1:] = (best[i, :-1] + likeness[i]).cummax(0).values
    found, j = [], most
    for i in range(count, 0, -1):
        while j > i and best[i, j - 1] == best[i, j]:
            j -= 1
        j -= 1
        found.append(j)
    return torch.tensor(found[::-1])


def features(body: fx.GraphModule, reference: fx.GraphModule) -> list[Tap]:
    """Return the results of blocks that two bodies have alike, by name, operator and shape.

    Along one axis, if any, the first may have fewer.
    """
    blocks = analyze_denoiser(reference, g.placeholders(reference)).blocks
    own = {node.name: node for node in body.graph.nodes}
    results = {*g.outputs(reference)}
    found = []
    for last in dict.fromkeys(block.last for block in blocks):
        node = own.get(last.name)
        if node is None or last in results or packet(node) is not packet(last):
            continue
        pair = _shape(node.meta["val"]), _shape(last.meta["val"])
        axes = [i for i, (m, n) in enumerate(zip(*pair, strict=False)) if m != n]
        is_part = len(pair[0]) == len(pair[1]) and all(pair[0][i] < pair[1][i] for i in axes)
        if is_part and len(axes) < 2:
            found.append(Tap(node, last, axes[0] if axes else None))
    return found
