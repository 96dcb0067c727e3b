"""Records what a pipeline's own Python computes of pictures and arrays with PIL and numpy.

Arrays are of a class of their own; pictures are known by identity, and PIL's methods are watched.
What Python reads of either (a comparison, a loop over pixels) is noted.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from diffopt.capture.dispatch_modes import location
from diffopt.capture.recorder import fail
from diffopt.host import array_expressions as ax
from diffopt.host.arguments import Place, leaves, replaced

_FROM_DATA = ("array", "asarray", "asanyarray", "ascontiguousarray", "asfortranarray")
"""Functions of numpy that do not ask an array's class what to do."""

_WRITES = ("paste", "putalpha")
"""Methods of pictures that write into them."""

_BYTES = ("L", "RGB", "RGBA", "P")
"""Modes of pictures of bytes."""

_UNKNOWN = "unknown"
_TYPES = ("shape", "ndim", "size", "result_type", "can_cast", "iscomplexobj", "isrealobj")
"""Functions of numpy that tell no element."""


class ArrayRecorder:
    """The operations on pictures and arrays in one run of the pipeline.

    Args:
        note: Called with what Python reads of one: an expression, its value or None for any, where.
    """

    def __init__(self, note: Callable[[list[ax.Row], Any, str], None]) -> None:
        self.rows: list[ax.Row] = []
        self._pictures: dict[int, tuple[Image.Image, int]] = {}
        self._note = note
        self._depth = 0

    def tracked(self, value: Any, place: Place) -> Any:
        """Return a copy of an argument, a picture or an array, whose operations are recorded."""
        kind = "image" if isinstance(value, Image.Image) else "array"
        self.rows.append((ax.ARGUMENT, [list(place), kind], {}))
        return self._bind(value.copy(), len(self.rows) - 1)

    def output(self, array: np.ndarray, number: int) -> Any:
        """Return the values of a traced tensor as an array whose operations are recorded."""
        self.rows.append((ax.OUTPUT, [number], {}))
        return self._bind(array, len(self.rows) - 1)

    def depends_on_outputs(self, value: Any) -> bool:
        """Tell whether a picture or an array was computed of traced tensors."""
        row = self.row_of(value)
        return row is not None and any(op == ax.OUTPUT for op, _, _ in self._rows_to(row))

    def row_of(self, value: Any) -> int | None:
        """Return the row of a picture or an array; None of any other value."""
        if isinstance(value, TrackedArray):
            return value.row
        known = self._pictures.get(id(value))
        return known[1] if known else None

    def expression(self, value: Any) -> list[ax.Row] | None:
        """Return the rows that compute a picture or an array; None where it is not known how."""
        row = self.row_of(value)
        rows = [] if row is None else self._rows_to(row)
        return rows if rows and all(op != _UNKNOWN for op, _, _ in rows) else None

    def holds(self, values: Any) -> bool:
        """Tell whether a tracked picture or array is among nested values."""
        return any(self.row_of(value) is not None for _, value in leaves(values))

    def record(self, op: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Any:
        """Return the result of an operation, with tracked values in it."""
        return result if self._depth else self._bind(result, self.add(op, args, kwargs))

    def add(self, op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
        """Return the row of an operation, by which it is known at least what it depends on."""
        try:
            given = [ax.encode(argument, self.row_of) for argument in args]
            named = {key: ax.encode(value, self.row_of) for key, value in kwargs.items()}
            self.rows.append((op, given, named))
        except ax.NotAnExpression:
            rows = {self.row_of(value) for _, value in leaves([args, kwargs])} - {None}
            self.rows.append((_UNKNOWN, [{"row": row} for row in rows], {}))
        return len(self.rows) - 1

    def read(self, row: int | None, value: Any) -> None:
        """Note that Python read the value of a row: or, of one that is not known, the arguments."""
        if row is None or self._depth:
            return
        rows = self._rows_to(row)
        if any(op == ax.OUTPUT for op, _, _ in rows):
            fail("Python reads what numpy computes of a traced value", "keep it a tensor")
        known = all(op != _UNKNOWN for op, _, _ in rows)
        reads = [(rows, value)] if known else [([r], None) for r in rows if r[0] == ax.ARGUMENT]
        for expression, result in reads:
            with self.unwatched():
                self._note(expression, result, str(location()))

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
        with contextlib.ExitStack() as stack:
            for name in (*ax.IMAGE_METHODS, *ax.IMAGE_READS, *_WRITES):
                self._patch(stack, Image.Image, name, f"image.{name}")
            for name in ax.IMAGE_FUNCTIONS:
                self._patch(stack, Image, name, f"Image.{name}")
            for name in _FROM_DATA:
                self._patch(stack, np, name, f"numpy.{name}")
            for name in ("__copy__", "__deepcopy__"):
                copied = mock.patch.object(Image.Image, name, _copied, create=True)
                stack.enter_context(copied)
            yield

    def _patch(self, stack: contextlib.ExitStack, owner: Any, name: str, op: str) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            # A picture that is made anew is one into which others may be pasted.
            if self._depth or not (op == "Image.new" or self.holds([args, kwargs])):
                return original(*args, **kwargs)
            if name == "point" and callable(args[1]) and args[0].mode in _BYTES:
                args = (args[0], [*map(args[1], range(256))] * len(args[0].getbands()), *args[2:])
            with self.unwatched():
                plain_args, plain_kwargs = plain_arrays((args, kwargs))
                result = original(*plain_args, **plain_kwargs)
            if name in _WRITES:
                self._bind(args[0], self.add(op, args, kwargs))
            elif name in ax.IMAGE_READS:
                self.read(self.add(op, args, kwargs), result)
            else:
                return self.record(op, args, kwargs, result)
            return result

        stack.enter_context(mock.patch.object(owner, name, wrapper))

    def _bind(self, value: Any, row: int) -> Any:
        if isinstance(value, Image.Image):
            self._pictures[id(value)] = value, row
            return value
        if isinstance(value, (tuple, list)):
            return type(value)(self._item(part, row, index) for index, part in enumerate(value))
        if not isinstance(value, (np.ndarray, np.generic, bool, int, float)):
            return value
        with self.unwatched():
            result = np.asarray(value).view(TrackedArray)
        result.recorder, result.row = self, row
        return result

    def _item(self, part: Any, row: int, index: int) -> Any:
        self.rows.append((ax.ITEM, [{"row": row}, index], {}))
        return self._bind(part, len(self.rows) - 1)

    def _rows_to(self, last: int) -> list[ax.Row]:
        needed: set[int] = set()
        todo = [last]
        while todo:
            row = todo.pop()
            if row not in needed:
                needed.add(row)
                todo += ax.rows_in(self.rows[row])
        order = {row: index for index, row in enumerate(sorted(needed))}
        return [ax.renumbered(self.rows[row], order) for row in order]


class TrackedArray(np.ndarray):
    """An array whose operations are recorded; what numpy itself makes of one is not tracked."""

    recorder: ArrayRecorder | None = None
    row: int | None = None

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = (), **kwargs: Any
    ) -> Any:
        """Run and record a function of elements; one that writes gives its target another row."""
        plain_inputs, plain_kwargs = plain_arrays((inputs, kwargs))
        if out:
            targets = tuple(t.view(np.ndarray) if isinstance(t, TrackedArray) else t for t in out)
            plain_kwargs["out"] = targets
        result = getattr(ufunc, method)(*plain_inputs, **plain_kwargs)
        op = f"ufunc.{ufunc.__name__}" + ("" if method == "__call__" else f".{method}")
        recorder = _recorder_of([inputs, out])
        if recorder is None:
            return result
        if not out:
            return recorder.record(op, inputs, kwargs, result)
        if len(out) == 1 and isinstance(out[0], TrackedArray):
            value = recorder.record(op, inputs, kwargs, result)
            out[0].recorder, out[0].row = recorder, recorder.row_of(value.astype(out[0].dtype))
        return out[0] if len(out) == 1 else out

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Run and record a function of numpy."""
        recorder = _recorder_of([args, kwargs])
        plain_args, plain_kwargs = plain_arrays((args, kwargs))
        if recorder is None:
            return func(*plain_args, **plain_kwargs)
        with recorder.unwatched():
            result = func(*plain_args, **plain_kwargs)
        name = func.__name__
        if name in _TYPES:
            return result
        known = name in ax.ARRAY_FUNCTIONS and getattr(np, name, None) is func
        return recorder.record(f"numpy.{name}" if known else _UNKNOWN, args, kwargs, result)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Write elements, which gives this array another row."""
        plain_key, plain_value = plain_arrays((key, value))
        self.view(np.ndarray)[plain_key] = plain_value
        if self.recorder is not None:
            self.row = self.recorder.add("array.__setitem__", (self, key, value), {})

    @property
    def T(self) -> Any:
        """The transposed array."""
        return self.transpose()

    def __deepcopy__(self, memo: Any) -> Any:
        """Return a copy, which is tracked."""
        return self.copy()

    def __iter__(self) -> Iterator[Any]:
        """Iterate over tracked parts."""
        return (self[index] for index in range(len(self)))


def _tracked_method(name: str) -> Any:
    original = getattr(np.ndarray, name)

    @functools.wraps(original)
    def method(self: TrackedArray, *args: Any, **kwargs: Any) -> Any:
        plain_args, plain_kwargs = plain_arrays((args, kwargs))
        result = original(self.view(np.ndarray), *plain_args, **plain_kwargs)
        if self.recorder is None:
            return result
        return self.recorder.record(f"array.{name}", (self, *args), kwargs, result)

    return method


def _reading_method(name: str) -> Any:
    original = getattr(np.ndarray, name)

    @functools.wraps(original)
    def method(self: TrackedArray, *args: Any) -> Any:
        value = original(self.view(np.ndarray), *args)
        if self.recorder is not None:
            self.recorder.read(self.row, self.view(np.ndarray))
        return value

    return method


for _name in ax.ARRAY_METHODS:
    setattr(TrackedArray, _name, _tracked_method(_name))
for _name in ("__bool__", "__int__", "__float__", "__index__", "__contains__", "item", "tolist"):
    setattr(TrackedArray, _name, _reading_method(_name))


def _copied(picture: Image.Image, memo: Any = None) -> Image.Image:
    return picture.copy()


def plain_arrays(value: Any) -> Any:
    """Return nested values with plain arrays, and plain numbers, in place of tracked ones."""
    tracked = {p: v for p, v in leaves(value) if isinstance(v, TrackedArray)}
    return replaced(value, {place: v.view(np.ndarray)[()] for place, v in tracked.items()})


def _recorder_of(values: Any) -> ArrayRecorder | None:
    found = (v.recorder for _, v in leaves(values) if isinstance(v, TrackedArray))
    return next((recorder for recorder in found if recorder is not None), None)
