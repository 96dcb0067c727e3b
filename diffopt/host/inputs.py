"""Host-side preparation: from the arguments of the pipeline's call to a graph's flat inputs.

How each input is computed from the arguments is a list of steps that run in order: tokenizer calls,
random draws, pictures, numbers, tensors that are arguments themselves. The steps are plain data
(JSON), so that an engine runs them without the pipeline's code.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffopt.errors import DiffoptError
from diffopt.host.processors import load_component

Place = tuple[str | int, ...]
"""The path of a value in the call's arguments: ("prompt", 0) is the first of a list of prompts."""

CLEANERS: dict[str, Callable[[str], str]] = {
    "": lambda text: text,
    "strip": str.strip,
    "rstrip": str.rstrip,
    "lower": str.lower,
    "lower-rstrip": lambda text: text.lower().rstrip(),
    "lower-strip": lambda text: text.lower().strip(),
}


def value_at(arguments: Mapping[str, Any], place: Sequence[str | int]) -> Any:
    """Return the value at a place of the arguments; None where there is none."""
    value: Any = arguments
    for part in place:
        if isinstance(value, str):
            return None
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def leaves(value: Any, place: Place = ()) -> list[tuple[Place, Any]]:
    """Return every leaf of nested lists and dictionaries with its place."""
    if isinstance(value, Mapping):
        return [leaf for k, v in value.items() for leaf in leaves(v, (*place, k))]
    if isinstance(value, (list, tuple)):
        return [leaf for i, v in enumerate(value) for leaf in leaves(v, (*place, i))]
    return [(place, value)]


@dataclasses.dataclass(frozen=True)
class TensorArgument:
    """An argument that is a tensor, an array or a list of numbers."""

    place: Place
    dtype: str
    count = 1  # of the tensors that the step returns

    def run(self, call: "CallArguments") -> list[Tensor]:
        """Return the argument as a tensor."""
        value = value_at(call.arguments, self.place)
        if value is None:
            raise DiffoptError(
                f"missing argument {place_text(self.place)!r}: the program was traced with it"
            )
        dtype = getattr(torch, self.dtype)
        return [torch.as_tensor(value, dtype=dtype)]


@dataclasses.dataclass(frozen=True)
class Text:
    """A template for the caller's texts, each normalized by one of `CLEANERS`."""

    parts: tuple[str | tuple[Place, str], ...]
    """Literal texts, and (place, cleaner) of the caller's texts."""

    def render(self, arguments: Mapping[str, Any]) -> str:
        """Return the text, with the caller's texts filled in."""
        parts = (p if isinstance(p, str) else self._fill(*p, arguments) for p in self.parts)
        return "".join(parts)

    def _fill(self, place: Place, clean: str, arguments: Mapping[str, Any]) -> str:
        value = value_at(arguments, place)
        if value is None and place[1:] == (0,):
            value = arguments.get(str(place[0]))
        if not isinstance(value, str):
            raise DiffoptError(
                f"{place_text(place)} must be a text, got {value!r}: "
                "the program was traced with one there"
            )
        return CLEANERS[clean](value)


@dataclasses.dataclass(frozen=True)
class Processor:
    """A call of a tokenizer or another host-side component."""

    asset: str
    method: str
    args: Any
    """JSON, see `decode_args`: a text is {"text": parts of a `Text`}, a picture {"place": …}."""
    keys: tuple[str, ...]
    """The entries of the result that become inputs; see `result_entry`."""

    @property
    def count(self) -> int:
        """The number of tensors that the step returns."""
        return len(self.keys)

    def run(self, call: "CallArguments") -> list[Tensor]:
        """Call the component, and return the entries that are inputs of the graph."""
        args, kwargs = decode_args(self.args, call.arguments)
        result = getattr(call.component(self.asset), self.method)(*args, **kwargs)
        return [result_entry(result, key) for key in self.keys]


@dataclasses.dataclass(frozen=True)
class Draw:
    """A random draw, from the generator at a place or, without one, from the default generator."""

    op: str
    size: tuple[int, ...]
    dtype: str
    extra: tuple[float, ...]
    generator: Place | None
    count = 1

    def run(self, call: "CallArguments") -> list[Tensor]:
        """Return the random numbers."""
        packet = self.op.removeprefix("aten.")
        kwargs = {"dtype": getattr(torch, self.dtype)}
        generator = call.generator(self.generator)
        function = getattr(torch, packet)
        return [function(*[int(e) for e in self.extra], self.size, generator=generator, **kwargs)]


@dataclasses.dataclass(frozen=True)
class Picture:
    """PIL images as one tensor: mode, resize, scale, layout."""

    place: Place
    """Of an image, or of a list of images, which are stacked."""
    mode: str
    size: tuple[int, int]
    resample: int
    scale: str
    """"byte" (uint8 0…255), "unit" (float32 0…1) or "signed" (float32 -1…1)."""
    layout: str
    """"hwc", "chw" or "hw", with "n" in front for a batch."""
    count = 1

    def run(self, call: "CallArguments") -> list[Tensor]:
        """Return the images as one tensor."""
        value = value_at(call.arguments, self.place)
        pictures = value if isinstance(value, list) else [value]
        for picture in pictures:
            if not isinstance(picture, Image.Image):
                kind = type(picture).__name__
                raise DiffoptError(f"{place_text(self.place)} must be a PIL image, got {kind}")
        return [torch.from_numpy(self.render(pictures))]

    def render(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Return the images as an array with this mode, size, scale and layout."""
        arrays = [self._one(picture) for picture in pictures]
        return np.stack(arrays) if self.layout.startswith("n") else arrays[0]

    def _one(self, image: Image.Image) -> np.ndarray:
        if image.mode != self.mode:
            image = image.convert(self.mode)
        if image.size != self.size:
            image = image.resize(self.size, resample=self.resample)
        array = np.array(image)
        if self.scale != "byte":
            array = array.astype(np.float32) / 255.0
        if self.scale == "signed":
            array = 2.0 * array - 1.0
        if "c" not in self.layout:
            return array if array.ndim == 2 else array[..., 0]
        array = array if array.ndim == 3 else array[..., None]
        return array.transpose(2, 0, 1) if self.layout.endswith("chw") else array


@dataclasses.dataclass(frozen=True)
class Number:
    """A number that is an input (`dynamic=`), with the comparisons that capture relied on."""

    place: Place
    guards: tuple[tuple[str, float, bool, str], ...] = ()
    """(comparison, other side, its result at capture, where), for example (">", 1.0, True, "…")."""
    count = 1

    def run(self, call: "CallArguments") -> list[Tensor]:
        """Check the guards and return the number as a float64 scalar."""
        value = float(value_at(call.arguments, self.place))
        for symbol, other, result, where in self.guards:
            if COMPARISONS[symbol](value, other) != result:
                rule = f"{place_text(self.place)} {symbol} {other:g}"
                raise DiffoptError(
                    f"{place_text(self.place)}={value:g}: the program was traced with {rule} "
                    f"{'true' if result else 'false'} ({where}); trace it again with this value"
                )
        return [torch.tensor(value, dtype=torch.float64)]


COMPARISONS = {
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}

InputStep = TensorArgument | Processor | Draw | Picture | Number
KINDS: dict[type, str] = {
    TensorArgument: "Given",
    **{cls: cls.__name__ for cls in (Processor, Draw, Picture, Number)},
}
"""What files call each class of steps."""


def place_text(place: Sequence[str | int]) -> str:
    """Return a place as a user writes it: `prompt[0]`."""
    return "".join(
        f"[{p}]" if isinstance(p, int) else (f".{p}" if i else p) for i, p in enumerate(place)
    )


@dataclasses.dataclass
class Host:
    """The host side of a program: the steps to its inputs, and the structure of its result."""

    steps: list[InputStep]
    """In the order in which they run; the inputs are their results, concatenated."""
    output: Any
    """The structure of what the pipeline returns, as JSON; see `pack`."""
    call: dict[str, Any]
    """The traced arguments that are plain data: defaults of inputs, and bound values."""
    assets: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    """Files of each host component, by file name."""
    components: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    """Host components, loaded from `assets` when one is first used."""

    def prepare(self, arguments: Mapping[str, Any]) -> list[Tensor]:
        """Return the flat inputs for a call with these arguments.

        `seed=` stands for `generator=torch.Generator().manual_seed(seed)`, or for one generator an
        image (seed, seed + 1, …) where the program was traced with a list of them.
        """
        call = CallArguments(self, dict(arguments))
        return [tensor for step in self.steps for tensor in step.run(call)]

    def inputs(self) -> set[str]:
        """Return the names of the arguments that may differ between calls."""
        names = {"seed", "generator", "output_type"}
        for step in self.steps:
            if isinstance(step, Processor):
                names.update(str(place[0]) for place in places_in(step.args))
            elif isinstance(step, Draw):
                names.update(str(part) for part in (step.generator or ())[:1])
            else:
                names.add(str(step.place[0]))
        return names

    def to_json(self) -> dict[str, Any]:
        """Return everything but the assets as JSON."""
        steps = [{"kind": KINDS[type(step)], **dataclasses.asdict(step)} for step in self.steps]
        return {"steps": steps, "output": self.output, "call": self.call}

    @staticmethod
    def from_json(data: Mapping[str, Any], assets: dict[str, dict[str, bytes]]) -> "Host":
        """Rebuild a host from what `to_json` returned."""
        classes: dict[str, Any] = {kind: cls for cls, kind in KINDS.items()}
        steps = []
        for row in data["steps"]:
            fields = {k: _tuples(v) if k != "args" else v for k, v in row.items() if k != "kind"}
            steps.append(classes[row["kind"]](**fields))
        return Host(steps, data["output"], data["call"], assets)


class CallArguments:
    """The arguments of one call, checked against those that the program was traced with."""

    def __init__(self, host: Host, arguments: dict[str, Any]) -> None:
        self.host = host
        self.seed = arguments.pop("seed", None)
        free = host.inputs()
        for name, value in arguments.items():
            if name in free:
                continue
            if name not in host.call:
                known = ", ".join(sorted(free))
                raise DiffoptError(
                    f"{name}={_short(value)}: the program was traced without {name!r}; "
                    f"trace it again with {name!r} among the arguments (its inputs are: {known})"
                )
            if not _is_equal(host.call[name], value):
                raise DiffoptError(
                    f"{name}={_short(value)}: {name!r} was bound to {_short(host.call[name])} "
                    "at capture; trace again with this value, or with "
                    f"dynamic=({name!r},) if it is a number"
                )
        self.arguments = host.call | arguments
        self._generators: dict[Place | None, torch.Generator] = {}

    def generator(self, place: Place | None) -> torch.Generator | None:
        """Return the generator at a place: one object, so that draws continue each other."""
        if place:
            argument = value_at(self.arguments, place)
        else:  # the default generator, unless a generator is passed where none was traced
            named = any(isinstance(s, Draw) and s.generator for s in self.host.steps)
            argument = None if named else self.arguments.get("generator")
        if isinstance(argument, list) and len(argument) == 1:
            argument = argument[0]
        if isinstance(argument, torch.Generator):
            if argument.device.type != "cpu":
                raise DiffoptError(
                    f"the generator is on {argument.device}, and inputs are drawn on the CPU: give"
                    ' torch.Generator("cpu").manual_seed(…), or seed='
                )
            return argument
        if self.seed is None:
            return None
        if place not in self._generators:
            offset = place[1] if place and len(place) > 1 and isinstance(place[1], int) else 0
            self._generators[place] = torch.Generator().manual_seed(int(self.seed) + offset)
        return self._generators[place]

    def component(self, name: str) -> Any:
        """Return a host component; the first time it is loaded from the program's assets."""
        if name not in self.host.components:
            self.host.components[name] = load_component(name, self.host.assets[name])
        return self.host.components[name]


def decode_args(data: Any, arguments: Mapping[str, Any]) -> Any:
    """Return a processor's arguments from JSON, with the caller's texts and pictures filled in."""
    if not isinstance(data, dict):
        return data
    ((kind, value),) = data.items()
    if kind == "text":
        return Text(_tuples(value)).render(arguments)
    if kind == "place":
        return value_at(arguments, value)
    if kind == "dict":
        return {k: decode_args(v, arguments) for k, v in value.items()}
    items = [decode_args(item, arguments) for item in value]
    return tuple(items) if kind == "tuple" else items


def places_in(data: Any) -> list[Sequence[str | int]]:
    """Return the places of the caller's values in a processor's encoded arguments."""
    if not isinstance(data, dict):
        return []
    ((kind, value),) = data.items()
    if kind == "text":
        return [part[0] for part in value if not isinstance(part, str)]
    if kind == "place":
        return [value]
    return [p for item in (value.values() if kind == "dict" else value) for p in places_in(item)]


def result_entry(result: Any, key: str) -> Tensor:
    """Return one tensor of a processor's result; the key "" is the result itself."""
    value = result if key == "" else result[key]
    if not isinstance(value, Tensor):
        value = torch.as_tensor(np.asarray(value))
    return value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _is_equal(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_is_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b) if isinstance(b, (bool, int, float, str, type(None), dict)) else False


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "…"
