"""Tells from which generator a pipeline draws: one of the caller's, the default, or its own."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from diffopt.capture.recorder import fail
from diffopt.host.arguments import Place, leaves, value_at


@dataclasses.dataclass(frozen=True)
class Origin:
    """The origin of draws that a call changes; see `Draw`."""

    place: Place | None
    stream: int = 0


@dataclasses.dataclass(eq=False)
class _Stream:
    state: Tensor
    """After the last draw; another one before the next means that it was set in between."""
    origin: Origin | None


class RandomStreams:
    """The generators of one run of the pipeline.

    A generator that the pipeline makes follows an argument if its seed is that argument's value in
    this run and in the earlier one, where the values differ.

    Args:
        arguments: Of the call.
        earlier: The generators of a run with other seeds, or None.
    """

    def __init__(self, arguments: Mapping[str, Any], earlier: "RandomStreams | None") -> None:
        self.arguments, self.earlier = arguments, earlier
        self.made: list[int] = []
        """Seeds of the generators that the pipeline made, in the order of their first draws."""
        self._known: dict[int, _Stream] = {}
        for place, value in leaves(arguments):
            if isinstance(value, torch.Generator):
                self._known[id(value)] = _Stream(value.get_state(), Origin(place))
        self._own: list[_Stream] = []
        self._counts: dict[Place, int] = {}

    def start(self) -> None:
        """Begin the run: the default generator's draws are the caller's from here on."""
        default = torch.default_generator
        self._known[id(default)] = _Stream(default.get_state(), Origin(None))

    @contextlib.contextmanager
    def draw(self, generator: torch.Generator | None) -> Iterator[Origin | None]:
        """Tell where the draw in the context comes from; None where every call draws the same.

        Args:
            generator: From which it draws; None: the default generator.
        """
        generator = torch.default_generator if generator is None else generator
        stream = self._stream(generator)
        yield stream.origin
        stream.state = generator.get_state()

    def _stream(self, generator: torch.Generator) -> _Stream:
        state, seed = generator.get_state(), generator.initial_seed()
        known = self._known.get(id(generator))
        if known is not None and torch.equal(known.state, state):
            return known
        # A generator of the pipeline's has another Python object in each of its draws. One that is
        # in the same state gives the same numbers.
        for stream in self._own:
            if torch.equal(stream.state, state):
                return stream
        if torch.equal(state, torch.Generator().manual_seed(seed).get_state()):
            self._own.append(_Stream(state, self._made(seed)))
        elif known is None:
            self._own.append(_Stream(state, None))
        else:
            fail(
                "the state of a generator is set or advanced outside of torch's operators",
                "draw from the generator that is passed, or make one of a seed",
            )
        return self._own[-1]

    def _made(self, seed: int) -> Origin | None:
        index = len(self.made)
        self.made.append(seed)
        place = self._place(index, seed)
        if place is None:
            return None
        self._counts[place] = stream = self._counts.get(place, -1) + 1
        return Origin(place, stream)

    def _place(self, index: int, seed: int) -> Place | None:
        """Return the place of the argument of which the pipeline made a generator, if any."""
        earlier = self.earlier
        if earlier is None or index >= len(earlier.made):
            return None
        for place, value in leaves(self.arguments):
            if type(value) is not int:
                continue
            before = value_at(earlier.arguments, place)
            if (value, before) == (seed, earlier.made[index]) and value != before:
                return place
        return None
