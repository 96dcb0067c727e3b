"""What a caller sees of a run between its steps: progress, latents, previews, and a way to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffopt.errors import Cancelled, DiffoptError
from diffopt.host.outputs import first_output, pictures_in
from diffopt.ir.batching import per_request
from diffopt.ir.step_boundaries import Boundary
from diffopt.lowering.executor import Pause

OnStep = Callable[["Step"], object]
"""Called after each step of sampling; False ends the run."""

CALLBACK = "callback_on_step_end"
"""diffusers' name for the argument that is called after each step."""
UNKNOWN = "the engine does not know which of its values are the latents"
_INPUTS = "callback_on_step_end_tensor_inputs"


class Step:
    """A step of sampling that has just been taken, an evaluation of the denoiser.

    Attributes:
        index: Its number, from 1.
        total: How many steps the run takes.
        seconds: Since the run began.
        timestep: How much noise the step began with, as the scheduler counts it; None: not known.
    """

    def __init__(
        self, preview: Preview, pause: Pause, boundaries: Sequence[Boundary], began: float
    ):
        self._preview = preview
        self._pause = pause
        self.index = pause.index
        self.total = len(boundaries)
        self.timestep = boundaries[pause.index - 1].timestep
        self.seconds = time.perf_counter() - began

    @property
    def latents(self) -> Tensor:
        """What the next step begins with; another tensor of its shape and type may be put there.

        Raises:
            DiffoptError: The engine does not know which of its values these are.
        """
        latents = self._pause.latents
        if latents is None:
            raise DiffoptError(UNKNOWN)
        return latents

    @latents.setter
    def latents(self, tensor: Tensor) -> None:
        now = self.latents
        if not isinstance(tensor, Tensor) or (tensor.shape, tensor.dtype) != (now.shape, now.dtype):
            got = getattr(tensor, "shape", None)
            got = type(tensor).__name__ if got is None else f"{tensor.dtype} {list(got)}"
            raise DiffoptError(f"latents must be {now.dtype} {list(now.shape)}, got {got}")
        strides = torch.empty_strided(now.shape, now.stride(), dtype=now.dtype, device=now.device)
        self._pause.latents = strides.copy_(tensor)

    def previews(self, how: str = "linear") -> list[Image.Image]:
        """Return a picture of each image in the run, as it is now.

        Args:
            how: "decode" runs all that follows the last step, on the latents of this one; "linear"
                takes a linear map from a position's channels to a colour, in the latents' size.
                The map is fitted to the engine's first decoded preview, which is that preview.

        Raises:
            DiffoptError: The engine's latents are not known, or it returns no pictures.
        """
        if how not in ("linear", "decode"):
            raise DiffoptError(f"previews({how!r}): wants 'linear' or 'decode'")
        return self._preview.pictures(self._pause, how)

    def __repr__(self) -> str:
        return f"<Step {self.index} of {self.total}, {self.seconds:.2f} s>"


class Decoder(Protocol):
    """What previews ask of an engine."""

    @property
    def batch(self) -> tuple[int, int] | None:
        """The fewest and the most requests of one run."""

    def picture_sizes(self) -> list[tuple[int, int]]:
        """Return the size of each picture that a call returns."""

    def pack(self, tensors: Sequence[Tensor]) -> Any:
        """Return the flat outputs of a request as the pipeline returns them."""


class Preview:
    """Makes pictures of latents, and keeps the linear map between the two."""

    def __init__(self, engine: Decoder) -> None:
        self._engine = engine
        self._size = (0, 0)
        self._map: Tensor | None = None

    def pictures(self, pause: Pause, how: str) -> list[Image.Image]:
        """Return a picture of each image in a run; see `Step.previews`."""
        latents = pause.latents
        if how == "linear" and self._map is not None and latents is not None:
            return _colours(_positions(latents, self._size), self._map)
        if not self._engine.picture_sizes():
            raise DiffoptError("this engine returns no pictures, so there are no previews of them")
        outputs = pause.finish()
        if outputs is None or latents is None:
            raise DiffoptError(UNKNOWN)
        results = [self._engine.pack(each) for each in per_request(outputs, self._engine.batch)]
        pictures = [picture for each in results for picture in pictures_in(first_output(each))]
        if how == "linear":
            self._size = pictures[0].size
            self._map = _fitted(_positions(latents, self._size), pictures)
        return pictures


def _positions(latents: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the channels of each position of latents as [images, height, width, channels].

    Args:
        latents: As [..., channels, height, width], or as [..., positions, channels].
        size: Width and height of the pictures, a multiple of the positions'.

    Raises:
        DiffoptError: They are neither.
    """
    wide, high = size
    if latents.dim() >= 4:
        channels, height, width = latents.shape[-3:]
        if high % height == wide % width == 0 and high // height == wide // width:
            return latents.reshape(-1, channels, height, width).movedim(1, -1).float()
    if latents.dim() >= 3:
        count, channels = latents.shape[-2:]
        side = math.isqrt(wide * high // count)
        if side and side * side * count == wide * high and high % side == wide % side == 0:
            return latents.reshape(-1, high // side, wide // side, channels).float()
    raise DiffoptError(
        f"latents of {list(latents.shape)} are not positions of pictures of {wide}x{high}: take"
        ' previews("decode")'
    )


def _fitted(positions: Tensor, pictures: Sequence[Image.Image]) -> Tensor:
    """Return the linear map from channels, and 1, to colours from 0 to 1: by least squares."""
    size = positions.shape[2], positions.shape[1]
    small = [np.asarray(p.convert("RGB").resize(size, Image.Resampling.BOX)) for p in pictures]
    colours = torch.from_numpy(np.stack(small)).reshape(-1, 3).float() / 255
    channels = _with_one(positions).reshape(len(colours), -1)
    solution: Tensor = torch.linalg.lstsq(channels, colours).solution
    return solution


def _colours(positions: Tensor, colour_map: Tensor) -> list[Image.Image]:
    pixels = (_with_one(positions) @ colour_map).clamp(0, 1).mul(255).round().byte().numpy()
    return [Image.fromarray(each) for each in pixels]


def _with_one(positions: Tensor) -> Tensor:
    positions = positions.cpu()
    return torch.cat([positions, torch.ones_like(positions[..., :1])], -1)


def from_callback(engine: object, arguments: dict[str, Any]) -> OnStep | None:
    """Take diffusers' callback out of a call's arguments; return it as a function of a `Step`.

    It is called with the engine in place of the pipeline, of which it can set nothing.

    Raises:
        DiffoptError: It asks for other tensors than the latents.
    """
    callback, names = arguments.pop(CALLBACK, None), arguments.pop(_INPUTS, None)
    names = ["latents"] if names is None else list(names)
    if unknown := [name for name in names if name != "latents"]:
        raise DiffoptError(
            f"{_INPUTS}={names!r}: an engine has the latents between its steps, and no {unknown[0]}"
        )
    if callback is None:
        return None
    if not callable(callback):
        raise DiffoptError(f"{CALLBACK} must be a function, got {type(callback).__name__}")

    def call(step: Step) -> None:
        tensors = {name: step.latents for name in names}
        result = callback(_Unchangeable(engine), step.index - 1, step.timestep, tensors)
        returned = dict(result) if isinstance(result, Mapping) else {}
        changed = returned.pop("latents", None)
        if returned:
            others = ", ".join(map(repr, returned))
            raise DiffoptError(f"{CALLBACK} returned {others}: an engine takes latents alone")
        if changed is not None and changed is not tensors.get("latents"):
            step.latents = changed

    return call


class _Unchangeable:
    """An engine for diffusers' callbacks, which set attributes of pipelines that it has none of."""

    def __init__(self, engine: object) -> None:
        vars(self)["_engine"] = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_engine"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise DiffoptError(
            f"{CALLBACK} sets {name}, which an engine does not read: to end a run call cancel(), or"
            " return False from on_step"
        )


class Watcher:
    """Calls a function after each step of a run, and ends the run where it is told to."""

    def __init__(
        self,
        preview: Preview,
        boundaries: Sequence[Boundary],
        on_step: OnStep | None,
        is_cancelled: Callable[[], bool],
    ) -> None:
        """Begin to watch a run.

        Args:
            preview: Makes pictures for the function.
            boundaries: Of the program's steps.
            on_step: The function.
            is_cancelled: Tells whether the run is to end.
        """
        self._preview = preview
        self._boundaries = boundaries
        self._on_step = on_step
        self._is_cancelled = is_cancelled
        self._began = time.perf_counter()

    def __call__(self, pause: Pause) -> None:
        """Call the function.

        Raises:
            Cancelled: The run is to end.
        """
        told = None
        if self._on_step is not None:
            pause.wait()
            told = self._on_step(Step(self._preview, pause, self._boundaries, self._began))
        if told is False or self._is_cancelled():
            raise Cancelled(f"cancelled after step {pause.index} of {len(self._boundaries)}")
