"""`diffopt.trace`: captures a call of a pipeline as a program."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, fx

from diffopt.capture import perturbation
from diffopt.capture.component_calls import ComponentCalls, Lifted
from diffopt.capture.input_recipes import RunInputs
from diffopt.capture.recorder import Recorder
from diffopt.capture.torch_functions import TorchFunctionRecorder
from diffopt.errors import CaptureError
from diffopt.host.guards import Guards
from diffopt.host.inputs import Host, InputStep, Processor
from diffopt.host.outputs import to_images
from diffopt.host.processors import save_component
from diffopt.ir import call_tags
from diffopt.ir import graph as g
from diffopt.ir.printing import format_type
from diffopt.ir.program import Program
from diffopt.storage.weight_digests import digests


def trace(
    pipeline: Callable[..., Any],
    /,
    *,
    dynamic: Sequence[str] = (),
    components: Mapping[str, Any] | None = None,
    source: str = "",
    **arguments: Any,
) -> Program:
    """Capture the call `pipeline(**arguments)` as a program.

    The pipeline's Python runs three times without computing its models, each of which is exported
    once per call signature. No adapter per pipeline is needed.

    Args:
        pipeline: A diffusers pipeline, or any callable.
        dynamic: Names of number arguments that become inputs of the program; Python's comparisons
            with them become guards.
        components: Modules, tokenizers … by name; `pipeline.components` by default.
        source: Where the pipeline came from, stored as provenance.
        arguments: The call's arguments; texts, seeds, tensors, pictures and lists of numbers among
            them become inputs, all other values are bound.

    Returns:
        The program; `program(**arguments)` has the arguments and result of the pipeline.

    Raises:
        CaptureError: The pipeline does something that no graph can express; has the line.
    """
    return Session(pipeline, components, dynamic, source).program(arguments)


def trace_function(function: Callable[..., Any], *tensors: Tensor) -> Program:
    """Capture a function of tensors as a program; see `trace`."""
    arguments = {f"x{index}": tensor for index, tensor in enumerate(tensors)}

    def pipeline(**arguments: Tensor) -> Any:
        return function(*arguments.values())

    return Session(pipeline, getattr(function, "components", {})).program(arguments)


class Session:
    """Captures calls of one pipeline, and exports each signature of a component once for all.

    Args:
        pipeline: A diffusers pipeline, or any callable.
        components: As in `trace`.
        dynamic: As in `trace`.
        source: As in `trace`.
    """

    def __init__(
        self,
        pipeline: Callable[..., Any],
        components: Mapping[str, Any] | None = None,
        dynamic: Sequence[str] = (),
        source: str = "",
    ) -> None:
        self.pipeline, self.dynamic, self.source = pipeline, tuple(dynamic), source
        if components is None:
            components = getattr(pipeline, "components", {})
        modules = {name: c for name, c in components.items() if isinstance(c, torch.nn.Module)}
        self.component_calls = ComponentCalls(modules)
        self.digests = digests(modules)
        self.processors = {
            name: c
            for name, c in components.items()
            if not isinstance(c, (torch.nn.Module, str, int, float, type(None))) and callable(c)
        }

    def program(self, arguments: Mapping[str, Any]) -> Program:
        """Capture one call."""
        while True:
            try:
                return self._program(arguments)
            except Lifted:
                continue  # a number became an input; other exports are kept
            except CaptureError as error:
                for reason in self.component_calls.inlined.values():
                    error.add_note(reason)
                raise

    def _program(self, arguments: Mapping[str, Any]) -> Program:
        scout = RunInputs(
            perturbation.same_generators(arguments), self.processors, None, self.dynamic
        )
        self._run(scout, seed=1)
        probe, recorder = self._probe(scout)
        try:
            return self._final(arguments, probe, recorder)
        except CaptureError:
            # Where the number of tokens is not fixed, the probe's texts must have as many.
            changed = perturbation.same_lengths(scout, probe)
            if changed is None:
                raise
        probe = RunInputs(changed, self.processors, scout, self.dynamic)
        recorder, _ = self._run(probe, seed=2)
        return self._final(arguments, probe, recorder)

    def _final(self, arguments: Mapping[str, Any], probe: RunInputs, probed: Recorder) -> Program:
        copies = perturbation.same_generators(arguments)
        final = RunInputs(copies, self.processors, probe, self.dynamic, final=True)
        recorder, result = self._run(final, seed=1)
        _check_same_operators(recorder, probed)
        output = _result_structure(result, recorder)
        steps, sample = final.finish(recorder)
        root = recorder.root
        guards = _guards(recorder, probed, steps)
        g.prune_unused(root)
        call_tags.assign(root)
        for gm in root.modules():
            if isinstance(gm, fx.GraphModule):
                gm.recompile()
        used = sorted({step.asset for step in steps if isinstance(step, Processor)})
        host = Host(
            steps,
            output,
            {name: value for name, value in arguments.items() if _plain_data(value)},
            {name: save_component(self.processors[name]) for name in used},
            {name: self.processors[name] for name in used},
        )
        return Program(
            root,
            host,
            sample,
            guards=guards,
            source=self.source,
            digests=dict(self.digests),
            retrace=self._retrace(arguments),
        )

    def _probe(self, scout: RunInputs) -> tuple[RunInputs, Recorder]:
        """Run with other texts, pictures and seeds; strings such as "pt" prove not to be texts."""
        places = perturbation.texts(scout)
        while True:
            changed = perturbation.disturb(scout, perturbation.other_texts(places))
            probe = RunInputs(changed, self.processors, scout, self.dynamic)
            try:
                recorder, _ = self._run(probe, seed=2)
            except (ValueError, KeyError, AttributeError):
                if not places:
                    raise
            else:
                if perturbation.reached(probe, places) == places:
                    return probe, recorder
            places = perturbation.reached(probe, places)

    def _run(self, sources: RunInputs, seed: int) -> tuple[Recorder, Any]:
        recorder = Recorder(self.component_calls.weights(), sources)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(sources.watching())
            stack.enter_context(self.component_calls.recording(recorder, seed))
            stack.enter_context(TorchFunctionRecorder(recorder, sources))
            stack.enter_context(recorder)
            result = self.pipeline(**sources.start(recorder))
        return recorder, result

    def _retrace(self, arguments: Mapping[str, Any]) -> Callable[..., Program]:
        def retrace(*, scheduler: Any = None, **changes: Any) -> Program:
            """Capture again with other arguments, and with another scheduler where one is given."""
            with _swapped(self.pipeline, "scheduler", scheduler):
                # Captures share the graphs of components: what passes rewrite must not be these.
                return self.program({**arguments, **changes}).clone()

        retrace.pipeline = self.pipeline  # type: ignore[attr-defined]
        return retrace


@contextlib.contextmanager
def _swapped(owner: Any, name: str, value: Any) -> Any:
    if value is None:
        yield
        return
    old = vars(owner)[name]
    vars(owner)[name] = value
    try:
        yield
    finally:
        vars(owner)[name] = old


def _plain_data(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, str) and _plain_data(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(_plain_data(item) for item in value)
    return isinstance(value, (str, int, float, bool, type(None)))


def _check_same_operators(final: Recorder, probe: Recorder) -> None:
    """Raise a `CaptureError` where runs with other texts and pictures have other operators."""

    def operators(recorder: Recorder) -> list[fx.Node]:
        return [n for n in recorder.root.graph.nodes if n.op in ("call_function", "call_module")]

    ours, theirs = operators(final), operators(probe)
    for a, b in zip(ours, theirs, strict=False):
        if a.target != b.target or not _same_args(a, b, final, probe):
            where = a.meta.get("where", "?")
            raise CaptureError(
                f"{where}: what the pipeline computes here depends in Python on the text, picture "
                "or seed; make it depend on tensors alone, or pass tensors (prompt_embeds, "
                "latents) in their place"
            )
    if len(ours) != len(theirs):
        where = (ours + theirs)[min(len(ours), len(theirs))].meta.get("where", "?")
        raise CaptureError(
            f"{where}: whether this runs depends in Python on the text, picture or seed"
        )


def _same_args(a: fx.Node, b: fx.Node, final: Recorder, probe: Recorder) -> bool:
    if len(a.args) != len(b.args) or a.kwargs.keys() != b.kwargs.keys():
        return False
    pairs = [*zip(a.args, b.args, strict=True), *((a.kwargs[k], b.kwargs[k]) for k in a.kwargs)]
    return all(_same_arg(x, y, final, probe) for x, y in pairs)


def _same_arg(x: Any, y: Any, final: Recorder, probe: Recorder) -> bool:
    if isinstance(x, fx.Node) and isinstance(y, fx.Node):
        if x.op == "get_attr" and y.op == "get_attr":
            a, b = g.attribute(final.root, str(x.target)), g.attribute(probe.root, str(y.target))
            return a is b or (
                a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
            )
        return format_type(x.meta["val"]) == format_type(y.meta["val"])
    if isinstance(x, (list, tuple)) and isinstance(y, (list, tuple)):
        return len(x) == len(y) and all(
            _same_arg(i, j, final, probe) for i, j in zip(x, y, strict=True)
        )
    return type(x) is type(y) and bool(x == y)


def _guards(final: Recorder, probe: Recorder, steps: Sequence[InputStep]) -> Guards | None:
    """Return guards of what Python read of the caller's values; None if it read nothing.

    A value read of texts alone needs no guard where the probe read another: it ran the same
    operators.
    """
    formals = g.placeholders(final.root)
    texts = [isinstance(step, Processor) for step in steps for _ in range(step.count)]
    texts_only = {node for node, is_text in zip(formals, texts, strict=True) if is_text}
    body = g.new_body("guards")
    env: dict[fx.Node, fx.Node] = {}
    g.copy_nodes(formals, final.root, body, env)
    values, expected, where, from_text = [], [], [], []
    others = [value for _, value, _ in probe.reads]
    for index, (node, value, place) in enumerate(final.reads):
        needed = g.ancestors([node])
        only_text = {n for n in needed if n.op == "placeholder"} <= texts_only
        if only_text and index < len(others) and others[index] != value:
            continue
        g.copy_nodes([n for n in final.root.graph.nodes if n in needed], final.root, body, env)
        values.append(env[node])
        expected.append(value)
        where.append(str(place))
        from_text.append(only_text)
    if not values:
        return None
    body.graph.output(tuple(values))
    g.set_outputs(body, values)
    body.recompile()
    return Guards(body, expected, where, from_text)


# The result of the pipeline


def _result_structure(result: Any, recorder: Recorder) -> Any:
    """Return a result's structure as JSON (see `outputs.pack`), and set the graph's outputs."""
    outs: list[fx.Node] = []
    used: set[int] = set()

    def index(node: fx.Node) -> int:
        if node not in outs:
            outs.append(node)
        return outs.index(node)

    def array(value: np.ndarray | Image.Image) -> Any:
        for number, (escaped, node, _) in enumerate(recorder.escapes):
            place = _index_in(escaped, value)
            if place is not None:
                used.add(number)
                kind = "array" if isinstance(value, np.ndarray) else "image"
                return {kind: [index(node), *place]}
        if isinstance(value, np.ndarray) and value.ndim and len(value):
            return {"stack": [array(item) for item in value]}
        raise CaptureError(
            "the pipeline turns its result into a form on the host that is not known; "
            "ask for output_type='pt'"
        )

    def visit(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {"tensor": index(recorder.value(value))}
        if isinstance(value, (np.ndarray, Image.Image)):
            return array(value)
        if hasattr(value, "__dataclass_fields__") or (
            isinstance(value, dict) and type(value) is not dict
        ):
            fields = dict(value) if isinstance(value, dict) else vars(value)
            names = {**fields, **getattr(value, "__dataclass_fields__", {})}
            ordered = [n for n in getattr(value, "__dataclass_fields__", names) if n in names]
            kind = f"{type(value).__module__}:{type(value).__qualname__}"
            return {"class": [kind, {n: visit(getattr(value, n)) for n in ordered}]}
        if isinstance(value, dict):
            return {"dict": {k: visit(v) for k, v in value.items()}}
        if isinstance(value, (list, tuple)):
            return {"list" if isinstance(value, list) else "tuple": [visit(v) for v in value]}
        if _plain_data(value):
            return {"value": value}
        raise CaptureError(
            f"the pipeline returns a {type(value).__name__}, which has no tensors that are known"
        )

    data = visit(result)
    for number, (_, _, where) in enumerate(recorder.escapes):
        if number not in used:
            raise CaptureError(
                f"{where}: a traced value becomes a numpy array that the pipeline does not return; "
                "use torch operators"
            )
    recorder.root.graph.output(tuple(outs))
    g.set_outputs(recorder.root, outs)
    return data


def _index_in(array: np.ndarray, value: np.ndarray | Image.Image) -> tuple[int, ...] | None:
    """Return the index of a value of the result in an array; None if it is no part of it."""
    if isinstance(value, Image.Image):
        if array.ndim < 3 or array.dtype.kind != "f":
            return None
        target, ndim = np.asarray(value), 3

        def matches(part: np.ndarray) -> bool:
            if part.shape[-1] not in (1, 3, 4):
                return False
            return np.array_equal(np.asarray(to_images(part, "pil")), target)
    else:
        target, ndim = value, value.ndim

        def matches(part: np.ndarray) -> bool:
            return part.shape == target.shape and np.array_equal(
                part, target, equal_nan=part.dtype.kind == "f"
            )

    if array.ndim < ndim:
        return None
    for place in np.ndindex(array.shape[: array.ndim - ndim]):
        if matches(array[place]):
            return place
    return None
