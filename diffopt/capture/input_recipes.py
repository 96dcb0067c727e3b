"""Finds the host's steps from the caller's arguments to a program's inputs.

The pipeline runs three times: a scout with the caller's arguments tells which of them are texts and
pictures, a probe runs with these replaced by others, and the final run records. Values that differ
between probe and final run depend on the arguments; a step is accepted only if it reproduces the
values of both.
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
from diffopt.capture.torch_functions import DynamicNumber
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


class RunInputs:
    """The inputs of one run of the pipeline, in the order in which the host computes them.

    Args:
        arguments: The call's arguments.
        processors: Host components (not modules) by name.
        earlier: A run with other texts and pictures: values that differ from it are inputs. None
            for the first run.
        dynamic: Names of numbers that are inputs.
        final: Find the steps to the inputs; otherwise they are only recorded as inputs.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any],
        processors: Mapping[str, Any],
        earlier: "RunInputs | None",
        dynamic: Sequence[str] = (),
        *,
        final: bool = False,
    ) -> None:
        self.arguments = dict(arguments)
        self.processors = processors
        self.earlier = earlier
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
        # By the text; taken from a probe whose texts every cleaner changes differently.
        self.templates: dict[str, Text] = dict(earlier.templates) if earlier else {}
        self.recorder: Recorder | None = None

    # The caller's own tensors and numbers

    def start(self, recorder: Recorder) -> dict[str, Any]:
        """Make tensors and dynamic numbers inputs; return the arguments to call with."""
        self.recorder = recorder
        for place, value in leaves(self.arguments):
            if isinstance(value, Tensor):
                self.add_input(recorder, value, place)
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
            arguments[name] = DynamicNumber.make(recorder, tensor, self.guards[(name,)])
        return arguments

    def add_input(self, recorder: Recorder, tensor: Tensor, place: Place) -> None:
        """Make the argument at a place an input."""
        node = recorder.input(_name(place), tensor)
        recorder.host_values.add(node)
        dtype = str(tensor.dtype).removeprefix("torch.")
        self.steps.append((TensorArgument(place, dtype), [(node, tensor)]))

    def in_host(self) -> bool:
        """Tell whether a host component runs."""
        return self._depth > 0

    def place_of_list(self, value: Any) -> Place | None:
        """Return the place of a list of numbers among the arguments."""
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
            return func(*args, **kwargs)  # the pipeline's generator: the same numbers every time
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
        """Observe calls of host components and tensors built from arrays in the context."""
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
        if self.earlier is None or self.recorder is None:
            return
        if index >= len(self.earlier.calls):
            return
        other = self.earlier.calls[index].args
        encoded = self.encode(call.args, other) if self.final else None
        if (self.final and not places_in(encoded)) or (
            not self.final and _texts(call.args) == _texts(other)
        ):
            return
        nodes, keys = [], []
        for key, tensor in tensors_of(call.result):
            node = self.recorder.input(f"{call.component}_{key}" if key else call.component, tensor)
            self.recorder.host_values.add(node)
            nodes.append((node, tensor))
            keys.append(key)
        step = Processor(call.component, call.method, encoded, tuple(keys))
        self.steps.append((step, nodes))

    def encode(self, final: Any, probe: Any) -> Any:
        """Return a host call's arguments as JSON, with the caller's texts and pictures by place."""
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
        assert self.earlier is not None
        originals = dict(leaves(self.arguments))
        changed = [
            (place, value)
            for place, value in leaves(self.earlier.arguments)
            if isinstance(value, str) and originals.get(place) != value
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
            if self.earlier is not None and index < len(self.earlier.arrays):
                self._array(tensor, array, self.earlier.arrays[index])
            return tensor

        return from_numpy

    def _array(self, tensor: Tensor, final: np.ndarray, probe: np.ndarray) -> None:
        if np.array_equal(final, probe, equal_nan=final.dtype.kind in "fc"):
            return
        assert self.earlier is not None
        assert self.recorder is not None
        for _, _, where in self.recorder.escapes:
            raise CaptureError(
                f"{where}: numpy computes on a traced value; use torch operators instead"
            )
        if not self.final:
            self.recorder.host_values.add(self.recorder.input("array", tensor))
            return
        for step in array_recipes(self.arguments, final):
            if reproduces(step, self.arguments, final) and reproduces(
                step, self.earlier.arguments, probe
            ):
                node = self.recorder.input(_name(step.place), tensor)
                self.recorder.host_values.add(node)
                self.steps.append((step, [(node, tensor)]))
                return
        fail(
            "a numpy array made from the arguments enters here, which is neither a resized "
            "picture nor as it was given",
            "pass the argument as a tensor",
        )

    # The result

    def finish(self, recorder: Recorder) -> tuple[list[InputStep], list[Tensor]]:
        """Sort the inputs by their steps, and drop unused ones; return steps and inputs' values."""
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
    """Return the texts and the ids of pictures in a host call's arguments."""
    values = [value for _, value in leaves(args)]
    return [v for v in values if isinstance(v, str)] + [
        id(v) for v in values if isinstance(v, Image.Image)
    ]


def _name(place: Sequence[str | int]) -> str:
    return "_".join(str(part) for part in place)
