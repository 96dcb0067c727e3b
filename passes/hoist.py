"""Move work that is the same in every step into a prologue that runs once a request.

Before (a component called once a step):

    %unet = unet(%latents, %text, %row)        # in unet: k = linear(%text, %to_k) …

After:

    %once = unet_once(%text)                   # all k, v … of all layers
    %unet = unet(%latents, %row, %k, %v)

What depends on the step as well as on the request (the modulation of timestep + class) is computed
for all steps in one batched call, and each step reads its row:

    %rows = unet_steps(stack([%row0, %row1, …]), %label)
    %unet = unet(%latents, select(%rows, 0, 0))

Not rewritten when
- a component is called once only, or all its arguments are loop-variant;
- only views would move;
- the values of all steps would take more than `max-mb`, or their operators can't be batched.

Weights that only a prologue reads can be released before the loop: `Program.releasable`.
"""

from dataclasses import dataclass

import torch
from torch import fx

from diffopt.core import Context, Pass, option
from diffopt.errors import first_line
from diffopt.ir import graph as g
from diffopt.ir.flops import graph_flops, node_flops
from diffopt.ir.program import Program
from diffopt.ir.step_tables import add_placeholder, frontier, is_view, replace_by_rows, to_row
from diffopt.transforms import component_signatures

aten = torch.ops.aten


@dataclass(frozen=True)
class Hoist(Pass):
    """Run what does not depend on the latents once a request, batched over steps."""

    batch: bool = option(True, "also move what depends on the step, for all steps in one call")
    max_mb: int = option(512, "leave a component alone whose values for all steps would be larger")

    atol = 1e-5
    rtol = 1e-5
    tolerance_reason = "one matrix product over all steps sums in another order than one a step"

    def run(self, program: Program, ctx: Context) -> None:
        """Add prologues of every component that is called more than once."""
        for name in list(program.components):
            calls = program.calls(name)
            if len(calls) < 2:
                ctx.skip(name, "is called once only")
                continue
            before = graph_flops(program.components[name])
            before_weights = {id(t) for _, t in g.named_tensors(program.components[name])}
            moved = self._hoist_once(program, name, calls, ctx)
            if self.batch:
                moved += self._hoist_steps(program, name, calls, ctx)
            if not moved:
                continue
            body = program.components[name]
            g.prune_unused(body)
            left = {id(t) for _, t in g.named_tensors(body)}
            weights = [t for i, t in program.weights().items() if i in before_weights - left]
            ctx.note(
                name,
                {
                    "values": moved,
                    "parameters moved": sum(t.numel() for t in weights),
                    "FLOPs per step": [before, graph_flops(body)],
                },
            )

    def _hoist_once(self, program: Program, name: str, calls: list[fx.Node], ctx: Context) -> int:
        """Hoist values of loop-invariant arguments into a prologue; return how many."""
        body = program.components[name]
        formals = g.placeholders(body)
        same = [i for i in range(len(formals)) if len({c.args[i] for c in calls}) == 1]
        early = _only_from(body, {formals[i] for i in same})
        values = _worth_moving(body, early, {formals[i] for i in same})
        if not values:
            ctx.skip(name, "nothing depends only on arguments that stay the same")
            return 0
        arguments = [i for i in same if formals[i] in g.ancestors(values)]
        part = g.extract_subgraph(body, [formals[i] for i in arguments], values, f"{name}_once")
        prologue = program.add_component(f"{name}_once", part)
        with program.root.graph.inserting_before(calls[0]):
            results = program.insert_call(prologue, [calls[0].args[i] for i in arguments])
        for value in values:
            formal = add_placeholder(body, "once")
            formal.meta["val"] = value.meta["val"]
            value.replace_all_uses_with(formal)
        for call in calls:
            call.args = (*call.args, *results)
        component_signatures.drop_unread_arguments(program, name)
        return len(values)

    def _hoist_steps(self, program: Program, name: str, calls: list[fx.Node], ctx: Context) -> int:
        """Hoist values of arguments known before the loop, batched over steps; return how many."""
        body = program.components[name]
        formals = g.placeholders(body)
        loop = g.descendants(calls) - set(calls)
        if not any(arg in loop for call in calls for arg in call.args):
            ctx.skip(
                name, "its calls do not follow one another: there is no loop to move work out of"
            )
            return 0
        bound = [i for i in range(len(formals)) if not any(c.args[i] in loop for c in calls)]
        early = _only_from(body, {formals[i] for i in bound})
        values = [
            v for v in _worth_moving(body, early, {formals[i] for i in bound}) if _costs(v, early)
        ]
        if not values:
            return 0
        size = len(calls) * g.tensor_bytes(v.meta["val"] for v in values)
        if size > self.max_mb << 20:
            ctx.skip(
                name, f"values of all steps would take {size >> 20} MB, over max-mb={self.max_mb}"
            )
            return 0
        needed = g.ancestors(values)
        arguments = [i for i in bound if formals[i] in needed]
        part = g.extract_subgraph(body, [formals[i] for i in arguments], values, f"{name}_steps")
        batched = [len({c.args[i] for c in calls}) > 1 for i in arguments]
        try:
            rows_body = _batch(part, batched, values, len(calls), f"{name}_steps")
        except Exception as error:  # vmap has no rule for an operator
            ctx.skip(name, f"what depends on the step can't be batched: {first_line(error)}")
            return 0
        prologue = program.add_component(f"{name}_steps", rows_body)
        sources = [c.args[i] for c in calls for i in arguments]
        _move_before(program.root, g.ancestors(sources), calls[0])  # type: ignore[arg-type]
        with program.root.graph.inserting_before(calls[0]):
            actual = [
                g.call(program.root.graph, aten.stack.default, [c.args[i] for c in calls])
                if many
                else calls[0].args[i]
                for i, many in zip(arguments, batched, strict=True)
            ]
            results = program.insert_call(prologue, actual)
        groups = replace_by_rows(body, [(v, list(v.meta["val"].shape)) for v in values], "step")
        assert len(groups) == len(results)
        for result in results:
            for k, call in enumerate(calls):
                with program.root.graph.inserting_before(call):
                    row = g.call(program.root.graph, aten.select.int, result, 0, k)
                call.args = (*call.args, row)
        component_signatures.drop_unread_arguments(program, name)
        return len(values)


def _only_from(body: fx.GraphModule, roots: set[fx.Node]) -> set[fx.Node]:
    """Return the operators that depend on at least one of the roots and on no other parameter."""
    others = [n for n in g.placeholders(body) if n not in roots]
    late = g.descendants([*others, g.output_node(body)])
    return {n for n in g.descendants(roots) if n.op == "call_function" and n not in late}


def _worth_moving(body: fx.GraphModule, early: set[fx.Node], roots: set[fx.Node]) -> list[fx.Node]:
    """Return the values to pass to the body: those that more than views compute."""
    return [
        n
        for n in frontier(early, body)
        if n.op == "call_function" and g.ancestors([n]) & roots and not _is_cheap(n)
    ]


def _is_cheap(node: fx.Node) -> bool:
    """Tell whether a value is a view of an argument or a constant."""
    while node.op == "call_function":
        if not is_view(node):
            return False
        node = node.all_input_nodes[0]
    return True


def _costs(value: fx.Node, early: set[fx.Node]) -> bool:
    """Tell whether a value depends on a matrix product or convolution in `early`."""
    return any(node_flops(n) for n in g.ancestors([value]) & early)


def _batch(
    part: fx.GraphModule, batched: list[bool], values: list[fx.Node], count: int, name: str
) -> fx.GraphModule:
    """Return a part that computes all steps at once; its outputs are tables, one row a step."""
    dtypes = list(dict.fromkeys(v.meta["val"].dtype for v in values))

    def one_step(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = part(*args)
        return tuple(to_row([t for t in results if t.dtype == dtype]) for dtype in dtypes)

    examples = []
    for node, many in zip(g.placeholders(part), batched, strict=True):
        value = node.meta["val"]
        shape = [count, *value.shape] if many else value.shape
        examples.append(torch.zeros(shape, dtype=value.dtype))
    in_dims = tuple(0 if many else None for many in batched)
    return g.import_traced(g.trace_batched(one_step, in_dims, examples), part, name)


def _move_before(root: fx.GraphModule, sources: set[fx.Node], first: fx.Node) -> None:
    """Move nodes, none of which depends on a call, before the first call."""
    order = {n: i for i, n in enumerate(root.graph.nodes)}
    for node in sorted(sources, key=order.__getitem__):
        if order[node] > order[first]:
            first.prepend(node)
