"""Find out how the host makes a program's inputs from the caller's arguments.

Three runs see the same pipeline: a scout with the caller's arguments tells which of them are texts
and pictures, a probe runs with these replaced by others, and the final run records. What differs
between probe and final run depends on the arguments; a recipe is taken only where it reproduces
both runs' values.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, fx

from diffopt.capture.input_guesses import array_recipes, reproduces, templates
from diffopt.capture.recorder import Recorder, fail
from diffopt.capture.torch_functions import Scalar
from diffopt.errors import CaptureError
from diffopt.host.inputs import (
    Draw,
    InputStep,
    Number,
    Place,
    Processor,
    TensorArgument,
    Text,
    leaves,
    places_in,
)

# Methods by which pipelines turn texts and pictures into tensors.
_PROCESSING = ("__call__", "apply_chat_template", "encode", "preprocess", "pad")

_DRAWS = {
    "randn": "randn",
    "rand": "rand",
    "randn_like": "randn",
    "rand_like": "rand",
    "randint": "randint",
}


@dataclasses.dataclass
class HostCall:
    """One call of a tokenizer or image processor."""

    component: str
    method: str
    args: Any
    result: Any


class Sources:
    """The inputs of one run of the pipeline, in the order in which the host makes them.

    Args:
        arguments: The call's arguments.
        processors: Host components (not modules) by name.
        other: An earlier run with other texts and pictures: what differs from it is an input. None
            for the first run.
        dynamic: Names of numbers that stay inputs.
        final: Find recipes for the inputs; otherwise they are only recorded as such.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any],
        processors: Mapping[str, Any],
        other: "Sources | None",
        dynamic: Sequence[str] = (),
        *,
        final: bool = False,
    ) -> None:
        self.arguments = dict(arguments)
        self.processors = processors
        self.probe = other
        self.final = final
        self.dynamic = dynamic
        self.calls: list[HostCall] = []
        self.arrays: list[np.ndarray] = []
        self.steps: list[tuple[InputStep, list[tuple[fx.Node, Tensor]]]] = []
        self.guards: dict[Place, list[tuple[str, float, bool, str]]] = {}
        self.generators = {
            id(v): place for place, v in leaves(self.arguments) if isinstance(v, torch.Generator)
        }
        self._lists = dict(_number_lists(self.arguments))
        self._depth = 0
        # How texts are made, by the text; kept from a probe in which all cleaning shows.
        self.templates: dict[str, Text] = dict(other.templates) if other else {}
        self.recorder: Recorder | None = None

    # The caller's own tensors and numbers

    def start(self, recorder: Recorder) -> dict[str, Any]:
        """Make inputs of tensors and dynamic numbers; returns the arguments to call with."""
        self.recorder = recorder
        for place, value in leaves(self.arguments):
            if isinstance(value, Tensor):
                self.given(recorder, value, place)
        arguments = dict(self.arguments)
        for name in self.dynamic:
            value = arguments.get(name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise CaptureError(
                    f"dynamic={name!r}: the call must have a number there, got {value!r}"
                )
            tensor = torch.tensor(float(value), dtype=torch.float64)
            node = recorder.input(name, tensor)
            self.guards[(name,)] = []
            self.steps.append((Number((name,)), [(node, tensor)]))
            arguments[name] = Scalar.make(recorder, tensor, self.guards[(name,)])
        return arguments

    def given(self, recorder: Recorder, tensor: Tensor, place: Place) -> None:
        """Make a tensor of the caller's an input."""
        node = recorder.input(_name(place), tensor)
        recorder.known.add(node)
        dtype = str(tensor.dtype).removeprefix("torch.")
        self.steps.append((TensorArgument(place, dtype), [(node, tensor)]))

    def in_host(self) -> bool:
        """Tell whether a host component runs."""
        return self._depth > 0

    def place_of_list(self, value: Any) -> Place | None:
        """Return the place of a list of numbers among the arguments, or of a host call's result."""
        return self._lists.get(id(value)) if isinstance(value, list) else None

    # Random draws

    def draw(
        self, recorder: Recorder, func: Any, args: Any, kwargs: Any, tracked: list[Tensor]
    ) -> Any:
        """Run a random operator; its result is an input, drawn by the host in the same order."""
        generator = kwargs.get("generator")
        packet = func._schema.name.split("::")[1]
        if generator is not None and id(generator) not in self.generators:
            if tracked and packet not in _DRAWS:
                fail(
                    f"{packet} draws from a traced value",
                    "draw the noise with torch.randn, then transform it",
                )
            return func(
                *args, **kwargs
            )  # a generator of the pipeline's own: the same numbers every time
        if packet in ("normal_", "uniform_") and tuple(args[1:]) in ((), (0, 1), (0.0, 1.0)):
            out, packet = func(*args, **kwargs), {"normal_": "randn", "uniform_": "rand"}[packet]
        elif packet in _DRAWS:
            out, packet = func(*args, **kwargs), _DRAWS[packet]
        else:
            fail(
                f"{packet} draws random numbers in a way that can't be repeated outside",
                "use torch.randn or rand",
            )
        extra = (
            tuple(float(a) for a in args[:2] if isinstance(a, int)) if packet == "randint" else ()
        )
        if packet == "randint" and len(extra) == 1:
            extra = (0.0, *extra)
        place = self.generators.get(id(generator)) if generator is not None else None
        dtype = str(out.dtype).removeprefix("torch.")
        step = Draw(f"aten.{packet}", tuple(out.shape), dtype, extra, place)
        node = recorder.input("noise" if packet == "randn" else packet, out)
        if func._schema.is_mutable:
            recorder.write(out, node)
        self.steps.append((step, [(node, out)]))
        return out

    # Tokenizers, image processors, numpy

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """See host components' calls and tensors made of arrays for the time of the context."""
        originals = [(p, type(p)) for p in self.processors.values()]
        from_numpy = torch.from_numpy
        try:
            for name, processor in self.processors.items():
                processor.__class__ = self._watched(name, type(processor))
            torch.from_numpy = self._from_numpy(from_numpy)  # type: ignore[assignment]
            yield
        finally:
            torch.from_numpy = from_numpy
            for processor, kind in originals:
                processor.__class__ = kind

    def _watched(self, name: str, kind: type) -> type:
        def method(original: Callable[..., Any], label: str) -> Callable[..., Any]:
            def call(processor: Any, *args: Any, **kwargs: Any) -> Any:
                self._depth += 1
                try:
                    result = original(processor, *args, **kwargs)
                finally:
                    self._depth -= 1
                if self._depth == 0 and not isinstance(result, str):
                    self._called(HostCall(name, label, (args, kwargs), result))
                return result

            return call

        methods = {m: method(getattr(kind, m), m) for m in _PROCESSING if hasattr(kind, m)}
        return type(
            kind.__name__, (kind,), {**methods, "__module__": kind.__module__, "__slots__": ()}
        )

    def _called(self, call: HostCall) -> None:
        index = len(self.calls)
        self.calls.append(call)
        if self.probe is None or self.recorder is None:
            return
        if index >= len(self.probe.calls):
            return
        other = self.probe.calls[index].args
        encoded = self.encode(call.args, other) if self.final else None
        if (self.final and not places_in(encoded)) or (
            not self.final and _texts(call.args) == _texts(other)
        ):
            return
        nodes, keys = [], []
        for key, tensor in tensors_of(call.result):
            node = self.recorder.input(f"{call.component}_{key}" if key else call.component, tensor)
            self.recorder.known.add(node)
            nodes.append((node, tensor))
            keys.append(key)
        step = Processor(call.component, call.method, encoded, tuple(keys))
        self.steps.append((step, nodes))

    def encode(self, final: Any, probe: Any) -> Any:
        """Return a host call's arguments as JSON, the caller's texts and pictures as places."""
        if isinstance(final, str):
            return final if final == probe else {"text": self._text(final, probe).parts}
        for place, value in leaves(self.arguments):
            if value is final and not isinstance(final, (str, int, float, bool, type(None))):
                return {"place": list(place)}
        if isinstance(final, (list, tuple)):
            kind = "tuple" if isinstance(final, tuple) else "list"
            if not isinstance(probe, (list, tuple)) or len(final) != len(probe):
                fail("how a host component is called depends on the texts", "pass prompt_embeds")
            return {kind: [self.encode(f, p) for f, p in zip(final, probe, strict=True)]}
        if isinstance(final, Mapping):
            return {"dict": {k: self.encode(v, probe[k]) for k, v in final.items()}}
        try:
            json.dumps(final)
        except TypeError:
            fail(
                f"a host component is called with {type(final).__name__}",
                "pass texts, numbers or pictures",
            )
        return final

    def _text(self, final: str, probe: str) -> Text:
        if final in self.templates:
            return self.templates[final]
        assert self.probe is not None
        ours = dict(leaves(self.arguments))
        changed = [
            (place, value)
            for place, value in leaves(self.probe.arguments)
            if isinstance(value, str) and ours.get(place) != value
        ]
        for parts in templates(changed, probe):
            text = Text(parts)
            if text.render(self.arguments) == final:
                self.templates[final] = text
                return text
        fail(
            f"the text {final!r} is made from the arguments in a way that is not a template",
            "switch the pipeline's text cleaning off, or pass prompt_embeds",
        )

    def _from_numpy(
        self, original: Callable[[np.ndarray], Tensor]
    ) -> Callable[[np.ndarray], Tensor]:
        def from_numpy(array: np.ndarray) -> Tensor:
            tensor = original(array)
            if self._depth or self.recorder is None:
                return tensor
            for escaped, _, where in self.recorder.escapes:
                if array is escaped or np.shares_memory(array, escaped):
                    raise CaptureError(
                        f"{where}: numpy computes on a traced value; use torch operators instead"
                    )
            index = len(self.arrays)
            self.arrays.append(np.array(array))
            if self.probe is not None and index < len(self.probe.arrays):
                self._array(tensor, array, self.probe.arrays[index])
            return tensor

        return from_numpy

    def _array(self, tensor: Tensor, final: np.ndarray, probe: np.ndarray) -> None:
        if np.array_equal(final, probe, equal_nan=final.dtype.kind in "fc"):
            return
        assert self.probe is not None
        assert self.recorder is not None
        for _, _, where in self.recorder.escapes:
            raise CaptureError(
                f"{where}: numpy computes on a traced value; use torch operators instead"
            )
        if not self.final:
            self.recorder.known.add(self.recorder.input("array", tensor))
            return
        for step in array_recipes(self.arguments, final):
            if reproduces(step, self.arguments, final) and reproduces(
                step, self.probe.arguments, probe
            ):
                node = self.recorder.input(_name(step.place), tensor)
                self.recorder.known.add(node)
                self.steps.append((step, [(node, tensor)]))
                return
        fail(
            "a numpy array made from the arguments enters here, which is neither a resized "
            "picture nor as it was given",
            "pass the argument as a tensor",
        )

    # The result

    def finish(self, recorder: Recorder) -> tuple[list[InputStep], list[Tensor]]:
        """Put the inputs in the order of the steps; returns the steps and the inputs' values."""
        steps: list[InputStep] = []
        ordered: list[fx.Node] = []
        sample: list[Tensor] = []
        read = {node for node, _, _ in recorder.reads}
        for step, values in self.steps:
            used = [i for i, (node, _) in enumerate(values) if node.users or node in read]
            if isinstance(step, Processor):
                if not used:
                    continue
                step = dataclasses.replace(step, keys=tuple(step.keys[i] for i in used))
            elif isinstance(step, Number):
                used = [0]
                step = dataclasses.replace(step, guards=tuple(self.guards[step.place]))
            elif not used and not isinstance(step, Draw):
                continue
            else:
                used = [0]
            steps.append(step)
            ordered += [values[i][0] for i in used]
            sample += [values[i][1] for i in used]
        graph = recorder.root.graph
        for node in graph.find_nodes(op="placeholder"):
            if node not in set(ordered):
                graph.erase_node(node)
        for node in reversed(ordered):
            graph._root.append(node)
        with torch.no_grad():
            return steps, [t.detach().clone(memory_format=torch.preserve_format) for t in sample]


def _number_lists(value: Any, place: Place = ()) -> Iterator[tuple[int, Place]]:
    if isinstance(value, Mapping):
        for k, v in value.items():
            yield from _number_lists(v, (*place, k))
    elif isinstance(value, list):
        if value and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value):
            yield id(value), place
        for i, v in enumerate(value):
            yield from _number_lists(v, (*place, i))


def tensors_of(result: Any) -> list[tuple[str, Tensor]]:
    """Return the tensors of a host call's result by key."""
    if isinstance(result, Tensor):
        return [("", result)]
    if hasattr(result, "items"):
        return [(k, v) for k, v in result.items() if isinstance(v, Tensor)]
    return []


def _texts(args: Any) -> list[Any]:
    """Return what may come of the caller in a host call's arguments, comparable."""
    values = [value for _, value in leaves(args)]
    return [v for v in values if isinstance(v, str)] + [
        id(v) for v in values if isinstance(v, Image.Image)
    ]


def _name(place: Sequence[str | int]) -> str:
    return "_".join(str(part) for part in place)
