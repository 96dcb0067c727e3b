"""What Python reads of values that a model computes: the pipeline is asked, which runs for real.

Capture computes no models, so that it does not know which way a branch on their values goes. It
takes the way of the real run, and the program checks in every run that the value is that one.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffopt.capture.dispatch_modes import Location, location

Key = tuple[Location, int]
"""A line, and how many values have been read there before."""
Answers = Mapping[Key, Any]


class NeedsRun(Exception):
    """A value is read that no answer is there for: the pipeline must run for real first."""


def is_read(func: Any) -> bool:
    """Tell whether an operator returns the value of a tensor to Python."""
    if func is torch.ops.aten._local_scalar_dense.default:
        return True
    return torch.Tag.data_dependent_output in func.tags


class ReadCounter:
    """Numbers the values that are read at each line, in the order of the run."""

    def __init__(self) -> None:
        self._counts: Counter[Location] = Counter()

    def next(self, place: Location) -> Key:
        """Return the key of a value that is read at a line."""
        self._counts[place] += 1
        return place, self._counts[place]


class _OperatorObserver(TorchDispatchMode):
    def __init__(self, note: Callable[[Any], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if is_read(func):
            self.note(result)
        return result


class _ListObserver(TorchFunctionMode):
    def __init__(self, note: Callable[[Any], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.tolist:
            self.note(result)
        return result


def answers_of(run: Callable[[], Any]) -> Answers:
    """Run the pipeline for real, by `run`, and return what Python read in it."""
    counter, answers = ReadCounter(), dict[Key, Any]()

    def note(value: Any) -> None:
        answers[counter.next(location())] = value

    with _ListObserver(note), _OperatorObserver(note):
        run()
    return answers
