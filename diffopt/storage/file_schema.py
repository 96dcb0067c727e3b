"""What the JSON in files must be: one schema for programs, engines and their containers.

Files are written by this library and read by anybody's process, so each part is checked when it is
read, before anything is made of it: kinds, counts that are not negative, types of numbers, texts
that are safe to print. What graphs may call is checked where they are rebuilt (`ir.serialize`), and
what expressions may call where they are evaluated (`host.array_expressions`). Entries that earlier
versions did not write may be absent; unknown ones are refused.
"""

import functools
import json
from typing import Annotated, Any, Literal, NotRequired

import torch
from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
    with_config,
)
from typing_extensions import TypeAliasType, TypedDict

from diffopt.errors import printable

_LONGEST = 1 << 16
_DTYPES = {str(v).removeprefix("torch.") for v in vars(torch).values() if type(v) is torch.dtype}


def _line(text: str) -> str:
    if printable(text) != text or len(text) > _LONGEST:
        raise ValueError(f"has control characters, or more than {_LONGEST} letters")
    return text


def _dtype(name: str) -> str:
    if name not in _DTYPES:
        raise ValueError("is no type of numbers")
    return name


def _one_kind(row: Any) -> Any:
    if len(row) != 1:
        raise ValueError("is not of exactly one kind")
    return row


OneKind = AfterValidator(_one_kind)
Count = Annotated[StrictInt, Field(ge=0, lt=1 << 63)]
Number = StrictInt | StrictFloat
Line = Annotated[StrictStr, AfterValidator(_line)]
Dtype = Annotated[StrictStr, AfterValidator(_dtype)]
Plain = StrictBool | StrictInt | StrictFloat | StrictStr | None
Place = list[Plain]
Json = Any
_CLOSED = ConfigDict(extra="forbid")


# Containers


@with_config(_CLOSED)
class Member(TypedDict):
    """A member of a container."""

    size: Count
    sha256: Annotated[StrictStr, Field(pattern="^[0-9a-f]{64}$")]
    zstd: NotRequired[Count]


class Container(TypedDict):
    """The manifest of every container, which may have more."""

    members: dict[Line, Member]


@with_config(_CLOSED)
class StoredTensor(TypedDict):
    """A tensor in the header of a safetensors member."""

    dtype: StrictStr
    shape: list[Count]
    data_offsets: tuple[Count, Count]


# The caller's values. Kinds are keys, and some are names of Python's types.

DerivedText = TypeAliasType(
    "DerivedText", "tuple[Place, list[tuple[StrictStr, list[DerivedArgument]]]]"
)
DerivedKinds = TypedDict(  # noqa: UP013
    "DerivedKinds",
    {"slice": tuple[Plain, Plain, Plain], "derived": DerivedText},
    total=False,
)
DerivedArgument = TypeAliasType(
    "DerivedArgument", "Plain | list[DerivedArgument] | Annotated[DerivedKinds, OneKind]"
)


def _arguments(row: Any) -> Any:
    """Check a row of an expression that reads an argument of the call, or an output of a run."""
    op, args, _ = row
    if op == "argument":
        checked(args, tuple[Place, StrictStr])
    elif op == "output":
        checked(args, tuple[Count])
    return row


ExpressionRow = Annotated[
    tuple[StrictStr, list[Json], dict[StrictStr, Json]], AfterValidator(_arguments)
]
Expression = list[ExpressionRow]


@with_config(_CLOSED)
class DerivedPart(TypedDict):
    """A part of a template that is made of a text."""

    derived: DerivedText


TextParts = list[StrictStr | tuple[Place, StrictStr] | DerivedPart]
TokenSource = TypeAliasType("TokenSource", "tuple[StrictStr, StrictStr, CallArguments, Place]")


@with_config(_CLOSED)
class TokenList(TypedDict):
    """A list of tokens that a component returns."""

    of: TokenSource


# Of a call: {"tuple": [{"tuple": positional}, {"dict": named}]}
PositionalArguments = TypedDict("PositionalArguments", {"tuple": "list[Encoded]"})  # noqa: UP013
NamedArguments = TypedDict("NamedArguments", {"dict": "dict[StrictStr, Encoded]"})  # noqa: UP013
CallArguments = TypedDict(  # noqa: UP013
    "CallArguments", {"tuple": tuple[PositionalArguments, NamedArguments]}
)
TokenParts = TypeAliasType("TokenParts", "list[Number | StrictBool | TokenParts | TokenList]")
EncodedKinds = TypedDict(  # noqa: UP013
    "EncodedKinds",
    {
        "text": TextParts,
        "place": Place,
        "expression": Expression,
        "resized": list[Json],
        "computed": Count,
        "tokens": TokenParts,
        "dict": "dict[StrictStr, Encoded]",
        "list": "list[Encoded]",
        "tuple": "list[Encoded]",
    },
    total=False,
)
Encoded = TypeAliasType("Encoded", "Plain | Annotated[EncodedKinds, OneKind]")


@with_config(_CLOSED)
class Given(TypedDict):
    """See `host.inputs.TensorArgument`."""

    kind: Literal["Given"]
    place: Place
    dtype: Dtype


@with_config(_CLOSED)
class Processor(TypedDict):
    """See `host.inputs.Processor`."""

    kind: Literal["Processor"]
    asset: Line
    method: Line
    args: CallArguments
    keys: list[StrictStr]


@with_config(_CLOSED)
class Tokens(TypedDict):
    """See `host.inputs.Tokens`."""

    kind: Literal["Tokens"]
    parts: TokenParts
    dtype: Dtype


@with_config(_CLOSED)
class Draw(TypedDict):
    """See `host.inputs.Draw`."""

    kind: Literal["Draw"]
    op: Line
    size: list[Count]
    dtype: Dtype
    extra: list[Number]
    generator: Place | None
    stride: NotRequired[list[Count] | None]
    stream: NotRequired[Count]


@with_config(_CLOSED)
class ExpressionStep(TypedDict):
    """See `host.inputs.Expression`."""

    kind: Literal["Expression"]
    rows: Annotated[Expression, Field(min_length=1)]


@with_config(_CLOSED)
class Picture(TypedDict):
    """See `host.inputs.Picture`."""

    kind: Literal["Picture"]
    place: Place
    mode: Line
    size: tuple[Count, Count]
    resample: Count
    scale: Literal["byte", "unit", "signed", "centered", "binary"]
    layout: Literal["hwc", "chw", "hw", "nhwc", "nchw", "nhw"]
    reducing_gap: NotRequired[Number | None]


@with_config(_CLOSED)
class NumberStep(TypedDict):
    """See `host.inputs.Number`."""

    kind: Literal["Number"]
    place: Place
    guards: list[tuple[Literal[">", ">=", "<", "<=", "==", "!="], Number, StrictBool, Line]]


Step = Annotated[
    Given | Processor | Tokens | Draw | ExpressionStep | Picture | NumberStep,
    Field(discriminator="kind"),
]

# What arguments were (see `host.schema`), and the structure of the result (see `host.outputs`)

ArgumentRows = TypeAliasType("ArgumentRows", "list[tuple[Plain, ArgumentSchema]]")
ArgumentKinds = TypedDict(
    "ArgumentKinds",
    {
        "value": Plain,
        "constant": tuple[StrictStr, StrictStr],
        "tensor": tuple[StrictStr, list[Count], list[Count] | None],
        "array": tuple[StrictStr, list[Count], StrictStr],
        "picture": tuple[StrictStr, list[Count], StrictStr],
        "generator": None,
        "object": StrictStr,
        "list": "list[ArgumentSchema]",
        "tuple": "list[ArgumentSchema]",
        "dict": ArgumentRows,
        "class": tuple[StrictStr, ArgumentRows],
    },
    total=False,
)
ArgumentSchema = TypeAliasType("ArgumentSchema", "Annotated[ArgumentKinds, OneKind]")

ResultKinds = TypedDict(
    "ResultKinds",
    {
        "value": Json,
        "tensor": Count,
        "array": Annotated[list[StrictInt], Field(min_length=1)],
        "image": Annotated[list[StrictInt], Field(min_length=1)],
        "stack": "list[Result]",
        "expression": Annotated[Expression, Field(min_length=1)],
        "list": "list[Result]",
        "tuple": "list[Result]",
        "dict": "dict[StrictStr, Result]",
        "class": "tuple[Line, dict[StrictStr, Result]]",
    },
    total=False,
)
Result = TypeAliasType("Result", "Annotated[ResultKinds, OneKind]")


@with_config(_CLOSED)
class Host(TypedDict):
    """See `host.inputs.Host`."""

    steps: list[Step]
    output: Result
    call: dict[StrictStr, Json]
    schema: NotRequired[dict[StrictStr, ArgumentSchema]]
    defaults: NotRequired[dict[StrictStr, ArgumentSchema] | None]
    checks: NotRequired[list[tuple[Count, Json, Line]]]
    token_reads: NotRequired[list[tuple[TokenSource, Literal["count", "all"], Json, Line]]]
    text_reads: NotRequired[list[tuple[DerivedText, Json, Line]]]
    array_reads: NotRequired[list[tuple[Annotated[Expression, Field(min_length=1)], Json, Line]]]


# Programs


@with_config(_CLOSED)
class TagRow(TypedDict):
    """See `ir.call_tags.Tag`."""

    component: Line
    step: StrictInt
    branch: StrictInt
    timestep: NotRequired[Number]


@with_config(_CLOSED)
class NodeRow(TypedDict):
    """A node of a graph; `ir.serialize` checks its arguments."""

    op: Literal["placeholder", "get_attr", "call_function", "call_module", "output"]
    name: Line
    target: Line
    args: NotRequired[list[Json]]
    kwargs: NotRequired[dict[StrictStr, Json]]
    val: NotRequired[Json]
    module: NotRequired[Line]
    where: NotRequired[Line]
    reuse: NotRequired[StrictBool]
    tag: NotRequired[TagRow]


@with_config(_CLOSED)
class GraphData(TypedDict):
    """A graph and its tensors: the key, strides and whether it is a parameter, by name."""

    nodes: Annotated[list[NodeRow], Field(min_length=1)]
    tensors: dict[Line, tuple[Line, list[Count], StrictBool]]


@with_config(_CLOSED)
class LengthRow(TypedDict):
    """See `ir.dynamic_sizes.Length`."""

    text: Line
    low: Count
    high: Count
    axes: Annotated[list[tuple[Count, Count, StrictInt]], Field(min_length=1)]


# Where a tensor comes from (see `ir.weight_origins`); texts are keys of tensors.
OriginKinds = TypedDict(  # noqa: UP013
    "OriginKinds",
    {
        "weight": tuple[Line, list[Count]],
        "constant": list[Count],
        "scaled": "tuple[Origin, Line]",
        "product": "tuple[Origin, Line]",
        "sum": "list[Origin]",
        "joined": "list[Origin]",
    },
    total=False,
)
Origin = TypeAliasType("Origin", "Annotated[OriginKinds, OneKind]")


@with_config(_CLOSED)
class Origins(TypedDict):
    """Of the pipeline's weights: the names, those closed by pass, and what follows from which.

    A tensor that is computed has a graph, "(constant 0)" and so on in this order.
    """

    weights: list[Line]
    closed: dict[Line, list[Line]]
    tensors: dict[Line, Origin]
    computed: dict[Line, list[Line]]


@with_config(_CLOSED)
class BoundaryRow(TypedDict):
    """See `ir.step_boundaries.Boundary`."""

    after: Line
    latents: Line | None
    timestep: Number | None


@with_config(_CLOSED)
class ProgramRow(TypedDict):
    """`program.json`; see `ir.program.Program`."""

    format: Count
    graphs: dict[Line, GraphData]
    host: Host
    guards: tuple[list[Json], list[Line], list[StrictBool]] | None
    computed: NotRequired[list[list[Count]]]
    samples: Count
    history: list[dict[StrictStr, Json]]
    source: Line
    digests: NotRequired[dict[Line, Line] | None]
    batch: NotRequired[tuple[Count, Count] | None]
    check: NotRequired[Line]
    lengths: NotRequired[list[LengthRow]]
    origins: NotRequired[Origins]


def _calls(data: Any) -> Any:
    """Refuse calls of components that are not there, and calls within these."""
    graphs = data["graphs"]
    if "" not in graphs:
        raise ValueError("has no outer graph")
    for name, graph in graphs.items():
        called = {row["target"] for row in graph["nodes"] if row["op"] == "call_module"}
        calls = not name or name.startswith("(constant ")
        known = {each for each in graphs if each[:1] not in ("", "(")} if calls else set()
        for missing in sorted(called - known):
            raise ValueError(f"graph {name!r} calls {missing!r}, which is no component")
    return data


ProgramData = Annotated[ProgramRow, AfterValidator(_calls)]


class EngineManifest(Container):
    """The manifest of an engine; see `engine.engine`. What targets say is theirs."""

    format: Line
    versions: dict[Line, Line]
    source: Line
    digests: NotRequired[dict[Line, Line] | None]
    check: NotRequired[Line]
    target: Line
    lowering: NotRequired[Line | None]
    requires: dict[Line, Json]
    holds_weights: StrictBool
    finished: NotRequired[StrictBool]
    passes: Line
    records: list[dict[StrictStr, Json]]
    inputs: dict[Line, Line]
    arguments: list[Line]
    batch: NotRequired[tuple[Count, Count] | None]
    lengths: NotRequired[dict[Line, tuple[Count, Count]]]
    components: dict[Line, dict[StrictStr, Json]]
    releasable: list[Line]
    steps: NotRequired[list[BoundaryRow]]
    compress: NotRequired[Count | None]


# What `with_config` does for classes.
for _kinds in (
    *(DerivedKinds, PositionalArguments, NamedArguments, CallArguments, EncodedKinds),
    *(ArgumentKinds, ResultKinds),
):
    setattr(_kinds, "__pydantic_config__", _CLOSED)  # noqa: B010


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def parse(text: bytes | memoryview, kind: Any) -> Any:
    """Return the value of JSON that is of a kind of this module.

    Raises:
        ValueError: It is not, with the place and what is wrong there, in one line.
    """
    try:
        data = json.loads(bytes(text))
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    return checked(data, kind)


def checked(data: Any, kind: Any) -> Any:
    """Return a value that is of a kind of this module; see `parse`."""
    try:
        _adapter(kind).validate_python(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])[:120] or "the whole"
        raise ValueError(printable(f"{place}: {first['msg']}")) from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    return data
