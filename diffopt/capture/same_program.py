"""Whether two runs of a pipeline, with other values, are runs of one program."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from diffopt.capture import value_tree
from diffopt.capture.input_recipes import RunInputs
from diffopt.capture.recorder import Recorder
from diffopt.capture.results import Result, same_constant
from diffopt.capture.tracked_text import plain_texts
from diffopt.errors import CaptureError
from diffopt.host.inputs import InputStep
from diffopt.ir import graph as g
from diffopt.ir.printing import format_type
from diffopt.ir.program import Program


def is_run_of(
    program: Program, values: Sequence[Tensor], ours: Recorder, run: RunInputs, result: Any
) -> bool:
    """Tell whether another run does what a program does.

    Args:
        program: The program.
        values: Its inputs for the other run's arguments.
        ours: The recorder of the run that became the program.
        run: The other run.
        result: What the pipeline returned in it.
    """
    recorder = run.recorder
    assert recorder is not None
    try:
        returned = Result(plain_texts(result), recorder, run.array_recorder)
        output, checks = returned.structure(), returned.checks()
        steps, _, theirs = run.finish(recorder)
        g.prune_unused(recorder.root)
        check_same_operators(ours, recorder)
    except CaptureError:
        return False
    is_same = (output, checks) == (program.host.output, program.host.checks)
    if not is_same or _outputs(recorder) != _outputs(ours):
        return False
    got = _live_inputs(recorder.root, steps, theirs)
    taken = _live_inputs(program.root, program.host.steps, values)
    pairs = zip(got, taken, strict=False)
    return len(got) == len(taken) and all(_is_same_input(*pair) for pair in pairs)


def _live_inputs(
    root: fx.GraphModule, steps: Sequence[InputStep], values: Sequence[Tensor]
) -> list[Any]:
    """Return the values of a graph's inputs that are made of texts; how the others are made."""
    sources = [step for step in steps for _ in range(step.count)]
    rows = zip(g.placeholders(root), sources, values, strict=True)
    return [value if step.from_text else step for node, step, value in rows if node.users]


def _is_same_input(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        return value_tree.same_bits(ours, theirs)
    return bool(ours == theirs)


def _outputs(recorder: Recorder) -> list[int]:
    """Return the places of the nodes that a run returns, among those that are used."""
    used = [n for n in recorder.root.graph.nodes if n.op != "placeholder" or n.users]
    places = {node: place for place, node in enumerate(used)}
    return [places[node] for node in g.outputs(recorder.root)]


def check_same_operators(final: Recorder, probe: Recorder) -> None:
    """Raise a `CaptureError` where runs with other texts and pictures have other operators."""
    ours, theirs = _operators(final), _operators(probe)
    twins: dict[fx.Node, fx.Node] = {}
    for a, b in zip(ours, theirs, strict=False):
        if not _same_target(a, b, final, probe) or not _same_args(a, b, final, probe, twins):
            where = a.meta.get("where", "?")
            raise CaptureError(
                f"{where}: what the pipeline computes here depends in Python on the text, picture "
                "or seed; make it depend on tensors alone, or pass tensors (prompt_embeds, "
                "latents) in their place"
            )
        twins[a] = b
    if len(ours) != len(theirs):
        where = (ours + theirs)[min(len(ours), len(theirs))].meta.get("where", "?")
        raise CaptureError(
            f"{where}: whether this runs depends in Python on the text, picture or seed"
        )


def _operators(recorder: Recorder) -> list[fx.Node]:
    return [n for n in recorder.root.graph.nodes if n.op in ("call_function", "call_module")]


def _same_target(a: fx.Node, b: fx.Node, final: Recorder, probe: Recorder) -> bool:
    """Tell whether two nodes call the same operator, or the same body of a component."""
    if a.op == b.op == "call_module":
        return final.root._modules[str(a.target)] is probe.root._modules[str(b.target)]
    return a.target == b.target


def _same_args(
    a: fx.Node, b: fx.Node, final: Recorder, probe: Recorder, twins: Mapping[fx.Node, fx.Node]
) -> bool:
    """Tell whether nodes have the same constants, and the results of twins, as arguments."""

    def same(x: Any, y: Any) -> bool:
        if isinstance(x, fx.Node) and isinstance(y, fx.Node):
            if x.op == y.op == "get_attr":
                return same_constant(
                    g.attribute(final.root, str(x.target)), g.attribute(probe.root, str(y.target))
                )
            return twins.get(x, y) is y and format_type(x.meta["val"]) == format_type(y.meta["val"])
        if isinstance(x, (list, tuple)) and isinstance(y, (list, tuple)):
            return len(x) == len(y) and all(map(same, x, y))
        return type(x) is type(y) and bool(x == y)

    return (
        same(a.args, b.args)
        and a.kwargs.keys() == b.kwargs.keys()
        and all(same(value, b.kwargs[name]) for name, value in a.kwargs.items())
    )
