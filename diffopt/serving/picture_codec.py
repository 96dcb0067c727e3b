"""Pictures from uploads, and pictures to files."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image, ImageOps

from diffopt.engine import picture_record
from diffopt.serving.protocol import ApiError, OutputFormat

Traced = tuple[str, tuple[int, int]]
"""The mode and the size of the picture that an engine was traced with."""


@dataclass(frozen=True)
class Encoding:
    """How pictures are written.

    Attributes:
        format: Of the files.
        quality: Of jpeg and webp; None: 100.
    """

    format: OutputFormat
    quality: int | None

    @property
    def media_type(self) -> str:
        """The format as HTTP calls it."""
        return f"image/{self.format}"


def encoded(
    picture: Image.Image, encoding: Encoding, told: picture_record.Record | None = None
) -> bytes:
    """Return a picture's file; a PNG file has what made it, where that is told."""
    file = io.BytesIO()
    if encoding.format == "png":
        info = None if told is None else picture_record.as_text(told)
        picture.save(file, "PNG", pnginfo=info)
    else:
        quality = 100 if encoding.quality is None else encoding.quality
        picture.convert("RGB").save(file, encoding.format.upper(), quality=quality)
    return file.getvalue()


def decoded(name: str, data: bytes, traced: Traced | None) -> Image.Image:
    """Return an uploaded picture in the traced mode; an `ApiError` for another size."""
    picture = _opened(name, data, traced)
    return picture.convert(traced[0] if traced else "RGB")


def decoded_mask(name: str, data: bytes, traced: Traced | None) -> Image.Image:
    """Return a mask that is white where the picture is painted anew, as pipelines take it.

    In OpenAI's API these places are transparent, in the mask or in the image itself.
    """
    picture = _opened(name, data, traced)
    if picture.has_transparency_data:
        picture = ImageOps.invert(picture.convert("RGBA").getchannel("A"))
    elif name == "image":
        raise ApiError(
            400, "mask: is missing, and nothing of the image is transparent", param="mask"
        )
    return picture.convert(traced[0] if traced else "L")


def _opened(name: str, data: bytes, traced: Traced | None) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
        if traced is not None and picture.size != traced[1]:  # before the pixels are unpacked
            wide, high = traced[1]
            text = f"{name}: is {picture.width}x{picture.height}, the engine takes {wide}x{high}"
            raise ApiError(400, text, param=name)
        picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        text = f"{name}: is no intact PNG, JPEG or WebP file"
        raise ApiError(400, text, param=name) from error
    return picture
