"""Host-side preparation: from the arguments of the pipeline's call to a graph's flat inputs.

How each input is computed from the arguments is a list of steps that run in order: tokenizer calls,
random draws, pictures, numbers, tensors that are arguments themselves. The steps are plain data
(JSON), so that an engine runs them without the pipeline's code.
"""

import dataclasses
import difflib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, fx

from diffopt.errors import DiffoptError, first_line
from diffopt.host.arguments import Place, place_text, short, value_at
from diffopt.host.array_expressions import ArrayRead, evaluate, places_of
from diffopt.host.cleaners import CLEANERS
from diffopt.host.guards import mismatch
from diffopt.host.outputs import Check
from diffopt.host.processors import load_component, result_of
from diffopt.host.schema import Checker, Schema, describe, phrase, rows
from diffopt.host.text_reads import NO_VALUE, Derived, TextRead
from diffopt.spec import suggest


class Step:
    """What the host does for inputs of a program, as plain data."""

    count = 1
    """Of the tensors that the step returns."""
    from_text = False
    """Whether texts tell how large they are."""

    def places(self) -> list[Place]:
        """Return the places of the caller's values that the step reads."""
        return [self.place]  # type: ignore[attr-defined]

    def assets(self) -> set[str]:
        """Return the host components that the step calls."""
        return set()


@dataclasses.dataclass(frozen=True)
class TensorArgument(Step):
    """An argument that is a tensor, an array or a list of numbers."""

    place: Place
    dtype: str

    def run(self, call: "CallArguments") -> list[Tensor]:
        """Return the argument as a tensor."""
        value = call.value(self.place)
        return [torch.as_tensor(value, dtype=getattr(torch, self.dtype))]


@dataclasses.dataclass(frozen=True)
class Text:
    """A template for the caller's texts, each normalized by one of `CLEANERS`."""

    parts: tuple[str | tuple[Place, str] | dict[str, Any], ...]
    """Literal texts, (place, cleaner) of the caller's texts, and {"derived": JSON} of a `Derived`
    text."""

    def render(self, arguments: Mapping[str, Any]) -> str:
        """Return the text, with the caller's texts filled in."""
        return "".join(self._part(part, arguments) for part in self.parts)

    def _part(self, part: Any, arguments: Mapping[str, Any]) -> str:
        if isinstance(part, str):
            return part
        if not isinstance(part, dict):
            place, clean = part
            return self._fill(place, clean, arguments)
        derived = Derived.from_json(part["derived"])
        self._fill(derived.place, "", arguments)  # a text, or an error
        try:
            return str(derived.value(arguments))
        except NO_VALUE as error:
            raise DiffoptError(
                f"{derived} has no value for this text ({error}): trace again with one like it"
            ) from error

    def _fill(self, place: Place, clean: str, arguments: Mapping[str, Any]) -> str:
        value = value_at(arguments, place)
        if not isinstance(value, str):
            raise DiffoptError(
                f"{place_text(place)} must be a text, got {value!r}: "
                "the program was traced with one there"
            )
        return CLEANERS[clean](value)


@dataclasses.dataclass(frozen=True)
class Processor(Step):
    """A call of a tokenizer or another host-side component."""

    asset: str
    method: str
    args: Any
    """JSON, see `decode_args`: a text is {"text": parts of a `Text`}, a picture {"place": …} or
    {"expression": rows} of `array_expressions.evaluate`, and {"computed": n} the n-th of the
    host's `Computed`."""
    keys: tuple[str, ...]
    """The entries of the result that become inputs; see `result_entry`."""
    from_text = True

    @property
    def count(self) -> int:  # type: ignore[override]
        """The number of tensors that the step returns."""
        return len(self.keys)

    def places(self) -> list[Place]:
        """Return the places of the caller's values that the step reads."""
        return places_in(self.args)

    def assets(self) -> set[str]:
        """Return the components that the step calls."""
        return {self.asset} | assets_in(self.args)

    def run(self, call: "CallArguments") -> list[Tensor]:
        """Call the component, and return the entries that are inputs of the graph."""
        args, kwargs = decode_args(self.args, call.arguments, call)
        component = call.component(self.asset)
        result = result_of(self.asset, component, self.method, args, kwargs)
        return [result_entry(result, key) for key in self.keys]


@dataclasses.dataclass(frozen=True)
class Tokens(Step):
    """A tensor of lists that tokenizers return, joined with each other and with numbers."""

    parts: Any
    """As `joined` takes it."""
    dtype: str
    from_text = True

    def places(self) -> list[Place]:
        """Return the places of the caller's values that the step reads."""
        return places_in({"tokens": self.parts})

    def assets(self) -> set[str]:
        """Return the components that the step calls."""
        return assets_in({"tokens": self.parts})

    def run(self, call: "CallArguments") -> list[Tensor]:
        """Return the lists as a tensor."""
        return [torch.tensor(joined(self.parts, call), dtype=getattr(torch, self.dtype))]


def joined(parts: Any, call: "CallArguments") -> list[Any]:
    """Return what parts stand for: numbers, lists of parts, {"of": arguments of `listed`}."""
    result: list[Any] = []
    for part in parts:
        if isinstance(part, dict):
            result += listed(part["of"], call)
        else:
            result.append(joined(part, call) if isinstance(part, list) else part)
    return result


def listed(source: Sequence[Any], call: "CallArguments") -> list[int]:
    """Return a list in what a tokenizer returns.

    Args:
        source: The component's name, the method, its arguments as in `Processor`, and the place.
        call: The call's arguments.
    """
    name, method, encoded, place = source
    args, kwargs = decode_args(encoded, call.arguments, call)
    value = value_at(result_of(name, call.component(name), method, args, kwargs), place)
    if not isinstance(value, list):
        raise DiffoptError(f"{name!r} gives no list of tokens for this text")
    return value


@dataclasses.dataclass(frozen=True)
class TokenRead:
    """What Python read of a list of tokens: that of a new text must be the same."""

    source: Sequence[Any]
    """As in `listed`."""
    what: str
    """"count", or "all" of the numbers."""
    result: Any
    where: str

    def check(self, call: "CallArguments") -> None:
        """Raise a `Mismatch` where a text's tokens are others."""
        tokens = listed(self.source, call)
        actual = tokens if self.what == "all" else len(tokens)
        if actual != self.result:
            about = "the tokens are" if self.what == "all" else "the number of tokens is"
            raise mismatch(
                f"{self.where.rstrip(':')}: {about} {short(actual)} for this text, and "
                f"{short(self.result)} at capture; trace the program again with a text like this",
                from_text=True,
            )


DRAWS: dict[str, tuple[str, ...]] = {
    "randn": (),
    "rand": (),
    "randint": ("low", "high"),
    "randperm": ("n",),
    "normal_": ("mean", "std"),
    "uniform_": ("from", "to"),
    "random_": ("from", "to"),
    "bernoulli_": ("p",),
    "exponential_": ("lambd",),
    "cauchy_": ("median", "sigma"),
    "log_normal_": ("mean", "std"),
    "geometric_": ("p",),
}
"""Functions and methods that draw, with the names of the numbers that they take."""

FILLS = {"randn": "normal_", "rand": "uniform_", "randint": "random_"}
"""By operator: the method that draws the same numbers into a tensor of any strides."""


@dataclasses.dataclass(frozen=True)
class Draw(Step):
    """A random draw, from the generator at a place or, without one, from the default generator."""

    op: str
    """`aten.randn`, `rand`, `randint` or `randperm`, or a method that fills: `aten.normal_` …"""
    size: tuple[int, ...]
    dtype: str
    extra: tuple[float, ...]
    """The operator's numbers: bounds, mean and standard deviation …"""
    generator: Place | None
    """A generator's place among the arguments, or that of the seed which the pipeline makes one
    of."""
    stride: tuple[int, ...] | None = None
    """Of the result, where it is not contiguous."""
    stream: int = 0
    """Which of the generators that the pipeline makes of this seed."""

    def places(self) -> list[Place]:
        """Return the place of the generator, if there is one."""
        return [self.generator] if self.generator else []

    def run(self, call: "CallArguments") -> list[Tensor]:
        """Return the random numbers."""
        return [self.sample(call.generator(self.generator, self.stream))]

    def sample(self, generator: torch.Generator | None) -> Tensor:
        """Draw from a generator, None for the default one."""
        name, dtype = self.op.removeprefix("aten."), getattr(torch, self.dtype)
        if name not in DRAWS:
            raise DiffoptError(f"{self.op} draws no random numbers that are known here")
        extra = [int(e) if float(e).is_integer() else e for e in self.extra]
        if self.stride is not None or name.endswith("_"):
            empty = torch.empty(self.size, dtype=dtype)
            if self.stride is not None:
                empty = torch.empty_strided(self.size, self.stride, dtype=dtype)
            fill = getattr(empty, FILLS.get(name, name))
            return fill(*extra, generator=generator)  # type: ignore[no-any-return]
        size = () if name == "randperm" else (self.size,)
        function = getattr(torch, name)
        return function(*extra, *size, generator=generator, dtype=dtype)  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True)
class Expression(Step):
    """What PIL and numpy compute of pictures and arrays, as one tensor."""

    rows: Sequence[Sequence[Any]]
    """As in `array_expressions.evaluate`."""

    def places(self) -> list[Place]:
        """Return the places of the pictures and arrays."""
        return places_of(self.rows)

    def run(self, call: "CallArguments") -> list[Tensor]:
        """Return the array as a tensor."""
        return [torch.from_numpy(np.asarray(evaluate(self.rows, call.arguments)))]


@dataclasses.dataclass(frozen=True)
class Picture(Step):
    """PIL images as one tensor: mode, resize, scale, layout; in files of earlier versions."""

    place: Place
    """Of an image, or of a list of images, which are stacked."""
    mode: str
    size: tuple[int, int]
    resample: int
    scale: str
    """"byte" (uint8 0…255), "unit" (float32 0…1), "signed" (float32 -1…1: `2 * unit - 1`),
    "centered" (the same as `byte / 127.5 - 1`) or "binary" (float32 0 and 1, from a half on)."""
    layout: str
    """"hwc", "chw" or "hw", with "n" in front for a batch."""
    reducing_gap: float | None = None
    """PIL's first reduction by whole numbers when resizing; see `PIL.Image.resize`."""

    def run(self, call: "CallArguments") -> list[Tensor]:
        """Return the images as one tensor."""
        value = call.value(self.place)
        pictures = value if isinstance(value, (list, tuple)) else [value]
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
        array = np.array(resized(image, self.mode, self.size, self.resample, self.reducing_gap))
        if self.scale == "centered":
            array = array.astype(np.float32) / 127.5 - 1
        elif self.scale != "byte":
            array = array.astype(np.float32) / 255.0
        if self.scale == "signed":
            array = 2.0 * array - 1.0
        elif self.scale == "binary":
            array = (array >= 0.5).astype(np.float32)
        if "c" not in self.layout:
            return array if array.ndim == 2 else array[..., 0]
        array = array if array.ndim == 3 else array[..., None]
        return array.transpose(2, 0, 1) if self.layout.endswith("chw") else array


def resized(
    image: Image.Image,
    mode: str,
    size: tuple[int, int],
    resample: Any,
    reducing_gap: float | None = None,
) -> Image.Image:
    """Return an image with this mode and size (width, height); the arguments are PIL's."""
    if image.mode != mode:
        image = image.convert(mode)
    if image.size == tuple(size):
        return image
    return image.resize(size, resample=resample, reducing_gap=reducing_gap)


@dataclasses.dataclass(frozen=True)
class Number(Step):
    """A number that is an input (`dynamic=`), with the comparisons that capture relied on."""

    place: Place
    guards: tuple[tuple[str, float, bool, str], ...] = ()
    """(comparison, other side, its result at capture, where), for example (">", 1.0, True, "…")."""

    def run(self, call: "CallArguments") -> list[Tensor]:
        """Check the guards and return the number as a float64 scalar."""
        value = float(call.value(self.place))
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

InputStep = TensorArgument | Processor | Tokens | Draw | Expression | Picture | Number
KINDS: dict[type, str] = {
    TensorArgument: "Given",
    **{cls: cls.__name__ for cls in (Processor, Tokens, Draw, Expression, Picture, Number)},
}
"""What files call each class of steps."""


@dataclasses.dataclass(frozen=True)
class Computed:
    """A value that the pipeline computes of earlier inputs, and calls a host component with."""

    body: fx.GraphModule
    inputs: list[int]
    """The numbers of the program's inputs that the body takes."""

    def value(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the value, of the inputs that are there."""
        with torch.no_grad():
            # Not called: no code is made of a file's graph.
            run = fx.Interpreter(self.body).run
            return run(*(tensors[index] for index in self.inputs))[0]  # type: ignore[no-any-return]


@dataclasses.dataclass
class Host:
    """The host side of a program: the steps to its inputs, and the structure of its result."""

    steps: list[InputStep]
    """In the order in which they run; the inputs are their results, concatenated."""
    output: Any
    """The structure of what the pipeline returns, as JSON; see `pack`."""
    call: dict[str, Any]
    """The traced arguments that are plain data: what a call that leaves them out means."""
    assets: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    """Files of each host component, by file name."""
    components: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    """Host components, loaded from `assets` when one is first used."""
    schema: dict[str, Schema] = dataclasses.field(default_factory=dict, repr=False)
    """What each traced argument was; see `diffopt.host.schema`."""
    defaults: dict[str, Schema] = dataclasses.field(default_factory=dict, repr=False)
    """The callable's own defaults of the arguments that were left out at capture."""
    computed: list[Computed] = dataclasses.field(default_factory=list, repr=False)
    """What host components are called with that is computed of inputs."""
    checks: list[Check] = dataclasses.field(default_factory=list, repr=False)
    """What Python read of models' values, and each run must give, too."""
    token_reads: list[TokenRead] = dataclasses.field(default_factory=list, repr=False)
    """What Python read of the texts' tokens, and new ones' must be, too."""
    text_reads: list[TextRead] = dataclasses.field(default_factory=list, repr=False)
    """What Python read of the texts, and new ones must give, too."""
    array_reads: list[ArrayRead] = dataclasses.field(default_factory=list, repr=False)
    """What Python read of the pictures and arrays, and new ones must give, too."""
    classes: dict[str, type] = dataclasses.field(default_factory=dict, repr=False)
    """Of what the pipeline returns, by name; at hand in the process that traced it."""
    objects: dict[Place, Any] = dataclasses.field(default_factory=dict, repr=False)
    """Traced arguments that no schema describes; at hand in the process that traced them."""

    def prepare(self, arguments: Mapping[str, Any]) -> list[Tensor]:
        """Return the flat inputs for a call with these arguments.

        Unless the pipeline has a `seed` of its own, `seed=` stands for
        `generator=torch.Generator().manual_seed(seed)`, or for one generator an image (seed,
        seed + 1, …) where the program was traced with a list of them.
        """
        with _PREPARING:
            return self._prepare(arguments)

    def _prepare(self, arguments: Mapping[str, Any]) -> list[Tensor]:
        call = CallArguments(self, dict(arguments))
        for array_read in self.array_reads:
            array_read.check(call.arguments)
        for step in self.steps:
            try:
                call.tensors += step.run(call)
            except _UNFIT as error:
                places = dict.fromkeys(map(place_text, step.places()))
                names = ", ".join(places) or type(step).__name__.lower()
                raise DiffoptError(
                    f"{names}: no input can be made of this: {first_line(error)}"
                ) from error
        for token_read in self.token_reads:
            token_read.check(call)
        return call.tensors

    def input_places(self) -> set[Place]:
        """Return the places of the arguments from which inputs are computed."""
        return {place for step in self.steps for place in step.places()}

    def without_files(self) -> list[str]:
        """Return the host components of which no file can hold what they need."""
        return sorted(name for name in self.used_assets() if not self.assets.get(name))

    def used_assets(self) -> set[str]:
        """Return the host components that steps call."""
        return {name for step in self.steps for name in step.assets()}

    def draws(self) -> bool:
        """Tell whether random numbers are among the inputs."""
        return any(isinstance(step, Draw) for step in self.steps)

    def has_own_seed(self) -> bool:
        """Tell whether `seed` is an argument of the pipeline's, which `seed=` then means."""
        return "seed" in self.schema or "seed" in self.defaults

    def takes_seed(self) -> bool:
        """Tell whether a call may have any `seed`; else it is bound, or nothing is drawn."""
        return ("seed",) in self.input_places() if self.has_own_seed() else self.draws()

    def seeded(self, arguments: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """Return the arguments with a seed where a call may have any."""
        return {**arguments, "seed": seed} if self.takes_seed() else dict(arguments)

    def inputs(self) -> set[str]:
        """Return the names of the arguments that may differ between calls."""
        names = {str(place[0]) for place in self.input_places()}
        return names | ({"seed"} if self.takes_seed() else set())

    def bindings(self) -> list[tuple[str, str, str]]:
        """Return what became of each traced argument; see `schema.rows`."""
        places = self.input_places()
        table = [row for n, known in self.schema.items() for row in rows((n,), known, places)]
        return table + [(n, "left out", phrase(known)) for n, known in self.defaults.items()]

    def traced_output_type(self) -> Any:
        """Return the `output_type` of the captured call, by the pipeline's default if left out."""
        known = self.schema.get("output_type", self.defaults.get("output_type", {}))
        return known.get("value")

    def to_json(self) -> dict[str, Any]:
        """Return everything but the assets and objects as JSON."""
        steps = [{"kind": KINDS[type(step)], **dataclasses.asdict(step)} for step in self.steps]
        return {
            "steps": steps,
            "output": self.output,
            "call": self.call,
            "schema": self.schema,
            "defaults": self.defaults,
            "checks": [dataclasses.astuple(check) for check in self.checks],
            "token_reads": [dataclasses.astuple(read) for read in self.token_reads],
            "text_reads": [read.to_json() for read in self.text_reads],
            "array_reads": [read.to_json() for read in self.array_reads],
        }

    @staticmethod
    def from_json(data: Mapping[str, Any], assets: dict[str, dict[str, bytes]]) -> "Host":
        """Rebuild a host from what `to_json` returned."""
        classes: dict[str, Any] = {kind: cls for cls, kind in KINDS.items()}
        steps = []
        for row in data["steps"]:
            fields = {k: v for k, v in row.items() if k != "kind"}
            data_of_others = ("args", "rows", "parts")
            fields |= {k: _tuples(v) for k, v in fields.items() if k not in data_of_others}
            steps.append(classes[row["kind"]](**fields))
        call = data["call"]
        # Files of earlier versions tell the plain arguments alone.
        schema = data.get("schema") or {name: describe(value) for name, value in call.items()}
        host = Host(steps, data["output"], call, assets, schema=schema)
        host.defaults = data.get("defaults") or {}
        host.token_reads = [TokenRead(*row) for row in data.get("token_reads", ())]
        host.checks = [Check(*row) for row in data.get("checks", ())]
        host.text_reads = [TextRead.from_json(row) for row in data.get("text_reads", ())]
        host.array_reads = [ArrayRead(*row) for row in data.get("array_reads", ())]
        return host


_PREPARING = threading.RLock()
"""Tokenizers of transformers raise where two threads use one at once."""

_UNFIT = (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError, MemoryError)
"""What torch and numpy raise for arguments of which they make no tensor."""


class CallArguments:
    """The arguments of one call, checked against those that the program was traced with."""

    def __init__(self, host: Host, arguments: dict[str, Any]) -> None:
        self.host = host
        self.seed = None if host.has_own_seed() else _as_seed(arguments.pop("seed", None))
        checker = Checker(host.input_places(), host.objects)
        for name, value in arguments.items():
            if name == "output_type":  # converted on the host, or refused: see `outputs.pack`
                continue
            if name in host.schema:
                checker.check((name,), host.schema[name], value)
            elif name in host.defaults:
                self._expect_default(name, value)
            elif name not in host.inputs():
                self._refuse_unknown(name, value)
        if self.seed is not None:
            if not host.draws():
                raise DiffoptError(
                    f"seed={self.seed}: the program draws no random numbers; leave the seed out"
                )
            for place in sorted(host.input_places(), key=repr):
                if isinstance(value_at(arguments, place), torch.Generator):
                    raise DiffoptError(
                        f"seed={self.seed} and {place_text(place)}: give one of the two"
                    )
        self.arguments = host.call | arguments
        for read in host.text_reads:
            read.check(self.arguments)
        self.tensors: list[Tensor] = []
        """The inputs of the steps that have run."""
        self._generators: dict[tuple[Place | None, int], torch.Generator] = {}

    def _expect_default(self, name: str, value: Any) -> None:
        known = self.host.defaults[name]
        try:
            Checker(set()).check((name,), known, value)
        except DiffoptError:
            default = short(known["value"]) if "value" in known else "the pipeline's default"
            raise DiffoptError(
                f"{name}={short(value)}: {name!r} was left out at capture, which means {default}; "
                "trace again with this value"
            ) from None

    def _refuse_unknown(self, name: str, value: Any) -> None:
        known = sorted(self.host.inputs())
        every = {*known, *self.host.schema, *self.host.defaults}
        near = suggest(name, every) if difflib.get_close_matches(name, every) else ""
        raise DiffoptError(
            f"{name}={short(value)}: the program was traced without {name!r}{near}; trace it again "
            f"with {name!r} among the arguments (its inputs are: {', '.join(known) or 'none'})"
        )

    def value(self, place: Place) -> Any:
        """Return the value at a place; a `DiffoptError` where an input is missing."""
        return _expect(value_at(self.arguments, place), place)

    def computed(self, number: int) -> Tensor:
        """Return a value that is computed of earlier inputs."""
        return self.host.computed[number].value(self.tensors)

    def generator(self, place: Place | None, stream: int = 0) -> torch.Generator | None:
        """Return the generator of a draw: one object, so that draws continue each other.

        Args:
            place: Of a generator, or of the seed for one that the pipeline makes; None for the
                default generator.
            stream: Which of the generators that the pipeline makes of a seed.
        """
        argument = value_at(self.arguments, place) if place else None
        if isinstance(argument, torch.Generator):
            if argument.device.type != "cpu":
                raise DiffoptError(
                    f"the generator is on {argument.device}, and inputs are drawn on the CPU: give"
                    ' torch.Generator("cpu").manual_seed(…), or seed='
                )
            return argument
        if place and type(argument) is int:
            return self._made((place, stream), argument)
        if self.seed is not None:
            offset = place[1] if place and len(place) > 1 and isinstance(place[1], int) else 0
            return self._made((place, 0), self.seed + offset)
        if place:
            name = place_text(place)
            raise DiffoptError(
                f"missing argument {name!r}: the program was traced with a torch.Generator there; "
                "pass one, or seed="
            )
        return None

    def _made(self, key: tuple[Place | None, int], seed: int) -> torch.Generator:
        if key not in self._generators:
            self._generators[key] = torch.Generator().manual_seed(seed)
        return self._generators[key]

    def component(self, name: str) -> Any:
        """Return a host component; the first time it is loaded from the program's assets."""
        if name not in self.host.components:
            if not self.host.assets.get(name):
                raise DiffoptError(
                    f"the file holds no {name!r}, which makes inputs of the arguments: it has no"
                    " save_pretrained, as tokenizers of transformers have; run(tensors) takes the"
                    " inputs themselves"
                )
            self.host.components[name] = load_component(name, self.host.assets[name])
        return self.host.components[name]


def _expect(value: Any, place: Place) -> Any:
    if value is None:
        raise DiffoptError(
            f"missing argument {place_text(place)!r}: the program was traced with it"
        )
    return value


def _as_seed(seed: Any) -> int | None:
    """Return the seed as torch takes it; a `DiffoptError` for another value."""
    if seed is None:
        return None
    if type(seed) is not int or not -(1 << 63) <= seed < 1 << 64:
        raise DiffoptError(f"seed={short(seed)}: must be a whole number from -2**63 to 2**64 - 1")
    return seed


def decode_args(
    data: Any, arguments: Mapping[str, Any], call: "CallArguments | None" = None
) -> Any:
    """Return a processor's arguments from JSON, with the caller's texts and pictures filled in.

    What is computed of earlier inputs, and lists of tokens, take the whole `call`.
    """
    if not isinstance(data, dict):
        return data
    ((kind, value),) = data.items()
    if kind == "text":
        return Text(_tuples(value)).render(arguments)
    if kind == "place":
        return _expect(value_at(arguments, value), value)
    if kind == "expression":
        return evaluate(value, arguments)
    if kind == "resized":  # in files of earlier versions
        place, *how = _tuples(value)
        return resized(_expect(value_at(arguments, place), place), *how)
    if kind == "computed":
        assert call is not None
        return call.computed(value)
    if kind == "tokens":
        assert call is not None
        return joined(value, call)
    if kind == "dict":
        return {k: decode_args(v, arguments, call) for k, v in value.items()}
    items = [decode_args(item, arguments, call) for item in value]
    return tuple(items) if kind == "tuple" else items


def places_in(data: Any) -> list[Place]:
    """Return the places of the caller's values in a processor's encoded arguments."""
    places: list[Place] = []
    for kind, value in _encoded_leaves(data):
        if kind == "text":
            places += [place for part in value for place in _places_of_part(part)]
        elif kind == "place":
            places.append(tuple(value))
        elif kind == "expression":
            places += places_of(value)
        elif kind == "resized":
            places.append(tuple(value[0]))
    return places


def _places_of_part(part: Any) -> list[Place]:
    """Return the places of the caller's texts in a part of a `Text`."""
    if isinstance(part, dict):
        return Derived.from_json(part["derived"]).places()
    return [] if isinstance(part, str) else [tuple(part[0])]


def assets_in(data: Any) -> set[str]:
    """Return the components whose lists of tokens are in a processor's encoded arguments."""
    return {str(source[0]) for kind, source in _encoded_leaves(data) if kind == "of"}


def is_computed(data: Any) -> bool:
    """Tell whether a processor's encoded arguments need what is computed of other inputs."""
    return any(kind == "computed" for kind, _ in _encoded_leaves(data))


def _encoded_leaves(data: Any) -> Iterator[tuple[str, Any]]:
    """Yield the kind and value of each encoded argument, those within lists of tokens too."""
    if isinstance(data, list):
        for part in data:
            yield from _encoded_leaves(part)
        return
    if not isinstance(data, dict):
        return
    ((kind, value),) = data.items()
    if kind in ("dict", "list", "tuple", "tokens"):
        yield from _encoded_leaves([*(value.values() if kind == "dict" else value)])
        return
    yield kind, value
    if kind == "of":
        yield from _encoded_leaves(value[2])


def result_entry(result: Any, key: str) -> Tensor:
    """Return one tensor of a processor's result; the key "" is the result itself."""
    value = result if key == "" else result[key]
    if not isinstance(value, Tensor):
        value = torch.as_tensor(np.asarray(value))
    return value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
