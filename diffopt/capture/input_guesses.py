"""Enumerates how texts and arrays may be computed from a caller's arguments."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from diffopt.host.arguments import Place, leaves, value_at
from diffopt.host.cleaners import CLEANERS
from diffopt.host.inputs import Picture, TensorArgument


def templates(
    texts: Sequence[tuple[Place, str]], text: str
) -> Iterator[tuple[str | tuple[Place, str], ...]]:
    """Yield the parts of each `Text` of literals and cleaned texts that renders a text."""
    if not texts:
        yield (text,) if text else ()
        return
    place, value = texts[0]
    for clean, function in CLEANERS.items():
        cleaned = function(value)
        if cleaned and cleaned in text:
            before, after = text.split(cleaned, 1)
            for left in templates(texts[1:], before):
                yield from ((*left, (place, clean), *right) for right in templates(texts, after))
    yield from templates(texts[1:], text)


def array_recipes(
    arguments: Mapping[str, Any], final: np.ndarray
) -> Iterator[TensorArgument | Picture]:
    """Yield the steps from an argument (a picture or an array) that may compute an array."""
    dtype = final.dtype.name
    for place, value in leaves(arguments):
        if isinstance(value, np.ndarray) and value.shape == final.shape:
            yield TensorArgument(place, dtype)
    pictures = {place: v for place, v in leaves(arguments) if isinstance(v, Image.Image)}
    pictures |= {place[:-1]: v for place, v in pictures.items() if place and place[-1] == 0}
    scales = ("byte",) if final.dtype == np.uint8 else ("unit", "signed", "centered", "binary")
    for place, picture in pictures.items():
        for layout in ("nhwc", "nchw", "nhw", "hwc", "chw", "hw"):
            if len(layout) != final.ndim:
                continue
            size = (final.shape[layout.index("w")], final.shape[layout.index("h")])
            modes = dict.fromkeys((picture.mode, "RGB", "L"))
            resizings = _resizings(size == picture.size)
            for mode, (resample, gap), scale in itertools.product(modes, resizings, scales):
                yield Picture(place, mode, size, resample, scale, layout, gap)


def picture_recipes(
    arguments: Mapping[str, Any], final: Image.Image
) -> Iterator[tuple[Place, tuple[str, tuple[int, int], int, float | None]]]:
    """Yield the places of pictures, with the arguments of `resized` that may give another one."""
    for place, picture in leaves(arguments):
        if isinstance(picture, Image.Image):
            for resample, gap in _resizings(final.size == picture.size):
                yield place, (final.mode, final.size, resample, gap)


def _resizings(is_whole: bool) -> list[tuple[int, float | None]]:
    """Return PIL's filters and first reductions to try; none is needed for a whole picture."""
    return [(0, None)] if is_whole else [*itertools.product((1, 2, 3, 0), (None, 1))]


def reproduces(
    step: TensorArgument | Picture, arguments: Mapping[str, Any], array: np.ndarray
) -> bool:
    """Tell whether a step computes an array from the arguments."""
    value = value_at(arguments, step.place)
    if isinstance(step, TensorArgument):
        return np.array_equal(value, array)
    result = step.render(value if isinstance(value, (list, tuple)) else [value])
    return (result.dtype, result.shape) == (array.dtype, array.shape) and np.array_equal(
        result, array
    )
