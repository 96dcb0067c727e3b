"""An engine as a server has it: requests are checked, queued, and become pictures."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from diffopt.engine import picture_record
from diffopt.errors import DiffoptError
from diffopt.host.inputs import Host
from diffopt.host.outputs import first_output, pictures_in
from diffopt.host.plain_arguments import as_traced
from diffopt.serving import picture_codec
from diffopt.serving.batcher import Batcher, Batching, Serve
from diffopt.serving.protocol import ApiError, EditRequest, ImageRequest
from diffopt.serving.refusals import refusal
from diffopt.serving.settings import Settings

TEXTS = ("prompt", "negative_prompt")
MASKS = ("mask_image", "mask")
"""What pipelines call the mask."""


Call = Callable[..., Any]
"""Calls a function with arguments, perhaps in another thread, and returns its result."""


def directly(function: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """Call a function in this thread."""
    return function(*args, **named)


class Servable(Protocol):
    """What a server asks of an `Engine`."""

    path: Path
    manifest: dict[str, Any]

    @property
    def host(self) -> Host:
        """The host side."""

    @property
    def batch(self) -> tuple[int, int] | None:
        """The fewest and the most requests of one run."""

    @property
    def steps(self) -> int:
        """The steps of a run, after which `on_step` is called."""

    @property
    def serve(self) -> Serve:
        """Runs several requests."""

    def check(self, **arguments: Any) -> None:
        """Raise what a call would, without running it."""

    def cancel(self) -> None:
        """End the run after the step that it is in."""

    def converts(self, output_type: str) -> bool:
        """Tell whether the result can be had as this."""

    def picture_sizes(self) -> list[tuple[int, int]]:
        """Return the size of each picture of a call."""

    def digest(self) -> str:
        """Return a hash of the file."""


@dataclass(frozen=True)
class Order:
    """A request that the engine can do.

    Attributes:
        calls: The arguments of the engine, for each image.
        encoding: How the pictures are written.
    """

    calls: list[dict[str, Any]]
    encoding: picture_codec.Encoding

    def seed(self, index: int) -> int | None:
        """Return the seed of an image, if it has one."""
        seed: int | None = self.calls[index].get("seed")
        return seed


class ServedEngine:
    """An engine with its queue.

    Attributes:
        name: What requests call it.
        engine: The engine.
        size: Of its pictures, as "512x512".
        created: When its file was written, in seconds.
        batcher: What runs it.
    """

    def __init__(
        self,
        name: str,
        engine: Servable,
        settings: Settings,
        observe: Callable[[int, float], None] = lambda images, seconds: None,
        call: Call = directly,
    ) -> None:
        """Check that the engine can be served; if not, that is a `DiffoptError`.

        Args:
            name: What requests call it.
            engine: The engine.
            settings: What the server allows.
            observe: Called with the images of each run and its seconds.
            call: Calls the engine; see `engine_thread.call`.
        """
        self.name = name
        self.engine = engine
        self.settings = settings
        self._width, self._height = _expect_servable(engine)
        self.size = f"{self._width}x{self._height}"
        self.created = int(engine.path.stat().st_mtime) if engine.path.is_file() else 0
        self.batcher = Batcher(
            partial(call, engine.serve),
            _batching(engine, settings),
            end=engine.cancel,
            observe=observe,
        )

    @property
    def schema(self) -> Mapping[str, Any]:
        """What the engine was traced with, by the names of the arguments."""
        return self.engine.host.schema

    def about(self) -> dict[str, Any]:
        """Return what `--dry-run` prints."""
        batching = self.batcher.batching
        return {
            "file": str(self.engine.path),
            "target": self.engine.manifest["target"],
            "passes": self.engine.manifest["passes"],
            "size": self.size,
            "arguments": sorted(self.engine.host.inputs() - {"generator"}),
            "endpoint": "/v1/images/" + ("edits" if "image" in self.schema else "generations"),
            "batch": [batching.low, batching.high],
        }

    def order(self, request: ImageRequest, files: Mapping[str, bytes]) -> Order:
        """Check a request, and return what it asks for; else an `ApiError`."""
        count = request.n or 1
        self._check_options(request, count)
        arguments = self._arguments(request, files)
        calls = self._seeded(arguments, request.seed, count)
        try:
            self.engine.check(**calls[0])
        except DiffoptError as error:
            raise refusal(error, {*arguments, *self.schema, "seed"}) from error
        encoding = picture_codec.Encoding(
            request.output_format or "png", request.output_compression
        )
        return Order(calls, encoding)

    def picture(self, result: Any) -> Image.Image:
        """Return the picture in what the engine returned."""
        return pictures_in(first_output(result))[0]

    def preview(self, step: Any, place: int) -> Image.Image:
        """Return an image of a run as it is after a step, in the size of the result."""
        picture: Image.Image = step.previews()[place]
        return picture.resize((self._width, self._height), Image.Resampling.BILINEAR)

    def encoded(self, picture: Image.Image, order: Order, index: int | None) -> bytes:
        """Return the file of a picture: of the image `index`, or of a preview if that is None."""
        told = None
        if index is not None:
            told = picture_record.record(self.engine, order.calls[index])
        return picture_codec.encoded(picture, order.encoding, told)

    def _check_options(self, request: ImageRequest, count: int) -> None:
        """Refuse what the server, or the size of the engine's pictures, does not allow."""
        if count > self.settings.max_images:
            raise ApiError(400, f"n={count}: at most {self.settings.max_images}", param="n")
        if count > self.batcher.batching.queue:
            raise ApiError(400, f"n={count}: more than may wait at once", param="n")
        if request.size not in (None, "auto", self.size):
            text = f"size={request.size}: {self.name} makes pictures of {self.size}, or auto"
            raise ApiError(400, text, param="size")
        if request.output_compression is not None and request.output_format in (None, "png"):
            text = "output_compression: is for the output_format jpeg and webp"
            raise ApiError(400, text, param="output_compression")
        if request.stream and count > 1:
            raise ApiError(400, f"n={count}: a stream is of one image", param="n")
        if request.partial_images and not request.stream:
            raise ApiError(400, "partial_images: only with stream=true", param="partial_images")
        for name in TEXTS:
            length = len(getattr(request, name) or "")
            if length > self.settings.max_prompt:
                text = f"{name}: has {length} characters, at most {self.settings.max_prompt}"
                raise ApiError(400, text, param=name, code="string_above_max_length")

    def _arguments(self, request: ImageRequest, files: Mapping[str, bytes]) -> dict[str, Any]:
        given = request.for_the_engine()
        if "output_type" in given:
            text = "output_type: is always a picture; output_format has its format"
            raise ApiError(400, text, param="output_type")
        given |= self._prompt(request.prompt)
        try:
            arguments = as_traced(self.engine.host, given | self._pictures(request, files))
        except DiffoptError as error:
            raise refusal(error, given) from error
        return {**arguments, "output_type": "pil"}

    def _prompt(self, prompt: str | None) -> dict[str, str]:
        if "prompt" not in self.schema:
            if prompt:
                raise ApiError(400, f"prompt: {self.name} takes none; leave it out", param="prompt")
            return {}
        if prompt is None:
            raise ApiError(400, "prompt: is missing", param="prompt", code="missing")
        return {"prompt": prompt}

    def _pictures(
        self, request: ImageRequest, files: Mapping[str, bytes]
    ) -> dict[str, Image.Image]:
        """Return the pictures as the engine takes them; a mask also out of the image's alpha."""
        is_edit = isinstance(request, EditRequest)
        if is_edit != ("image" in self.schema):
            text = f"{self.name} makes images of "
            text += "a prompt alone: use generations" if is_edit else "another one: use edits"
            raise ApiError(400, f"{text}, at /v1/images", param="model")
        if not is_edit:
            return {}
        if "image" not in files:
            raise ApiError(400, "image: is missing", param="image", code="missing")
        wanted = {name: _traced_picture(self.schema[name]) for name in self.schema}
        found = {"image": picture_codec.decoded("image", files["image"], wanted["image"])}
        mask = next((name for name in MASKS if name in self.schema), None)
        if mask is not None:
            source = "mask" if "mask" in files else "image"
            found[mask] = picture_codec.decoded_mask(source, files[source], wanted[mask])
        elif "mask" in files:
            raise ApiError(400, f"mask: {self.name} takes none; leave it out", param="mask")
        return found

    def _seeded(
        self, arguments: dict[str, Any], seed: int | None, count: int
    ) -> list[dict[str, Any]]:
        host = self.engine.host
        if not host.takes_seed():
            if count > 1:
                text = f"n={count}: {self.name} draws no random numbers, so all would be the same"
                raise ApiError(400, text, param="n")
            return [arguments if seed is None else {**arguments, "seed": seed}]
        first = secrets.randbelow(1 << 32) if seed is None else seed
        return [host.seeded(arguments, first + k) for k in range(count)]


def _expect_servable(engine: Servable) -> tuple[int, int]:
    """Return the size of an engine's pictures; a `DiffoptError` if it cannot be served."""
    sizes = engine.picture_sizes() if engine.converts("pil") else []
    if not sizes:
        raise DiffoptError(f"{engine.path}: makes no pictures, and so cannot be served")
    if len(sizes) > 1:
        raise DiffoptError(
            f"{engine.path}: makes {len(sizes)} pictures in a call, and one that is served makes"
            f" one: build it without a fixed --batch, or with --batch 1..{len(sizes)}"
        )
    schema = engine.host.schema
    for name in schema:
        if _traced_picture(schema[name]) is not None and name not in ("image", *MASKS):
            raise DiffoptError(
                f"{engine.path}: takes a picture as {name!r}, for which requests have no place"
            )
    return sizes[0]


def _batching(engine: Servable, settings: Settings) -> Batching:
    low, high = engine.batch or (1, 1)
    if settings.max_batch is not None:
        if settings.max_batch < low:
            raise DiffoptError(
                f"{engine.path}: runs {low} to {high} requests at once, and --max-batch is"
                f" {settings.max_batch}"
            )
        high = min(high, settings.max_batch)
    return Batching(low, high, settings.max_wait_ms / 1000, settings.max_queue)


def _traced_picture(schema: Mapping[str, Any]) -> tuple[str, tuple[int, int]] | None:
    """Return the mode and the size of a traced picture, also of one in a list."""
    if schema.get("list"):
        schema = schema["list"][0]
    if "picture" not in schema:
        return None
    mode, size, _ = schema["picture"]
    return mode, tuple(size)
