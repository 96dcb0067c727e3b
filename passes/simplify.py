"""Drop what is not needed, compute what is equal once, and evaluate what is constant.

Before:

    %1: float32[2,3] = aten.mul.Tensor(%x, 1.0)
    %2: float32[2,3] = aten.exp(%1)
    %3: float32[2,3] = aten.exp(%x)
    %4: float32[2,3] = aten.add.Tensor(%2, %3)

After:

    %1: float32[2,3] = aten.exp(%x)
    %2: float32[2,3] = aten.add.Tensor(%1, %1)

Until nothing changes, in the pipeline graph and in every component: dead code; equal nodes, calls
and components; operators that return their argument as it is; chains of views; operators on
constants; equal constants; outputs that no call uses, and arguments that are unused, given twice or
the same constant in every call.

Not rewritten when
- a constant would be larger than `max-constant-mb` and than what it is made of;
- a copy keeps an output from sharing memory with an input, a weight or another output;
- an operator is random, or writes into an argument.

Results are equal bit by bit (x + 0.0 stays, since it is 0.0 where x is -0.0), but for sums over a
constant that was stored in another memory layout than it was computed in.
"""

from dataclasses import dataclass

from torch import Tensor, fx

from diffopt.core import Context, Pass, option
from diffopt.ir import graph as g
from diffopt.ir import nodes
from diffopt.ir.aliasing import clone_aliased_outputs, output_aliases
from diffopt.ir.cse import eliminate_common_subexpressions
from diffopt.ir.program import Program
from diffopt.transforms import canonicalize, component_signatures, constant_folding


@dataclass(frozen=True)
class Simplify(Pass):
    """Remove dead, repeated, idle and constant computation."""

    max_constant_mb: int = option(4, "evaluate no constant that would be larger")

    atol = 1e-6
    rtol = 1e-6
    tolerance_reason = "a sum over a stored constant follows the layout that it is stored in"

    def run(self, program: Program, ctx: Context) -> None:
        """Apply all rules until none applies."""
        before = output_aliases(program)
        totals: dict[str, int] = {}
        contents: dict[int, tuple[Tensor, object]] = {}
        reasons: dict[str, tuple[fx.Node | str, str]] = {}
        while True:
            reasons.clear()
            counts = self._sweep(program, contents, reasons)
            for what, count in counts.items():
                totals[what] = totals.get(what, 0) + count
            if not any(counts.values()):
                break
        clone_aliased_outputs(program, before)
        for where, reason in reasons.values():
            ctx.skip(where, reason)
        for what, count in totals.items():
            if count:
                ctx.note(what, count)

    def _sweep(
        self,
        program: Program,
        contents: dict[int, tuple[Tensor, object]],
        reasons: dict[str, tuple[fx.Node | str, str]],
    ) -> dict[str, int]:
        """Apply every rule once; return how often each did something."""
        counts = dict.fromkeys(["no-ops", "views", "equal nodes", "constants"], 0)
        for name, gm in program.graphs.items():

            def skip(node: fx.Node, reason: str, name: str = name) -> None:
                where = f"{name}.{node.name}" if name else node.name
                reasons[where] = where, reason

            g.prune_unused(gm)
            apart = _copies_of_outputs(gm) if gm is program.root else set()
            for node in [node for node in gm.graph.nodes if node in apart]:
                skip(node, "without this copy an output would share memory")
            idle, views = _drop_idle(gm, apart)
            counts["no-ops"] += idle
            counts["views"] += views
            counts["constants"] += constant_folding.fold_constants(
                gm, self.max_constant_mb << 20, apart, skip
            )
            g.prune_unused(gm)
            counts["equal nodes"] += eliminate_common_subexpressions(gm, apart)
        counts["equal constants"] = constant_folding.share_equal_constants(program, contents)
        names = list(program.components)
        counts["outputs"] = sum(component_signatures.trim_outputs(program, name) for name in names)
        counts["arguments"] = sum(
            component_signatures.trim_arguments(program, name) for name in names
        )
        counts["components"] = component_signatures.merge_equal_components(program)
        return counts


def _copies_of_outputs(gm: fx.GraphModule) -> set[fx.Node]:
    """Return the outputs that are copies without which an output would share memory."""
    return {n for n in g.outputs(gm) if canonicalize.keeps_output_apart(gm, n)}


def _drop_idle(gm: fx.GraphModule, keep: set[fx.Node]) -> tuple[int, int]:
    """Drop nodes that return their argument, and views of views; return how many of each."""
    idle = views = 0
    for node in list(gm.graph.nodes):
        if node in keep:
            continue
        if (source := canonicalize.identity_source(gm, node)) is not None:
            nodes.replace_node(node, source)
            idle += 1
        elif (source := canonicalize.collapse_views(gm, node)) is not None:
            nodes.replace_node(node, source)
            views += 1
    return idle, views
