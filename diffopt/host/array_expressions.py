"""What a pipeline's own Python computes of pictures and arrays with PIL and numpy, as data.

An expression is a list of rows, each an operation from the lists below on earlier rows and on plain
values; its value is that of the last row. The host evaluates it for new arguments with the same
functions of PIL and numpy, and so to the same bits.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from diffopt.errors import DiffoptError, first_line, printable
from diffopt.host.arguments import Place, place_text, short, value_at
from diffopt.host.guards import mismatch
from diffopt.host.schema import describe

IMAGE_METHODS = frozenset(
    (
        *("convert", "resize", "crop", "transpose", "rotate", "filter", "copy", "getchannel"),
        *("reduce", "point", "split"),
    )
)
"""Methods of PIL's images that return images."""
IMAGE_READS = frozenset(
    (
        *("getbbox", "getextrema", "getpixel", "getcolors", "histogram", "entropy"),
        "getprojection",
    )
)
"""Methods of PIL's images that return what Python may branch on."""
IMAGE_FUNCTIONS = frozenset(
    ("new", "fromarray", "merge", "blend", "composite", "alpha_composite", "linear_gradient")
)
"""Functions of `PIL.Image` that return an image."""
FILTERS = frozenset(
    (
        *("GaussianBlur", "BoxBlur", "UnsharpMask", "MedianFilter", "MinFilter", "MaxFilter"),
        *("ModeFilter", "BLUR", "CONTOUR", "DETAIL", "EDGE_ENHANCE", "FIND_EDGES", "SHARPEN"),
        "SMOOTH",
    )
)
"""Filters of `PIL.ImageFilter`."""
ARRAY_METHODS = frozenset(
    (
        *("astype", "reshape", "transpose", "copy", "squeeze", "ravel", "flatten", "clip", "mean"),
        *("sum", "max", "min", "any", "all", "round", "repeat", "swapaxes", "std", "var", "take"),
        *("argmax", "argmin", "cumsum", "prod", "nonzero", "__getitem__"),
    )
)
"""Methods of numpy's arrays that return an array."""
ARRAY_FUNCTIONS = frozenset(
    (
        *("array", "asarray", "asanyarray", "ascontiguousarray", "asfortranarray", "copy", "stack"),
        *("concatenate", "vstack", "hstack", "dstack", "expand_dims", "squeeze", "transpose"),
        *("moveaxis", "swapaxes", "rollaxis", "reshape", "ravel", "flip", "fliplr", "flipud"),
        *("rot90", "roll", "repeat", "tile", "pad", "where", "clip", "zeros_like", "ones_like"),
        *("full_like", "mean", "sum", "max", "min", "amax", "amin", "any", "all"),
        *("round", "around", "broadcast_to", "take", "cumsum", "argmax", "argmin", "average"),
        *("median", "percentile", "quantile", "std", "var", "dot", "prod", "count_nonzero"),
        *("zeros", "ones", "full", "nan_to_num", "isclose", "allclose", "array_equal", "diff"),
        *("interp", "nonzero", "split"),
        *("argwhere", "array_split", "atleast_3d", "unravel_index", "histogram"),
    )
)
"""Functions of numpy that return an array or a number."""

ARGUMENT = "argument"
"""The operation that has an argument's place, and "image" or "array"."""
OUTPUT = "output"
"""The operation that has the number of one of the program's outputs."""
SHAPE = "shape"
"""The operation that has an array's shape as a list."""
ITEM = "item"
"""The operation that takes one of several results."""

_LARGEST = 1 << 12  # elements of an array that is part of an expression

_DIGEST = 64  # elements that a read has at most, to be stored itself

Row = tuple[str, list[Any], dict[str, Any]]
"""An operation, and its arguments as `encode` gives them."""


class NotAnExpression(Exception):
    """Says that a value cannot be part of an expression."""


def encode(value: Any, row_of: Callable[[Any], int | None]) -> Any:
    """Return an operation's argument as JSON; `row_of` numbers pictures and arrays that are rows.

    Raises:
        NotAnExpression: It is neither a row nor plain data.
    """
    row = row_of(value)
    if row is not None:
        return {"row": row}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, tuple):
        return {"tuple": [encode(item, row_of) for item in value]}
    if isinstance(value, list):
        return [encode(item, row_of) for item in value]
    if isinstance(value, slice):
        return {"slice": [encode(v, row_of) for v in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, int):  # an enumeration of PIL's
        return int(value)
    if isinstance(value, np.dtype) or (isinstance(value, type) and _is_number_type(value)):
        return {"dtype": np.dtype(value).str}
    if isinstance(value, (np.ndarray, np.generic)):
        return _encode_array(np.asarray(value), isinstance(value, np.generic))
    if isinstance(value, ImageFilter.Filter) or (isinstance(value, type) and _is_filter(value)):
        return _encode_filter(value)
    raise NotAnExpression(type(value).__name__)


def _is_number_type(kind: type) -> bool:
    return kind in (bool, int, float) or issubclass(kind, (np.number, np.bool_))


def _is_filter(kind: type) -> bool:
    return issubclass(kind, ImageFilter.Filter)


def _encode_array(array: np.ndarray, is_scalar: bool) -> Any:
    if array.dtype.kind not in "biuf" or array.size > _LARGEST:
        raise NotAnExpression(f"an array of {array.size} elements")
    return {"array": [array.dtype.str, list(array.shape), array.ravel().tolist(), is_scalar]}


def _encode_filter(value: Any) -> Any:
    kind = value if isinstance(value, type) else type(value)
    fields = {} if isinstance(value, type) else dict(vars(value))
    if kind.__name__ not in FILTERS or any(
        type(field) not in (int, float, tuple, str) for field in fields.values()
    ):
        raise NotAnExpression(kind.__name__)
    return {"filter": [kind.__name__, {k: encode(v, lambda _: None) for k, v in fields.items()}]}


def decode(data: Any, rows: Sequence[Any]) -> Any:
    """Return what `encode` got; `rows` are the values of earlier rows."""
    if isinstance(data, list):
        return [decode(item, rows) for item in data]
    if not isinstance(data, dict):
        return data
    ((kind, value),) = data.items()
    if kind == "row":
        return rows[value]
    if kind == "tuple":
        return tuple(decode(item, rows) for item in value)
    if kind == "slice":
        return slice(*(decode(item, rows) for item in value))
    if kind == "ellipsis":
        return Ellipsis
    if kind == "dtype":
        return np.dtype(value)
    if kind == "array":
        dtype, shape, numbers, is_scalar = value
        array = np.array(numbers, np.dtype(dtype)).reshape(shape)
        return array[()] if is_scalar else array
    name, fields = value
    made = _known(name, FILTERS, ImageFilter)
    made = made.__new__(made)
    vars(made).update({key: decode(field, rows) for key, field in fields.items()})
    return made


def evaluate(
    rows: Sequence[Sequence[Any]],
    arguments: Mapping[str, Any],
    output: Callable[[int], np.ndarray] | None = None,
) -> Any:
    """Return the value of an expression for a call's arguments.

    Args:
        rows: The expression.
        arguments: Of the call.
        output: Returns an output of the program by its number.

    Raises:
        DiffoptError: An argument is missing, or is not of the type that it was at capture.
    """
    values: list[Any] = []
    for op, args, kwargs in rows:
        try:
            values.append(_value(op, args, kwargs, values, arguments, output))
        except _FAILURES as error:
            names = ", ".join(dict.fromkeys(map(place_text, places_of(rows)))) or "the result"
            text = f"{names}: {op} fails on values like these: {first_line(error)}"
            raise DiffoptError(printable(text)) from error
    return values[-1]


_FAILURES = (
    *(ValueError, TypeError, LookupError, AttributeError, OSError, ArithmeticError, MemoryError),
    RecursionError,
)
"""What PIL, numpy and what decodes their arguments raise."""


def _value(
    op: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    values: Sequence[Any],
    arguments: Mapping[str, Any],
    output: Callable[[int], np.ndarray] | None,
) -> Any:
    """Return the value of a row; `values` are those of the rows before it."""
    if op == ARGUMENT:
        return _argument(tuple(args[0]), args[1], arguments)
    if op == OUTPUT:
        if output is None:
            raise DiffoptError("an output of the program is none of its inputs")
        return output(args[0])
    given = [decode(argument, values) for argument in args]
    return apply(op, given, {key: decode(value, values) for key, value in kwargs.items()})


def _argument(place: Place, kind: str, arguments: Mapping[str, Any]) -> Any:
    value = value_at(arguments, place)
    if value is None:
        raise DiffoptError(
            f"missing argument {place_text(place)!r}: the program was traced with it"
        )
    if kind == "image" and not isinstance(value, Image.Image):
        raise DiffoptError(f"{place_text(place)} must be a PIL image, got {type(value).__name__}")
    return value


def apply(op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation; writes in place return a changed copy of their first argument."""
    kind, _, name = op.partition(".")
    if op == ITEM:
        return args[0][args[1]]
    if op == SHAPE:
        return list(np.shape(args[0]))
    if op == "image.orientation":
        return orientation(args[0])
    if op == "image.info":
        return dict(args[0].info)
    if op in ("image.paste", "image.putalpha", "array.__setitem__"):
        target = args[0].copy()
        getattr(target, name)(*args[1:], **kwargs)
        return target
    if kind == "image":
        function = _known(name, IMAGE_METHODS | IMAGE_READS, Image.Image)
    elif kind == "Image":
        function = _known(name, IMAGE_FUNCTIONS, Image)
    elif kind == "array":
        _known(name, ARRAY_METHODS, np.ndarray)
        if not isinstance(args[0], (np.ndarray, np.generic)):
            raise DiffoptError(f"{op}: {type(args[0]).__name__} is no array")
        return getattr(args[0], name)(*args[1:], **kwargs)
    elif kind == "ufunc":
        name, _, method = name.partition(".")
        function = getattr(np, name, None)
        if not isinstance(function, np.ufunc) or method not in ("", "reduce", "outer"):
            raise DiffoptError(f"{op} is no operation on arrays that is known")
        function = getattr(function, method) if method else function
    else:
        function = _known(name, ARRAY_FUNCTIONS, np)
    return function(*args, **kwargs)


def orientation(picture: Image.Image) -> int:
    """Return how a picture is to be turned, by its EXIF data; 1 for one that is upright."""
    return int(picture.getexif().get(0x0112, 1))


def _known(name: str, names: frozenset[str], owner: Any) -> Any:
    if name not in names:
        raise DiffoptError(f"{name} is no operation on pictures or arrays that is known")
    return getattr(owner, name)


def rows_in(data: Any) -> list[int]:
    """Return the numbers of the rows that an operation uses."""
    if isinstance(data, dict):
        if set(data) == {"row"}:
            return [data["row"]]
        data = list(data.values())
    parts = data if isinstance(data, (list, tuple)) else ()
    return [row for part in parts for row in rows_in(part)]


def renumbered(data: Any, order: Mapping[int, int]) -> Any:
    """Return an operation with other numbers of the rows that it uses."""
    if isinstance(data, dict):
        if set(data) == {"row"}:
            return {"row": order[data["row"]]}
        return {key: renumbered(part, order) for key, part in data.items()}
    if isinstance(data, (list, tuple)):
        return type(data)(renumbered(part, order) for part in data)
    return data


def rows_to(rows: Sequence[Row], last: int) -> list[Row]:
    """Return the rows that one of them needs, and that one last, numbered anew."""
    needed: set[int] = set()
    todo = [last]
    while todo:
        row = todo.pop()
        if row not in needed:
            needed.add(row)
            todo += rows_in(rows[row])
    order = {row: index for index, row in enumerate(sorted(needed))}
    return [renumbered(rows[row], order) for row in order]


def places_of(rows: Sequence[Sequence[Any]]) -> list[Place]:
    """Return the places of the arguments in an expression."""
    return [tuple(args[0]) for op, args, _ in rows if op == ARGUMENT and args]


def same_value(a: Any, b: Any) -> bool:
    """Tell whether two pictures, arrays or plain values are the same; NaN equals NaN."""
    if isinstance(a, Image.Image) and isinstance(b, Image.Image):
        return (a.mode, a.size) == (b.mode, b.size) and a.tobytes() == b.tobytes()
    if isinstance(a, (np.ndarray, np.generic)) and isinstance(b, (np.ndarray, np.generic)):
        x, y = np.asarray(a), np.asarray(b)
        alike = (x.dtype, x.shape) == (y.dtype, y.shape)
        return alike and np.array_equal(x, y, equal_nan=x.dtype.kind in "fc")
    return type(a) is type(b) and bool(a == b)


@dataclasses.dataclass(frozen=True)
class ArrayRead:
    """A value that Python read of the caller's pictures or arrays: new ones must give the same."""

    rows: Sequence[Sequence[Any]]
    result: Any
    """Plain data."""
    where: str

    @property
    def about(self) -> str:
        """What was read, whatever it was."""
        return str(self.rows)

    @property
    def places(self) -> list[Place]:
        """The places of the arguments that were read."""
        return places_of(self.rows)

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Raise a `Mismatch` where new arguments give another value than those at capture."""
        actual = plain(evaluate(self.rows, arguments))
        if actual != self.result:
            names = ", ".join(dict.fromkeys(map(place_text, self.places)))
            raise mismatch(
                f"{self.where.rstrip(':')}: what Python reads of {names} is {short(actual)} and "
                f"was {short(self.result)} at capture; trace the program again with one like this",
                from_text=False,
            )

    def to_json(self) -> list[Any]:
        """Return the read as JSON."""
        return [self.rows, self.result, self.where]


def plain(value: Any) -> Any:
    """Return what was read as JSON gives it back; of much of it a digest."""
    if isinstance(value, Image.Image) or (isinstance(value, np.ndarray) and value.size > _DIGEST):
        return describe(value)
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, dict):
        text = repr(sorted((str(key), repr(item)) for key, item in value.items()))
        return hashlib.sha256(text.encode()).hexdigest()
    return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value
