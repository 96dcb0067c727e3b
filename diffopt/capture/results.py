"""What a pipeline returns, as JSON and as the outputs of a graph."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, fx

from diffopt.capture.recorder import Recorder
from diffopt.capture.tracked_arrays import ArrayRecorder, plain_arrays
from diffopt.capture.value_tree import equal_values
from diffopt.errors import CaptureError
from diffopt.host.arguments import leaves, place_text
from diffopt.host.array_expressions import ITEM, OUTPUT, Row, rows_to, same_value
from diffopt.host.outputs import Check, to_images
from diffopt.ir import graph as g


class Result:
    """The result of the run that is captured.

    Args:
        value: What the pipeline returned.
        recorder: Of the run's operators.
        arrays: Of what PIL and numpy computed in it.
    """

    def __init__(self, value: Any, recorder: Recorder, arrays: ArrayRecorder) -> None:
        self.value, self.recorder, self.arrays = value, recorder, arrays
        self.classes: dict[str, type] = {}
        """Of what is returned, by the names that its structure has."""
        self._outputs: list[fx.Node] = []
        self._escaped: set[int] = set()

    def expect_same(self, other: Any) -> None:
        """Raise a `CaptureError` where what no operator computes differs from another run's."""
        theirs = dict(leaves(other, ("result",)))
        for place, value in leaves(self.value, ("result",)):
            if not self._is_same(value, theirs.get(place)):
                raise CaptureError(
                    f"{place_text(place)}: what the pipeline returns here depends on the text, "
                    "picture or seed by functions that are not recorded; compute it with torch"
                )

    def _is_same(self, value: Any, other: Any) -> bool:
        if isinstance(value, Tensor) and isinstance(other, Tensor):
            return self.recorder.node_of(value) is not None or same_constant(value, other)
        if isinstance(value, (np.ndarray, Image.Image)):
            traced = self.arrays.depends_on_outputs(value)
            return traced or same_value(plain_arrays(value), plain_arrays(other))
        return not is_plain_data(value) or bool(value == other)

    def structure(self) -> Any:
        """Return the structure as JSON (see `outputs.pack`), and set the graph's outputs."""
        data = self._visit(self.value)
        for number, (_, _, where) in enumerate(self.recorder.escapes):
            if number not in self._escaped:
                raise CaptureError(
                    f"{where}: a traced value becomes a numpy array that the pipeline does not "
                    "return; use torch operators"
                )
        self.recorder.root.graph.output(tuple(self._outputs))
        g.set_outputs(self.recorder.root, self._outputs)
        return data

    def checks(self) -> list[Check]:
        """Make the values on which Python branched outputs, too, behind those of the result."""
        outputs, checks = g.outputs(self.recorder.root), []
        for node, value, where in self.recorder.checks:
            checks.append(Check(len(outputs), value, str(where)))
            outputs.append(node)
        g.set_outputs(self.recorder.root, outputs)
        return checks

    def _index(self, node: fx.Node) -> int:
        if node not in self._outputs:
            self._outputs.append(node)
        return self._outputs.index(node)

    def _visit(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return {"tensor": self._index(self.recorder.value(value))}
        if isinstance(value, (np.ndarray, Image.Image)):
            return self._array(value)
        if hasattr(value, "__dataclass_fields__") or (
            isinstance(value, dict) and type(value) is not dict
        ):
            fields = dict(value) if isinstance(value, dict) else vars(value)
            names = {**fields, **getattr(value, "__dataclass_fields__", {})}
            ordered = [n for n in getattr(value, "__dataclass_fields__", names) if n in names]
            kind = f"{type(value).__module__}:{type(value).__qualname__}"
            self.classes[kind] = type(value)
            return {"class": [kind, {n: self._visit(getattr(value, n)) for n in ordered}]}
        if isinstance(value, dict):
            return {"dict": {k: self._visit(v) for k, v in value.items()}}
        if isinstance(value, (list, tuple)):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [*map(self._visit, value)]}
        if is_plain_data(value):
            return {"value": value}
        raise CaptureError(
            f"the pipeline returns a {type(value).__name__}, which has no tensors that are known"
        )

    def _array(self, value: np.ndarray | Image.Image) -> Any:
        if not self.arrays.depends_on_outputs(value):  # the same in every run
            if isinstance(value, Image.Image):
                raise CaptureError("the pipeline returns a picture that it does not compute")
            constant = self.recorder.constant(torch.from_numpy(np.array(plain_arrays(value))))
            return {"array": [self._index(constant)]}
        rows = self.arrays.expression(value)
        if rows is None:
            raise CaptureError(
                "the pipeline turns its result into a form on the host that is not known; "
                "ask for output_type='pt'"
            )
        return self._image(value, rows) or self._form(rows)

    def _form(self, rows: list[Row]) -> Any:
        """Return the structure of an array by its rows: whole outputs, or expressions of them."""
        op, args, kwargs = rows[-1]
        if op == OUTPUT:
            return {"array": [self._escape(args[0])]}
        if op == "array.__getitem__" and isinstance(args[1], int):
            form = self._form(rows_to(rows, args[0]["row"]))
            return {"array": [*form["array"], args[1]]} if "array" in form else self._all(rows)
        is_stack = op in ("numpy.stack", "numpy.array") and kwargs in ({}, {"axis": 0})
        if is_stack and len(args) == 1 and isinstance(args[0], list):
            forms = [self._form(rows_to(rows, part["row"])) for part in args[0]]
            if all("array" in form for form in forms):
                return {"stack": forms}
        return self._all(rows)

    def _all(self, rows: list[Row]) -> Any:
        return {"expression": [self._with_output(row) for row in rows]}

    def _image(self, value: Any, rows: list[Row]) -> Any:
        """Return the form of 8-bit images, which may be asked for as arrays; None of others."""
        if not isinstance(value, Image.Image) or not _TO_BYTES.issuperset(op for op, _, _ in rows):
            return None
        escaped = next(args[0] for op, args, _ in rows if op == OUTPUT)
        array, _, _ = self.recorder.escapes[escaped]
        place = _index_in(array, value)
        return None if place is None else {"image": [self._escape(escaped), *place]}

    def _escape(self, number: int) -> int:
        """Return the number of the output that a traced tensor is which became an array."""
        self._escaped.add(number)
        return self._index(self.recorder.escapes[number][1])

    def _with_output(self, row: Row) -> Row:
        """Return a row with the number of an output in place of the number of an array."""
        op, args, kwargs = row
        if op != OUTPUT:
            return row
        return op, [self._escape(args[0])], kwargs


def same_constant(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors have the same shape and values."""
    return a is b or (a.shape == b.shape and bool(equal_values(a, b).all()))


def is_plain_data(value: Any) -> bool:
    """Tell whether a value is JSON: texts, numbers and None in lists and dictionaries."""
    if isinstance(value, dict):
        return all(isinstance(k, str) and is_plain_data(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(is_plain_data(item) for item in value)
    return isinstance(value, (str, int, float, bool, type(None)))


_TO_BYTES = frozenset(
    (
        *(OUTPUT, ITEM, "array.__getitem__", "ufunc.multiply", "array.round", "numpy.round"),
        *("ufunc.rint", "array.astype", "array.squeeze", "Image.fromarray", "numpy.array"),
    )
)
"""The operations by which pipelines make images of bytes of values from 0 to 1."""


def _index_in(array: np.ndarray, picture: Image.Image) -> tuple[int, ...] | None:
    """Return the place in an array of which a picture is made; None without one."""
    if array.ndim < 3 or array.dtype.kind != "f" or array.shape[-1] not in (1, 3, 4):
        return None
    target = np.asarray(picture)
    for place in np.ndindex(array.shape[:-3]):
        if np.array_equal(np.asarray(to_images(array[place], "pil")), target):
            return place
    return None
