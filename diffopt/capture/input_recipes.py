"""Finds the host's steps from the caller's arguments to a program's inputs.

The pipeline runs three times: a scout with the caller's arguments tells which of them are texts and
pictures, a probe runs with these replaced by others, and the final run records. Values that differ
between probe and final run depend on the arguments; a step is accepted only if it reproduces the
values of both.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor, fx

from diffopt.capture import draws, followed_code, tracked_patterns, value_tree
from diffopt.capture.dispatch_modes import location
from diffopt.capture.input_guesses import templates
from diffopt.capture.random_streams import RandomStreams
from diffopt.capture.recorder import Recorder, fail
from diffopt.capture.torch_functions import DynamicNumber
from diffopt.capture.tracked_arrays import ArrayRecorder, plain_arrays
from diffopt.capture.tracked_text import TrackedText, plain_texts, read_all
from diffopt.capture.tracked_tokens import (
    nested_numbers,
    parts_of,
    plain_tokens,
    token_lists,
    tracked,
)
from diffopt.capture.value_tree import same_bits
from diffopt.errors import CaptureError, DiffoptError
from diffopt.host.arguments import Place, items, leaves, replaced, short
from diffopt.host.array_expressions import ArrayRead, Row, evaluate, plain, same_value
from diffopt.host.inputs import (
    Computed,
    Draw,
    Expression,
    InputStep,
    Number,
    Processor,
    TensorArgument,
    Text,
    TokenRead,
    Tokens,
    places_in,
)
from diffopt.host.processors import METHODS
from diffopt.host.schema import describe
from diffopt.host.text_reads import Derived, TextRead
from diffopt.ir import graph as g

_LETTERS = (
    *("A big cat", "dog of he", "ink jam", "lemon par", "quiet su", "vow xyz", "01 234", "56 789"),
    *("!?,.:;", "'x' (y)", "&#-_/"),
)
"""Short texts in which a token that became a special one shows."""


@dataclasses.dataclass
class HostCall:
    """One call of a tokenizer or image processor."""

    component: str
    method: str
    args: Any
    result: Any
    origins: Mapping[Place, Derived]
    """Of the texts in the arguments that are the caller's, or that methods have made of them."""
    state: Any
    """What the component was when it was called."""

    @property
    def made(self) -> dict[Place, Derived]:
        """The origins of texts that methods have made."""
        return {place: origin for place, origin in self.origins.items() if origin.steps}


class RunInputs:
    """The inputs of one run of the pipeline, in the order in which the host computes them.

    Args:
        arguments: The call's arguments.
        processors: Host components (not modules) by name.
        earlier: A run with other texts and pictures: values that differ from it are inputs. None
            for the first run.
        dynamic: Names of numbers that are inputs.
        final: Find the steps to the inputs; otherwise they are only recorded as inputs.
        lists: Whether lists of numbers of which tensors are made are inputs.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any],
        processors: Mapping[str, Any],
        earlier: "RunInputs | None",
        dynamic: Sequence[str] = (),
        *,
        final: bool = False,
        lists: bool = True,
    ) -> None:
        self.arguments = dict(arguments)
        self.processors = processors
        self.earlier = earlier
        self.final = final
        self.dynamic, self.lists = dynamic, lists
        self.calls: list[HostCall] = []
        self.arrays: list[np.ndarray] = []
        self.steps: list[tuple[InputStep, list[tuple[fx.Node, Tensor]]]] = []
        self.guards: dict[Place, list[tuple[str, float, bool, str]]] = {}
        self.streams: RandomStreams = RandomStreams(
            self.arguments, earlier.streams if earlier else None
        )
        self._lists = dict(_number_lists(self.arguments)) if lists else {}
        self.used_lists: set[Place] = set()
        self.computed: list[fx.Node] = []
        """Values that are computed of inputs and that host components are called with."""
        self.tokens: dict[Place, list[int]] = {}
        """The lists of tokens that host components returned, by the call and the place in it."""
        self.joined: list[list[Any]] = []
        """The lists of numbers of which tensors were made, after the first call with tokens."""
        self.encoded: dict[int, Any] = {}
        self._token_reads: dict[tuple[int, Place, str], tuple[Any, str]] = {}
        self.text_reads: list[TextRead] = []
        self.array_reads: list[ArrayRead] = []
        self.array_recorder = ArrayRecorder(self._note_array_read)
        self._depth = 0
        # By the text's place in the host calls; taken from a probe whose texts every cleaner
        # changes differently.
        self.templates: dict[Place, Text] = dict(earlier.templates) if earlier else {}
        self.recorder: Recorder | None = None
        self._states: dict[str, Any] = {}

    # The caller's own tensors and numbers

    def start(self, recorder: Recorder) -> dict[str, Any]:
        """Make tensors and dynamic numbers inputs; return the arguments to call with."""
        self.recorder = recorder
        self.streams.start()
        for place, value in leaves(self.arguments):
            if isinstance(value, Tensor):
                self.add_input(recorder, value, place)
        texts = {p: v for p, v in leaves(self.arguments) if isinstance(v, str)}
        tracked = {p: TrackedText.make(v, Derived(p), self._note_read) for p, v in texts.items()}
        for place, value in leaves(self.arguments):
            if isinstance(value, (np.ndarray, Image.Image)):
                tracked[place] = self.array_recorder.tracked(value, place)
        arguments: dict[str, Any] = replaced(dict(self.arguments), tracked)
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

    def _note_read(self, read: TextRead) -> None:
        if not self.in_host() and read not in self.text_reads:
            self.text_reads.append(read)

    def _note_array_read(self, rows: list[Row], value: Any, where: str) -> None:
        """Note a value that Python read of pictures or arrays; None stands for all of one."""
        value = evaluate(rows, self.arguments) if value is None else value
        read = ArrayRead(rows, plain(value), where)
        if read not in self.array_reads:
            self.array_reads.append(read)

    def reads_to_check(self, inputs: Set[Place]) -> tuple[list[TextRead], list[ArrayRead]]:
        """Return what new arguments must give, too: what Python read of those that are inputs.

        A question needs no guard where the earlier run, which did the same, got the other answer,
        and that to this question alone.
        """
        assert self.earlier is not None
        reads: list[TextRead | ArrayRead] = [*self.text_reads, *self.array_reads]
        earlier: list[TextRead | ArrayRead] = [
            *self.earlier.text_reads,
            *self.earlier.array_reads,
        ]
        answers = {read.about: read.result for read in earlier}
        others = [read for read in reads if answers.get(read.about, read.result) != read.result]
        alike = [read.about for read in reads] == [read.about for read in earlier]
        # What made the texts of host components, too
        alike = alike and [c.origins for c in self.calls] == [c.origins for c in self.earlier.calls]
        is_free = alike and len(others) == 1 and isinstance(others[0].result, bool)
        guarded = [
            read
            for read in reads
            if not (is_free and read is others[0]) and not inputs.isdisjoint(read.places)
        ]
        texts = [read for read in guarded if isinstance(read, TextRead)]
        return texts, [read for read in guarded if isinstance(read, ArrayRead)]

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
        place = self._lists.get(id(value)) if isinstance(value, list) else None
        if place is not None:
            self.used_lists.add(place)
        return place

    def output(self, array: np.ndarray, number: int) -> np.ndarray:
        """Return the values of a traced tensor as an array whose operations are recorded."""
        return self.array_recorder.output(array, number)  # type: ignore[no-any-return]

    def _note_tokens(self, index: int, place: Place, what: str, value: Any) -> None:
        if not self.in_host():
            self._token_reads.setdefault((index, place, what), (value, str(location())))

    def token_reads(self) -> list[TokenRead]:
        """Return what new texts' tokens must be, too."""
        reads = self._token_reads.items()
        return [
            TokenRead(self._source((index, *place)), what, value, where)
            for (index, place, what), (value, where) in reads
            if index in self.encoded
        ]

    def _source(self, key: Place) -> list[Any]:
        call = self.calls[key[0]]
        return [call.component, call.method, self.encoded[key[0]], list(key[1:])]

    def are_tokens(self, value: Any) -> bool:
        """Tell whether a list depends on the tokens that host components returned."""
        numbers = nested_numbers(value) if self.tokens else None
        if not numbers:
            return False
        self.joined.append(numbers)
        index = len(self.joined) - 1
        earlier = self.earlier.joined[index : index + 1] if self.earlier else []
        return bool(earlier) and earlier[0] != numbers

    def add_tokens(self, recorder: Recorder, tensor: Tensor) -> None:
        """Make a tensor of the list that `are_tokens` has seen last an input."""
        assert self.earlier is not None
        parts: Any = None
        if self.final:
            parts = self._parts(self.joined[-1], self.earlier.joined[len(self.joined) - 1])
            if parts is None:
                fail(
                    "a tensor is made of numbers of tokens that Python has changed",
                    "make it a tensor first (return_tensors='pt')",
                )
        node = recorder.input("tokens", tensor)
        recorder.host_values.add(node)
        self.steps.append((Tokens(parts, str(tensor.dtype)[6:]), [(node, tensor)]))

    def _parts(self, final: list[Any], probe: list[Any]) -> list[Any] | None:
        """Return how nested lists are joined of tokens, as `inputs.joined` takes it."""
        assert self.earlier is not None
        if any(isinstance(row, list) for row in (*final, *probe)):
            if len(final) != len(probe):
                return None
            rows = [self._parts(*pair) for pair in zip(final, probe, strict=True)]
            return None if None in rows else rows
        theirs = self.earlier.tokens
        ours = {k: v for k, v in self.tokens.items() if k[0] in self.encoded and k in theirs}
        known = {key: (numbers, theirs[key]) for key, numbers in ours.items()}
        parts = parts_of(final, probe, known)
        if parts is None:
            return None
        return [{"of": self._source(p["of"])} if isinstance(p, dict) else p for p in parts]

    # Random draws

    def draw(
        self, recorder: Recorder, func: Any, args: Any, kwargs: Any, tracked: list[Tensor]
    ) -> Any:
        """Run a random operator; its result is an input, drawn by the host in the same order."""
        if self.in_host():
            fail(
                "a host component draws random numbers", "pass its result (prompt_embeds, latents)"
            )
        generator = kwargs.get("generator")
        composed = draws.composition(func)
        if composed is not None:
            return draws.compose(recorder, composed, func, args, kwargs)
        with self.streams.draw(generator) as origin:
            before = (torch.default_generator if generator is None else generator).get_state()
            out = func(*args, **kwargs)
        if origin is None:
            if func._schema.is_mutable and tracked:
                recorder.write(out, recorder.constant(out))
            return out
        step = draws.step(func, args, kwargs, out, origin.place, origin.stream)
        draws.expect_repeatable(step, before, out)
        node = recorder.input("noise" if step.op == "aten.randn" else step.op[5:].rstrip("_"), out)
        if func._schema.is_mutable:
            recorder.write(out, node)
        self.steps.append((step, [(node, out)]))
        return out

    # Tokenizers, image processors, numpy

    @contextlib.contextmanager
    def watching(self, pipeline: Any) -> Iterator[None]:
        """Observe calls of host components, texts, and tensors built from arrays in the context."""
        originals = [(p, type(p)) for p in self.processors.values()]
        from_numpy = self._from_numpy(torch.from_numpy)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.array_recorder.watching())
            stack.enter_context(mock.patch.object(torch, "from_numpy", from_numpy))
            if any(isinstance(value, str) for _, value in leaves(self.arguments)):
                stack.enter_context(tracked_patterns.watching())
                stack.enter_context(followed_code.watching(pipeline))
            try:
                for name, processor in self.processors.items():
                    processor.__class__ = self._watched(name, type(processor))
                yield
            finally:
                for processor, kind in originals:
                    processor.__class__ = kind

    def _watched(self, name: str, kind: type) -> type:
        def method(original: Callable[..., Any], label: str) -> Callable[..., Any]:
            def call(processor: Any, *args: Any, **kwargs: Any) -> Any:
                args, kwargs = plain_tokens((args, kwargs))
                state = self._state(name, processor)
                texts = [row for row in leaves((args, kwargs)) if isinstance(row[1], TrackedText)]
                origins = {place: text.origin for place, text in texts}
                args, kwargs = plain_texts((args, kwargs))
                self._depth += 1
                try:
                    with self.array_recorder.unwatched():
                        plain, named = plain_arrays((args, kwargs))
                        result = original(processor, *plain, **named)
                finally:
                    self._depth -= 1
                if self._depth == 0 and not isinstance(result, str):
                    if not self.follows(result):
                        read_all(text for _, text in texts)
                    self._called(HostCall(name, label, (args, kwargs), result, origins, state))
                    if self.lists:
                        result = tracked(result, partial(self._note_tokens, len(self.calls) - 1))
                return result

            return call

        def set_attribute(processor: Any, attribute: str, value: Any) -> None:
            self._states.pop(name, None)
            kind.__setattr__(processor, attribute, value)  # type: ignore[call-arg]

        methods = {m: method(getattr(kind, m), m) for m in METHODS if hasattr(kind, m)}
        methods["__setattr__"] = set_attribute
        return type(
            kind.__name__, (kind,), {**methods, "__module__": kind.__module__, "__slots__": ()}
        )

    def follows(self, result: Any) -> bool:
        """Tell whether what Python makes of a host call's result is seen."""
        return bool(tensors_of(result) or (self.lists and token_lists(result)))

    def _state(self, name: str, processor: Any) -> Any:
        """Return what a host component is, described anew where an attribute was set since."""
        if name not in self._states:
            self._states[name] = value_tree.describe(vars(processor))
        return self._states[name]

    def states(self, name: str) -> list[Any]:
        """Return what a host component was at each call, with other texts, too."""
        runs = (run for run in (self, self.earlier) if run is not None)
        return [call.state for run in runs for call in run.calls if call.component == name]

    def _called(self, call: HostCall) -> None:
        index = len(self.calls)
        self.calls.append(call)
        if self.lists:
            self.tokens |= {(index, *place): value for place, value in token_lists(call.result)}
        if self.earlier is None or self.recorder is None:
            return
        if index >= len(self.earlier.calls):
            return
        other = self.earlier.calls[index].args
        given = {id(value) for _, value in leaves(self.arguments)}
        traced = [value for _, value in leaves(call.args) if self._is_traced(value)]
        computed = [value for value in traced if id(value) not in given]
        if computed:
            results = tensors_of(call.result)
            if results and all(self._is_traced(tensor) for _, tensor in results):
                return  # what it computes of traced values is recorded
            if (
                not {self.recorder.node_of(value) for value in computed}
                <= self.recorder.host_values
            ):
                fail(
                    "a host component is called with a value that a model computes, or random "
                    "numbers",
                    "pass what it returns as the argument",
                )
        if not traced and not call.made and _is_same(call.args, other):
            return  # in every call
        encoded = self.encode(call.args, other, (index,)) if self.final else None
        if self.final and not computed and not places_in(encoded):
            return
        self.encoded[index] = encoded
        nodes, keys = [], []
        for key, tensor in tensors_of(call.result):
            node = self.recorder.input(f"{call.component}_{key}" if key else call.component, tensor)
            self.recorder.host_values.add(node)
            nodes.append((node, tensor))
            keys.append(key)
        step = Processor(call.component, call.method, encoded, tuple(keys))
        self.steps.append((step, nodes))

    def _is_traced(self, value: Any) -> bool:
        assert self.recorder is not None
        return isinstance(value, Tensor) and self.recorder.node_of(value) is not None

    def encode(self, final: Any, probe: Any, at: Place) -> Any:
        """Return a host call's arguments as JSON, with the caller's texts and pictures by place.

        Args:
            final: The arguments.
            probe: Those in the earlier run.
            at: The number of the call, and the place of these in its arguments.
        """
        if isinstance(final, str):
            if final == probe and at[1:] not in self.calls[at[0]].made:
                return final
            return {"text": self._text(final, probe, at).parts}
        if isinstance(final, (Image.Image, np.ndarray)):
            rows = self._expression(final, probe)
            if rows is not None:
                return {"place": rows[0][1][0]} if len(rows) == 1 else {"expression": rows}
        for place, value in leaves(self.arguments):
            if value is final and not isinstance(final, (str, int, float, bool, type(None))):
                return {"place": list(place)}
        if isinstance(final, Tensor) and self.recorder is not None and self._is_traced(final):
            self.computed.append(self.recorder.value(final))
            return {"computed": len(self.computed) - 1}
        if isinstance(final, list) and final != probe and self.tokens and nested_numbers(final):
            parts = self._parts(final, probe) if isinstance(probe, list) else None
            if parts is not None:
                return {"tokens": parts}
        if isinstance(final, (list, tuple)):
            kind = "tuple" if isinstance(final, tuple) else "list"
            if not isinstance(probe, (list, tuple)) or len(final) != len(probe):
                fail("how a host component is called depends on the texts", "pass prompt_embeds")
            pairs = enumerate(zip(final, probe, strict=True))
            return {kind: [self.encode(f, p, (*at, index)) for index, (f, p) in pairs]}
        if isinstance(final, Mapping):
            return {"dict": {k: self.encode(v, probe[k], (*at, k)) for k, v in final.items()}}
        try:
            json.dumps(final)
        except TypeError:
            fail(
                f"a host component is called with {type(final).__name__}",
                "pass texts, numbers or pictures",
            )
        if final != probe:
            fail("how a host component is called depends on the texts", "pass prompt_embeds")
        return final

    def _text(self, final: str, probe: str, at: Place) -> Text:
        assert self.earlier is not None

        def fits(text: Text) -> bool:
            return text.render(self.arguments) == final

        origin = self.calls[at[0]].origins.get(at[1:])
        if origin is not None:
            made = Text(({"derived": origin.to_json()},))
            theirs = self.earlier.calls[at[0]].origins.get(at[1:])
            # Where the other run went another way, a guard says so.
            went_another_way = theirs is not None and theirs != origin
            if fits(made) and (went_another_way or made.render(self.earlier.arguments) == probe):
                self.templates[at] = made
                return made
        if at in self.templates and fits(self.templates[at]):
            return self.templates[at]
        originals = dict(leaves(self.arguments))
        changed = [
            (place, value)
            for place, value in leaves(self.earlier.arguments)
            if isinstance(value, str) and originals.get(place) != value
        ]
        for parts in templates(changed, probe):
            if fits(Text(parts)):
                self.templates[at] = Text(parts)
                return self.templates[at]
        fail(
            f"the text {short(final)} is made from the arguments in a way that is not a template",
            "switch the pipeline's text cleaning off, or pass prompt_embeds",
        )

    def _from_numpy(
        self, original: Callable[[np.ndarray], Tensor]
    ) -> Callable[[np.ndarray], Tensor]:
        def from_numpy(array: np.ndarray) -> Tensor:
            plain = array.view(np.ndarray)
            tensor = original(np.asarray(plain))
            if self._depth or self.recorder is None:
                return tensor
            if self.array_recorder.depends_on_outputs(array):
                fail("numpy computes on a traced value", "use torch operators instead")
            index = len(self.arrays)
            self.arrays.append(plain.copy())
            if any(map(self.recorder.is_written, self.array_recorder.exported(array, tensor))):
                fail(
                    "an array enters here whose memory a tensor shares that was written",
                    "write a clone",
                )
            if self.earlier is not None and index < len(self.earlier.arrays):
                self._array(tensor, array, self.earlier.arrays[index])
            return tensor

        return from_numpy

    def _array(self, tensor: Tensor, array: np.ndarray, probe: np.ndarray) -> None:
        if same_value(plain_arrays(array), probe):
            return
        assert self.earlier is not None
        assert self.recorder is not None
        if not self.final:
            self.recorder.host_values.add(self.recorder.input("array", tensor))
            return
        rows = self._expression(array, probe)
        if rows is not None:
            place = tuple(rows[0][1][0])
            whole = TensorArgument(place, str(tensor.dtype).removeprefix("torch."))
            step = whole if len(rows) == 1 else Expression(rows)
            node = self.recorder.input(_name(place), tensor)
            self.recorder.host_values.add(node)
            self.steps.append((step, [(node, tensor)]))
            return
        fail(
            "a numpy array enters here that is made of the arguments by functions which are not "
            "recorded",
            "pass the argument as a tensor",
        )

    def _expression(self, final: Any, probe: Any) -> list[Row] | None:
        """Return the rows that compute a picture or an array in this run and in the earlier one."""
        assert self.earlier is not None
        rows = self.array_recorder.expression(final)
        runs = (self.arguments, final), (self.earlier.arguments, probe)
        if rows is None or not all(same_value(evaluate(rows, a), plain_arrays(v)) for a, v in runs):
            return None
        return rows

    def is_like(self, name: str, loaded: Any) -> bool:
        """Tell whether a host component gives what the pipeline's own gives, bit by bit.

        For the calls of this run, and for these with other texts in place of the caller's.
        """
        for index, call in enumerate(self.calls):
            if call.component != name:
                continue
            places = [(index, *place) for place, _ in leaves(call.args)]
            made = {p[1:]: self.templates[p] for p in places if p in self.templates}
            for letters in (None, *(_LETTERS if made else ())):
                texts = {} if letters is None else self._rendered(made, letters)
                if texts is None:
                    continue
                args, kwargs = plain_arrays(replaced(call.args, texts))
                results = [
                    _values(getattr(component, call.method)(*args, **kwargs))
                    for component in (self.processors[name], loaded)
                ]
                keys = [[key for key, _ in result] for result in results]
                pairs = zip(*results, strict=False)
                if keys[0] != keys[1] or not all(same_bits(a, b) for (_, a), (_, b) in pairs):
                    return False
        return True

    def _rendered(self, made: Mapping[Place, Text], text: str) -> dict[Place, str] | None:
        """Return texts of a host call for one text in place of all of the caller's.

        None where none are made of this text.
        """
        given = {p: text for p, v in leaves(self.arguments) if isinstance(v, str)}
        arguments = replaced(self.arguments, given)
        try:
            return {place: template.render(arguments) for place, template in made.items()}
        except DiffoptError:
            return None

    # The result

    def finish(self, recorder: Recorder) -> tuple[list[InputStep], list[Computed], list[Tensor]]:
        """Sort the inputs by their steps, and drop unused ones.

        Returns:
            The steps, what they need computed of earlier inputs, and the inputs' values.
        """
        steps: list[InputStep] = []
        ordered: list[fx.Node] = []
        sample: list[Tensor] = []
        read = {*(node for node, _, _ in recorder.reads), *self.computed}
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
        computed = [_computed(recorder.root, node) for node in self.computed]
        with torch.no_grad():
            return (
                steps,
                computed,
                [t.detach().clone(memory_format=torch.preserve_format) for t in sample],
            )


def _computed(root: fx.GraphModule, node: fx.Node) -> Computed:
    """Return the graph that computes a value of inputs alone."""
    needed = g.ancestors([node]) | {node}
    inputs = [(i, formal) for i, formal in enumerate(g.placeholders(root)) if formal in needed]
    body = g.new_body("computed")
    env: dict[fx.Node, fx.Node] = {}
    g.copy_nodes([formal for _, formal in inputs], root, body, env)
    g.copy_nodes([n for n in root.graph.nodes if n in needed], root, body, env)
    body.graph.output((env[node],))
    g.set_outputs(body, [env[node]])
    body.recompile()
    return Computed(body, [index for index, _ in inputs])


def _number_lists(value: Any, place: Place = ()) -> Iterator[tuple[int, Place]]:
    if isinstance(value, list) and value and all(type(v) in (int, float) for v in value):
        yield id(value), place
    for key, part in items(value) or ():
        yield from _number_lists(part, (*place, key))


def tensors_of(result: Any) -> list[tuple[str, Tensor]]:
    """Return the tensors of a host call's result by key."""
    if isinstance(result, Tensor):
        return [("", result)]
    if hasattr(result, "items"):
        return [(k, v) for k, v in result.items() if isinstance(v, Tensor)]
    return []


def _values(result: Any) -> list[tuple[Any, Tensor]]:
    lists = [(place, torch.tensor(numbers)) for place, numbers in token_lists(result)]
    return [*tensors_of(result), *lists]


def _is_same(a: Any, b: Any) -> bool:
    """Tell whether two values have the same structure and contents."""
    if describe(a) != describe(b):
        return False
    pairs = zip(leaves(a), leaves(b), strict=True)
    return all(
        x is y or (torch.equal(x, y) if isinstance(x, Tensor) else "object" not in describe(x))
        for (_, x), (_, y) in pairs
    )


def _name(place: Place) -> str:
    return re.sub(r"\W", "_", "_".join(str(part) for part in place))
