"""Records what a pipeline's own Python computes of pictures and arrays with PIL and numpy.

Arrays are of a class of their own; pictures are known by identity, and PIL's methods are watched.
What Python reads of either (a comparison, a loop over pixels) is noted. Of what no expression can
have it is known at least of which arguments it is made: to read it is to read all of them.
"""

import contextlib
import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image
from torch import Tensor

from diffopt.capture.dispatch_modes import location
from diffopt.capture.recorder import fail
from diffopt.capture.tracked_text import TrackedText
from diffopt.host import array_expressions as ax
from diffopt.host.arguments import Place, leaves, rebuilt, replaced
from diffopt.host.text_reads import WHOLE

_FROM_DATA = ("array", "asarray", "asanyarray", "ascontiguousarray", "asfortranarray")
"""Functions of numpy that do not ask an array's class what to do."""
_ANEW = ("zeros", "ones", "full", "empty")
"""Functions of numpy whose arrays others may be written into."""
_LIBRARIES = ("numpy", "torch", "PIL", "scipy", "transformers", "diffopt")
"""Packages whose own arrays are none of the pipeline's."""
_FUNCTIONS_THAT_WRITE = (
    *("copyto", "put", "putmask", "place", "put_along_axis", "fill_diagonal", "nan_to_num"),
)
_METHODS_THAT_WRITE = (
    *("sort", "fill", "put", "partition", "resize", "itemset", "setfield", "byteswap"),
)
_PICTURES_WRITTEN = ("paste", "putalpha")
_PICTURES_READ_WHOLE = ("tobytes", "getdata", "load", "__getstate__", "__eq__")
_BYTES = ("L", "RGB", "RGBA", "P")
"""Modes of pictures of bytes."""
_SELECTIONS = ("nonzero", "argwhere", "where")
"""Functions of numpy whose result has as many elements as a condition holds for."""
_TYPES = ("shape", "ndim", "size", "result_type", "can_cast", "iscomplexobj", "isrealobj")
"""Functions of numpy that tell no element."""
_UNKNOWN = "unknown"

Note = Callable[[list[ax.Row], Any, str], None]
"""Called with what Python reads: an expression, its value or None for all of it, and where."""


class ArrayRecorder:
    """The operations on pictures and arrays in one run of the pipeline."""

    def __init__(self, note: Note) -> None:
        self.rows: list[ax.Row] = []
        self._pictures: dict[int, tuple[Image.Image, int]] = {}
        self._sharing: dict[int, tuple[Any, list[weakref.ref[TrackedArray]]]] = {}
        self._exported: dict[int, list[Tensor]] = {}
        self._note = note
        self._depth = 0

    # Values

    def tracked(self, value: Any, place: Place) -> Any:
        """Return a copy of an argument, a picture or an array, whose operations are recorded."""
        if not isinstance(value, Image.Image):
            return self.bind(value.copy(), self._row(ax.ARGUMENT, list(place), "array"))
        picture = self.bind(value.copy(), self._row(ax.ARGUMENT, list(place), "image"))
        picture.info = _Info(picture.info)
        picture.info.note = lambda: self.read(self.add("image.info", [picture], {}), value.info)
        return picture

    def output(self, array: np.ndarray, number: int) -> Any:
        """Return the values of a traced tensor as an array whose operations are recorded."""
        return self.bind(array, self._row(ax.OUTPUT, number))

    def row_of(self, value: Any) -> int | None:
        """Return the row of a picture or an array; None of any other value."""
        if isinstance(value, TrackedArray):
            return value.row
        known = self._pictures.get(id(value))
        return known[1] if known else None

    def depends_on_outputs(self, value: Any) -> bool:
        """Tell whether a picture or an array was computed of traced tensors."""
        row = self.row_of(value)
        return row is not None and any(op == ax.OUTPUT for op, _, _ in self._rows_to(row))

    def expression(self, value: Any) -> list[ax.Row] | None:
        """Return the rows that compute a picture or an array; None where it is not known how."""
        row = self.row_of(value)
        rows = [] if row is None else self._rows_to(row)
        return rows if rows and all(op != _UNKNOWN for op, _, _ in rows) else None

    def holds(self, values: Any) -> bool:
        """Tell whether a tracked picture or array is among nested values."""
        return any(self.row_of(value) is not None for _, value in leaves(values))

    def bind(self, value: Any, row: int) -> Any:
        """Record that a value is that of a row; arrays and numbers become tracked arrays."""
        if isinstance(value, Image.Image):
            self._pictures[id(value)] = value, row
            return value
        if isinstance(value, (tuple, list)):
            parts = [self.bind(v, self._row(ax.ITEM, row, i)) for i, v in enumerate(value)]
            return rebuilt(value, dict(enumerate(parts)))
        if not isinstance(value, (np.ndarray, np.generic, bool, int, float)):
            return value
        with self.unwatched():
            result = np.asarray(value).view(TrackedArray)
        result.recorder, result.row = self, row
        owner = _owner(result)
        self._sharing.setdefault(id(owner), (owner, []))[1].append(weakref.ref(result))
        return result

    # Operations

    def record(self, op: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Any:
        """Return the result of an operation, with tracked values in it."""
        if self._depth:
            return result
        bound = self.bind(result, self.add(op, args, kwargs))
        if _selects(op, args):
            for _, part in leaves(bound):
                self.read(self._row(ax.SHAPE, self.row_of(part)), list(np.shape(part)))
        return bound

    def unknown(self, args: Any, result: Any) -> Any:
        """Return the result of a function that no expression has, which reads all it is given."""
        if self._depth:
            return result
        row = self._unknown_row(args)
        self.read(row, None)
        return self.bind(result, row)

    def add(self, op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
        """Return the row of an operation, by which it is known at least what it depends on."""
        for _, text in leaves([args, kwargs]):
            if isinstance(text, TrackedText):  # a mode or a type, which is then bound
                text.read((WHOLE, ()), result=str.__str__(text))
        try:
            given = [ax.encode(argument, self.row_of) for argument in args]
            named = {key: ax.encode(value, self.row_of) for key, value in kwargs.items()}
        except ax.NotAnExpression:
            return self._unknown_row([args, kwargs])
        self.rows.append((op, given, named))
        return len(self.rows) - 1

    def written(self, target: Any, row: int) -> None:
        """Record that a picture or an array is now the value of a row."""
        if isinstance(target, Image.Image):
            self.bind(target, row)
        elif isinstance(target, TrackedArray):
            owner = id(_owner(target))
            if owner in self._exported:
                fail(
                    "an array is written here whose memory a tensor shares",
                    "write before it becomes a tensor",
                )
            sharing = self._sharing.get(owner, (None, []))[1]
            sharing[:] = [reference for reference in sharing if reference() is not None]
            for reference in sharing:
                other = reference()
                if other is not None and other is not target:
                    other.row = self._row(_UNKNOWN, *(r for r in (other.row, row) if r is not None))
            target.recorder, target.row = self, row

    def exported(self, array: Any, tensor: Tensor) -> list[Tensor]:
        """Record that a tensor shares an array's memory; return those that did before."""
        if not isinstance(array, TrackedArray):
            return []
        sharing = self._exported.setdefault(id(_owner(array)), [])
        sharing.append(tensor)
        return sharing[:-1]

    def read(self, row: int | None, value: Any) -> None:
        """Note that Python read the value of a row: or, of one that is not known, the arguments."""
        if row is None or self._depth:
            return
        rows = self._rows_to(row)
        if any(op == ax.OUTPUT for op, _, _ in rows):
            fail("Python reads what numpy computes of a traced value", "keep it a tensor")
        arguments = [r for r in rows if r[0] == ax.ARGUMENT]
        if not arguments:
            return  # the same in every run
        known = value is not None and all(op != _UNKNOWN for op, _, _ in rows)
        reads = [(rows, value)] if known else [([argument], None) for argument in arguments]
        with self.unwatched():
            for expression, result in reads:
                self._note(expression, result, str(location()))

    def _row(self, op: str, *args: Any) -> int:
        """Add a row; whole numbers are those of rows where the operation takes one."""
        taken = {ax.ITEM: 1, ax.SHAPE: 1, _UNKNOWN: len(args)}.get(op, 0)
        given = [{"row": a} if index < taken else a for index, a in enumerate(args)]
        self.rows.append((op, given, {}))
        return len(self.rows) - 1

    def _unknown_row(self, values: Any) -> int:
        rows = dict.fromkeys(self.row_of(value) for _, value in leaves(values))
        return self._row(_UNKNOWN, *(row for row in rows if row is not None))

    def _rows_to(self, last: int) -> list[ax.Row]:
        return ax.rows_to(self.rows, last)

    # PIL and numpy

    @contextlib.contextmanager
    def unwatched(self) -> Iterator[None]:
        """Record nothing in the context."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Record what PIL and numpy do in the context."""
        patches: list[tuple[Any, str, Any]] = [
            (Image.Image, "__copy__", _copied),
            (Image.Image, "__deepcopy__", _copied),
            (Image.Image, "_new", self._made(Image.Image._new)),
            (Image.Image, "getexif", self._exif(Image.Image.getexif)),
        ]
        for name in (*ax.IMAGE_METHODS, *ax.IMAGE_READS, *_PICTURES_WRITTEN):
            patches.append((Image.Image, name, self._watched(Image.Image, name, "image")))
        for name in _PICTURES_READ_WHOLE:
            patches.append((Image.Image, name, self._whole(getattr(Image.Image, name))))
        patches += [(Image, n, self._watched(Image, n, "Image")) for n in ax.IMAGE_FUNCTIONS]
        patches += [(np, name, self._watched(np, name, "numpy")) for name in _FROM_DATA]
        patches += [(np, name, self._anew(name)) for name in _ANEW]
        with contextlib.ExitStack() as stack:
            for owner, name, function in patches:
                stack.enter_context(mock.patch.object(owner, name, function, create=True))
            yield

    def _watched(self, owner: Any, name: str, kind: str) -> Callable[..., Any]:
        original, op = getattr(owner, name), f"{kind}.{name}"

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            # A picture that is made anew is one into which others may be pasted.
            if self._depth or not (op == "Image.new" or self.holds([args, kwargs])):
                return original(*args, **kwargs)
            if op == "image.point" and callable(args[-1]) and args[0].mode in _BYTES:
                args = (args[0], [*map(args[-1], range(256))] * len(args[0].getbands()))
            with self.unwatched():
                plain_args, plain_kwargs = plain_arrays((args, kwargs))
                result = original(*plain_args, **plain_kwargs)
            if kind == "image" and name in _PICTURES_WRITTEN:
                self.written(args[0], self.add(op, args, kwargs))
            elif kind == "image" and name in ax.IMAGE_READS:
                self.read(self.add(op, args, kwargs), result)
            else:
                return self.record(op, args, kwargs, result)
            return result

        return wrapper

    def _anew(self, name: str) -> Callable[..., Any]:
        original, as_name = getattr(np, name), "zeros" if name == "empty" else name
        filled = getattr(np, as_name)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if self._depth or _is_of_library():
                return original(*args, **kwargs)
            for _, size in leaves([args, kwargs]):
                self.read(self.row_of(size), size)
            plain_args, plain_kwargs = plain_arrays((args, kwargs))
            result = filled(*plain_args, **plain_kwargs)
            return self.record(f"numpy.{as_name}", args, kwargs, result)

        return wrapper

    def _made(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap what makes the result of each of PIL's functions, those that are not known too."""

        def wrapper(picture: Image.Image, *args: Any) -> Any:
            result = original(picture, *args)
            if self._depth or not self.holds([picture]):
                return result
            return self.bind(result, self._unknown_row([picture]))

        return wrapper

    def _exif(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(picture: Image.Image) -> Any:
            result = original(picture)
            if not self._depth and self.holds([picture]):
                with self.unwatched():
                    turned = ax.orientation(picture)
                self.read(self.add("image.orientation", [picture], {}), turned)
            return result

        return wrapper

    def _whole(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a method that gives all of a picture to Python, which may write it, too."""

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if not self._depth and self.holds([args]) and not _is_of_library():
                row = self._unknown_row([args])
                self.read(row, None)
                if original.__name__ == "load":
                    self.written(args[0], row)
            return original(*args, **kwargs)

        return wrapper


class _Info(dict[Any, Any]):
    """What is stored beside a picture's pixels."""

    note: Callable[[], None]

    def __contains__(self, key: object) -> bool:
        self.note()
        return super().__contains__(key)

    def __getitem__(self, key: Any) -> Any:
        self.note()
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        """Return an entry."""
        self.note()
        return super().get(key, default)


class TrackedArray(np.ndarray):
    """An array whose operations are recorded."""

    recorder: ArrayRecorder | None = None
    row: int | None = None

    def __array_finalize__(self, source: Any) -> None:
        """Make what numpy itself makes of a tracked array one that depends on it."""
        if isinstance(source, TrackedArray) and source.recorder is not None:
            self.recorder = source.recorder
            if source.row is not None:
                self.row = source.recorder._row(_UNKNOWN, source.row)

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = (), **kwargs: Any
    ) -> Any:
        """Run and record a function of elements; one that writes gives its target another row."""
        plain_inputs, plain_kwargs = plain_arrays((inputs, kwargs))
        if out:
            targets = tuple(_plain(t) if isinstance(t, TrackedArray) else t for t in out)
            plain_kwargs["out"] = targets
        if method == "at" and isinstance(inputs[0], TrackedArray):
            plain_inputs = (_plain(inputs[0]), *plain_inputs[1:])
        result = getattr(ufunc, method)(*plain_inputs, **plain_kwargs)
        recorder = _recorder_of([inputs, out])
        if recorder is None:
            return result
        known = getattr(np, ufunc.__name__, None) is ufunc
        known = known and method in ("__call__", "reduce", "outer") and len(out) < 2
        if not known:
            bound = recorder.unknown([inputs, out], result)
            for target in inputs[:1] if method == "at" else out:
                recorder.written(target, recorder._unknown_row([inputs, out]))
            return out[0] if len(out) == 1 else bound
        op = f"ufunc.{ufunc.__name__}" + ("" if method == "__call__" else f".{method}")
        value = recorder.record(op, inputs, kwargs, result)
        if not out:
            return value
        if isinstance(out[0], TrackedArray) and isinstance(value, TrackedArray):
            row = recorder.row_of(value.astype(out[0].dtype))
            recorder.written(out[0], recorder._unknown_row([value]) if row is None else row)
        return out[0]

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Run and record a function of numpy."""
        recorder = _recorder_of([args, kwargs])
        name = func.__name__
        writes = name in _FUNCTIONS_THAT_WRITE and (name != "nan_to_num" or "copy" in kwargs)
        target = kwargs.get("out", args[0] if writes and args else None)
        plain_args, plain_kwargs = plain_arrays((args, kwargs))
        if recorder is None:
            return func(*plain_args, **plain_kwargs)
        with recorder.unwatched():
            result = func(*plain_args, **plain_kwargs)
        if name in _TYPES:
            return result
        if target is not None:
            bound = recorder.unknown([args, kwargs], result)
            recorder.written(target, recorder._unknown_row([args, kwargs]))
            return target if "out" in kwargs else bound
        if name in ax.ARRAY_FUNCTIONS and getattr(np, name, None) is func:
            return recorder.record(f"numpy.{name}", args, kwargs, result)
        return recorder.unknown([args, kwargs], result)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Write elements, which gives this array another row."""
        plain_key, plain_value = plain_arrays((key, value))
        _plain(self)[plain_key] = plain_value
        if self.recorder is not None and not self.recorder._depth:
            row = self.recorder.add("array.__setitem__", (self, key, value), {})
            self.recorder.written(self, row)

    @property
    def T(self) -> Any:
        """The transposed array."""
        return self.transpose()

    @property
    def flat(self) -> Any:
        """The elements one by one, all of which that reads."""
        self._read(None)
        return _plain(self).flat

    def __deepcopy__(self, memo: Any) -> Any:
        """Return a copy, which is tracked."""
        return self.copy()

    def __iter__(self) -> Iterator[Any]:
        """Iterate over tracked parts."""
        return (self[index] for index in range(len(self)))

    def __hash__(self) -> int:  # type: ignore[override]
        """Return the hash of a number; arrays have none."""
        if self.ndim:
            raise TypeError("unhashable type: 'numpy.ndarray'")
        self._read(_plain(self))
        return hash(_plain(self)[()])

    def __getattr__(self, name: str) -> Any:
        """Return what a number of numpy has and an array has not."""
        value = getattr(_plain(self)[()], name)
        self._read(_plain(self))
        return value

    def _read(self, value: Any) -> None:
        if self.recorder is not None:
            self.recorder.read(self.row, value)


def _tracked_method(name: str) -> Any:
    original = getattr(np.ndarray, name)

    def method(self: TrackedArray, *args: Any, **kwargs: Any) -> Any:
        plain_args, plain_kwargs = plain_arrays((args, kwargs))
        result = original(_plain(self), *plain_args, **plain_kwargs)
        recorder = self.recorder
        if recorder is None:
            return result
        known, target = name in ax.ARRAY_METHODS, kwargs.get("out")
        if known and target is None:
            return recorder.record(f"array.{name}", (self, *args), kwargs, result)
        bound = recorder.unknown([self, args, kwargs], result)
        target = self if name in _METHODS_THAT_WRITE else target
        if target is not None and not recorder._depth:
            recorder.written(target, recorder._unknown_row([self, args, kwargs]))
        return target if "out" in kwargs else bound

    method.__name__ = name
    return method


def _reading_method(name: str) -> Any:
    original = getattr(np.ndarray, name)

    def method(self: TrackedArray, *args: Any) -> Any:
        value = original(_plain(self), *args)
        self._read(_plain(self))
        return value

    method.__name__ = name
    return method


_READING = (
    *("__bool__", "__int__", "__float__", "__complex__", "__index__", "__contains__", "__format__"),
    *("__str__", "item", "tolist", "tobytes"),
)
for _name in _READING:
    setattr(TrackedArray, _name, _reading_method(_name))
_OWN = {*vars(TrackedArray), "view"}
for _name in {*(n for n in dir(np.ndarray) if not n.startswith("_")), *ax.ARRAY_METHODS} - _OWN:
    if callable(getattr(np.ndarray, _name)):
        setattr(TrackedArray, _name, _tracked_method(_name))


def _plain(array: np.ndarray) -> np.ndarray:
    """Return a plain array of the same memory."""
    return np.ndarray.view(array, np.ndarray)


def plain_arrays(value: Any) -> Any:
    """Return nested values with plain arrays, and plain numbers, in place of tracked ones."""
    tracked = {p: v for p, v in leaves(value) if isinstance(v, TrackedArray)}
    plain = {p: _plain(v) for p, v in tracked.items()}
    return replaced(value, {p: v if v.ndim else v[()] for p, v in plain.items()})


def _selects(op: str, args: Sequence[Any]) -> bool:
    """Tell whether the number of elements of an operation's result depends on values."""
    if op == "array.__getitem__":
        masks = (part for _, part in leaves([args[1]]) if isinstance(part, np.ndarray))
        return any(mask.dtype == np.bool_ for mask in masks)
    name = op.rpartition(".")[2]
    return name in _SELECTIONS and (name != "where" or len(args) == 1)


def _is_of_library() -> bool:
    """Tell whether code of a library, and not of the pipeline, calls the function that asks."""
    name = str(sys._getframe(2).f_globals.get("__name__", ""))
    return name.partition(".")[0] in _LIBRARIES


def _owner(array: Any) -> Any:
    """Return what owns an array's memory."""
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base
    return array


def _copied(picture: Image.Image, memo: Any = None) -> Image.Image:
    return picture.copy()


def _recorder_of(values: Any) -> ArrayRecorder | None:
    found = (v.recorder for _, v in leaves(values) if isinstance(v, TrackedArray))
    return next((recorder for recorder in found if recorder is not None), None)
