"""Records what never reaches the dispatcher: numpy conversions, numbers that are inputs."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffopt.capture.dispatch_modes import location, without_modes
from diffopt.capture.recorder import InputSource, Recorder, fail
from diffopt.capture.tracked_arrays import TrackedArray, plain_arrays
from diffopt.capture.tracked_tokens import plain_tokens

Guard = tuple[str, float, bool, str]
"""(comparison, other side, its result at capture, where)."""


class DynamicNumber(float):
    """A number that is an input: arithmetic on it is recorded, comparisons become guards.

    Other operations bind its value, by a guard that it is equal.
    """

    recorder: Recorder
    tensor: Tensor
    guards: list[Guard] | None
    """None for a number that was computed from a dynamic one."""

    @staticmethod
    def make(recorder: Recorder, tensor: Tensor, guards: list[Guard] | None) -> "DynamicNumber":
        """Return the number of a traced 0-d float64 tensor."""
        with without_modes():
            number = DynamicNumber(tensor.item())
        number.recorder, number.tensor, number.guards = recorder, tensor, guards
        return number

    def bound(self) -> float:
        """Return the value as a plain number, to which a guard binds it."""
        self._guard("==", float.__float__(self), True)
        return float.__float__(self)

    def _guard(self, symbol: str, other: float, result: bool) -> None:
        if self.guards is None:
            fail(
                "Python compares or converts a number computed from a dynamic argument",
                "compare the argument itself, or do not name it in dynamic=",
            )
        guard = (symbol, float(other), result, str(location()))
        if guard[:3] not in [known[:3] for known in self.guards]:
            self.guards.append(guard)

    def _compare(self, symbol: str, other: Any, result: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        self._guard(
            symbol, other.bound() if isinstance(other, DynamicNumber) else other, bool(result)
        )
        return result

    def __gt__(self, other: Any) -> Any:
        return self._compare(">", other, float.__gt__(self, other))

    def __ge__(self, other: Any) -> Any:
        return self._compare(">=", other, float.__ge__(self, other))

    def __lt__(self, other: Any) -> Any:
        return self._compare("<", other, float.__lt__(self, other))

    def __le__(self, other: Any) -> Any:
        return self._compare("<=", other, float.__le__(self, other))

    def __eq__(self, other: Any) -> Any:
        return self._compare("==", other, float.__eq__(self, other))

    def __ne__(self, other: Any) -> Any:
        return self._compare("!=", other, float.__ne__(self, other))

    __hash__ = float.__hash__

    def __bool__(self) -> bool:
        return bool(self._compare("!=", 0.0, float.__ne__(self, 0.0)))


def _recorded(function: Callable[..., Any], *, swapped: bool = False) -> Any:
    def method(self: DynamicNumber, *others: Any) -> Any:
        args = (*others, self) if swapped else (self, *others)
        if any(not isinstance(a, (int, float)) for a in args):
            return NotImplemented
        values = [
            a.tensor
            if isinstance(a, DynamicNumber)
            else torch.tensor(float(a), dtype=torch.float64)
            for a in args
        ]
        return DynamicNumber.make(self.recorder, function(*values), None)

    return method


def _binding(function: Callable[..., Any]) -> Any:
    def method(self: DynamicNumber, *others: Any) -> Any:
        return function(self.bound(), *others)

    return method


_OPERATORS: dict[str, Any] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "truediv": torch.div,
}
for _name, _function in _OPERATORS.items():
    setattr(DynamicNumber, f"__{_name}__", _recorded(_function))
    setattr(DynamicNumber, f"__r{_name}__", _recorded(_function, swapped=True))
DynamicNumber.__neg__ = _recorded(torch.neg)  # type: ignore[method-assign]
for _name in (
    "float",
    "int",
    "round",
    "trunc",
    "floor",
    "ceil",
    "abs",
    "pow",
    "rpow",
    "mod",
    "rmod",
    "floordiv",
    "rfloordiv",
    "divmod",
    "rdivmod",
):
    setattr(DynamicNumber, f"__{_name}__", _binding(getattr(float, f"__{_name}__")))


class TorchFunctionRecorder(TorchFunctionMode):
    """Record numpy conversions, dynamic numbers in torch functions, tensors built of arguments."""

    def __init__(self, recorder: Recorder, sources: InputSource) -> None:
        super().__init__()
        self.recorder, self.sources = recorder, sources

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Intercept one torch function."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("numpy", "__array__", "tolist") and args and isinstance(args[0], Tensor):
            return self._to_python(name, func, args, kwargs)
        if name == "__deepcopy__" and self.recorder.node_of(args[0]) is not None:
            args[1][id(args[0])] = twin = args[0].clone(memory_format=torch.preserve_format)
            return twin
        if name in ("tensor", "as_tensor") and args:
            place = self.sources.place_of_list(args[0])
            if place is not None:
                out = func(*args, **kwargs)
                self.sources.add_input(self.recorder, out, place)
                return out
            if not self.sources.in_host() and self.sources.are_tokens(args[0]):
                out = func(plain_tokens(args[0]), *args[1:], **kwargs)
                self.sources.add_tokens(self.recorder, out)
                return out
            if any(isinstance(value, TrackedArray) for value in _flat(args[0])):
                plain = func(plain_arrays(args[0]), *args[1:], **kwargs)
                copied = torch.from_numpy(np.array(args[0]))  # which is recorded
                return copied.to(plain.device, plain.dtype)
        values = list(_flat((args, kwargs)))
        if any(isinstance(a, DynamicNumber) for a in values):
            return self._with_numbers(name, func, args, kwargs, values)
        return func(*args, **kwargs)

    def _to_python(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        node = self.recorder.node_of(args[0])
        if name == "tolist":
            if node is not None and node not in self.recorder.host_values:
                return self.recorder.read_list(args[0])
            self.recorder.skip_list()
        if node is None:
            return func(*args, **kwargs)
        if node in self.recorder.host_values:
            if not self.sources.in_host():
                with without_modes():
                    value = args[0].tolist()
                self.recorder.reads.append((node, value, location()))
            return func(*args, **kwargs)
        return self.recorder.escape(args[0], np.array(func(*args, **kwargs)))

    def _with_numbers(self, name: str, func: Any, args: Any, kwargs: Any, values: Any) -> Any:
        if name in ("tensor", "as_tensor"):
            result = self._filled(args[0], kwargs, [1] if isinstance(args[0], list) else [])
        elif name == "full":
            result = self._filled(args[1], kwargs, list(args[0]))
        elif name == "full_like":
            result = self._filled(args[1], {"dtype": args[0].dtype} | kwargs, list(args[0].shape))
        else:
            result = None
        if result is not None:
            return result
        dtype = _number_dtype([v for v in values if isinstance(v, Tensor)])
        args, kwargs = _to_tensors((args, kwargs), dtype)
        return func(*args, **kwargs)

    def _filled(self, value: Any, kwargs: Any, shape: list[int]) -> Tensor | None:
        number = value[0] if isinstance(value, list) and len(value) == 1 else value
        if not isinstance(number, DynamicNumber):
            return None
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        return number.tensor.to(dtype).expand(shape).clone()


def _number_dtype(tensors: list[Tensor]) -> torch.dtype | None:
    """Return the dtype of a Python number among tensors, which a 0-d float64 would promote."""
    floats = [t for t in tensors if t.is_floating_point()]
    if any(t.ndim for t in floats):
        return None
    if not floats:
        return torch.get_default_dtype() if tensors else None
    return torch.float64 if any(t.dtype == torch.float64 for t in floats) else floats[0].dtype


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    elif isinstance(value, dict):
        yield from _flat(list(value.values()))
    else:
        yield value


def _to_tensors(value: Any, dtype: torch.dtype | None) -> Any:
    if isinstance(value, DynamicNumber):
        return value.tensor if dtype is None else value.tensor.to(dtype)
    if isinstance(value, (list, tuple)):
        return type(value)(_to_tensors(item, dtype) for item in value)
    if isinstance(value, dict):
        return {k: _to_tensors(v, dtype) for k, v in value.items()}
    return value
