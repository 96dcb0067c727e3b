"""Other arguments for a second run: values that differ between runs depend on the arguments."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffopt.capture.input_recipes import HostCall, RunInputs, tensors_of
from diffopt.errors import CaptureError
from diffopt.host.inputs import CLEANERS, Place, decode_args, leaves, places_in, value_at


def texts(scout: RunInputs) -> list[Place]:
    """Return the places of strings that may be texts: they occur in arguments of host calls.

    Where a host call returns no tensors, Python uses its result: its texts are bound.
    """
    seen = _host_texts(call for call in scout.calls if tensors_of(call.result))
    bound = _host_texts(call for call in scout.calls if not tensors_of(call.result))
    places = []
    for place, value in leaves(scout.arguments):
        if not isinstance(value, str):
            continue
        cleaned = {clean(value) for clean in CLEANERS.values()}
        if cleaned & set(bound):
            continue
        if cleaned & set(seen) or (len(value) > 4 and any(c in s for c in cleaned for s in seen)):
            places.append(place)
    return places


def reached(probe: RunInputs, places: Sequence[Place]) -> list[Place]:
    """Return the places whose changed strings reached a host component: these are texts."""
    seen = _host_texts(probe.calls)

    def is_text(place: Place) -> bool:
        cleaned = [clean(value_at(probe.arguments, place)) for clean in CLEANERS.values()]
        return any(c in s for c in cleaned for s in seen)

    return [place for place in places if is_text(place)]


def _host_texts(calls: Iterable[HostCall]) -> list[str]:
    return [v for call in calls for _, v in leaves(call.args) if isinstance(v, str)]


def other_texts(places: Sequence[Place]) -> dict[Place, Any]:
    """Return other texts for these places, each of which every cleaner changes differently."""
    return {place: f" Wq{index} Zk " for index, place in enumerate(places)}


def same_lengths(scout: RunInputs, probe: RunInputs) -> dict[str, Any] | None:
    """Return the probe's arguments with texts of as many tokens as the scout's; None without any.

    The probe's calls tell how texts reach the host components.
    """
    originals = dict(leaves(scout.arguments))
    places = [p for p, v in leaves(probe.arguments) if isinstance(v, str) and v != originals.get(p)]
    calls = []
    reader = RunInputs(scout.arguments, scout.processors, probe, final=True)
    for call, other in zip(scout.calls, probe.calls, strict=False):
        try:
            encoded = reader.encode(call.args, other.args)
        except CaptureError:
            return None
        if places_in(encoded):
            calls.append((call, encoded))
    scout.templates = reader.templates
    changed: dict[Place, Any] = {}
    for index, place in enumerate(places):
        concerned = [c for c in calls if place in map(tuple, places_in(c[1]))]
        for text in _others_of(originals[place], index):
            arguments = _replace(scout.arguments, {place: text})
            if all(_has_length(*call, scout.processors, arguments) for call in concerned):
                changed[place] = text
                break
        else:
            return None
    return _replace(probe.arguments, changed) if changed else None


def _others_of(text: str, index: int) -> Iterator[str]:
    """Yield texts that may have as many tokens: the words in another order, single letters."""
    words = text.split()
    for start in range(1, len(words)):
        rotated = [*words[start:], *words[:start]]
        yield from (" ".join(rotated), " ".join(rotated[::-1]))
    letter = "QXJVWKZY"[index % 8]
    for count in range(128):
        for filler in (" z", "z"):
            yield f" {letter}{filler * count} "
            yield f"{letter}{filler * count}"


def _has_length(
    call: HostCall, encoded: Any, processors: Mapping[str, Any], arguments: Mapping[str, Any]
) -> bool:
    """Tell whether a host call returns the same shapes, and masks of the same lengths."""
    args, kwargs = decode_args(encoded, arguments)
    result = getattr(processors[call.component], call.method)(*args, **kwargs)

    def lengths(value: Any) -> list[Any]:
        return [
            (key, t.shape, t.reshape(-1, t.shape[-1]).sum(-1).tolist() if _is_mask(t) else None)
            for key, t in tensors_of(value)
        ]

    return lengths(result) == lengths(call.result)


def _is_mask(tensor: Tensor) -> bool:
    return tensor.ndim > 0 and bool(((tensor == 0) | (tensor == 1)).all())


def disturb(scout: RunInputs, texts: Mapping[Place, Any]) -> dict[str, Any]:
    """Return the arguments with these texts and other pictures, arrays, seeds and numbers."""
    changed: dict[Place, Any] = dict(texts)
    for place, value in leaves(scout.arguments):
        if isinstance(value, Image.Image):
            array = np.array(value)
            noise = np.random.default_rng(0).integers(0, 256, array.shape).astype(array.dtype)
            if array.dtype == np.uint8:
                changed[place] = Image.fromarray(noise, mode=value.mode)
        elif isinstance(value, np.ndarray) and value.dtype.kind == "f":
            changed[place] = value[::-1] * 0.5 + 0.25
        elif isinstance(value, torch.Generator):
            # A clone: only such generators have the same Python identity behind the dispatcher.
            changed[place] = torch.Generator().manual_seed(987654321).clone_state()
    for place, guards in scout.guards.items():
        if not any(symbol == "==" and result for symbol, _, result, _ in guards):
            changed[place] = value_at(scout.arguments, place) * (1 + 2**-12)
    return _replace(scout.arguments, changed)  # type: ignore[no-any-return]


def same_generators(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with copies of the generators, so that the caller's do not advance."""
    changed: dict[Place, Any] = {}
    copies: dict[int, torch.Generator] = {}
    for place, value in leaves(arguments):
        if isinstance(value, torch.Generator):
            copies.setdefault(id(value), value.clone_state())
            changed[place] = copies[id(value)]
    return _replace(arguments, changed)  # type: ignore[no-any-return]


def _replace(value: Any, changed: Mapping[Place, Any], place: Place = ()) -> Any:
    if place in changed:
        return changed[place]
    if isinstance(value, Mapping):
        return {k: _replace(v, changed, (*place, k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_replace(v, changed, (*place, i)) for i, v in enumerate(value)]
        # An unchanged list must be the same object: lists are recognized by identity.
        return (
            value if all(a is b for a, b in zip(items, value, strict=True)) else type(value)(items)
        )
    return value
