"""Other arguments for a second run: values that differ between runs depend on the arguments."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffopt.capture.input_recipes import HostCall, RunInputs, tensors_of
from diffopt.errors import CaptureError
from diffopt.host.arguments import Place, is_within, items, leaves, rebuilt, replaced, value_at
from diffopt.host.cleaners import CLEANERS, probe_text
from diffopt.host.inputs import Host, decode_args, places_in

_SEED = 987654321  # of the probe's values: none that a caller's were made with


def texts(scout: RunInputs) -> list[Place]:
    """Return the places of strings that may be texts: they occur in arguments of host calls.

    Where a host call returns neither tensors nor tokens, Python uses its result: its texts are
    bound.
    """
    followed = [call for call in scout.calls if scout.follows(call.result)]
    seen, made = _host_texts(followed), _origins(followed)
    bound = _host_texts(call for call in scout.calls if not scout.follows(call.result))
    places = []
    for place, value in leaves(scout.arguments):
        if not isinstance(value, str):
            continue
        cleaned = {clean(value) for clean in CLEANERS.values()}
        if cleaned & set(bound):
            continue
        is_part = len(value) > 4 and any(c in s for c in cleaned for s in seen)
        if cleaned & set(seen) or is_part or place in made:
            places.append(place)
    return places


def reached(probe: RunInputs, places: Sequence[Place]) -> list[Place]:
    """Return the places whose changed strings reached a host component: these are texts."""
    seen, made = _host_texts(probe.calls), _origins(probe.calls)

    def is_text(place: Place) -> bool:
        if place in made:
            return True
        cleaned = [clean(value_at(probe.arguments, place)) for clean in CLEANERS.values()]
        return any(c in s for c in cleaned for s in seen)

    return [place for place in places if is_text(place)]


def named_in(failure: Exception, probe: RunInputs, places: Sequence[Place]) -> list[Place]:
    """Return the places whose changed strings an error names: no texts, but names such as "pt"."""
    message = str(failure)
    values = {place: value_at(probe.arguments, place) for place in places}
    return [p for p, text in values.items() if text in message or repr(text)[1:-1] in message]


def _host_texts(calls: Iterable[HostCall]) -> list[str]:
    return [v for call in calls for _, v in leaves(call.args) if isinstance(v, str)]


def _origins(calls: Iterable[HostCall]) -> set[Place]:
    """Return the places of the texts of which methods made what host components are called with."""
    return {p for call in calls for derived in call.made.values() for p in derived.places()}


def seeds(scout: RunInputs) -> list[Place]:
    """Return the places of numbers that may be the seeds of generators which the pipeline makes."""
    made = scout.streams.made
    return [p for p, v in leaves(scout.arguments) if type(v) is int and v in made]


def seeded(probe: RunInputs, places: Sequence[Place]) -> list[Place]:
    """Return the places of which the pipeline made a generator of the changed number."""
    return [place for place in places if value_at(probe.arguments, place) in probe.streams.made]


def other_values(
    scout: RunInputs, texts: Sequence[Place], seeds: Sequence[Place]
) -> dict[Place, Any]:
    """Return other texts, each of which every cleaner changes differently, and other seeds."""
    values: dict[Place, Any] = {
        place: _other_text(value_at(scout.arguments, place), index)
        for index, place in enumerate(texts)
    }
    return values | {place: _SEED + index for index, place in enumerate(seeds)}


def _other_text(text: str, index: int) -> str:
    """Return a text for the probe; in JSON only strings differ, as pipelines look names up."""
    data, other = _json(text), probe_text(index)
    if data is None:
        return other
    strings = {place: other.strip() for place, v in leaves(data) if isinstance(v, str)}
    return f"\t{json.dumps(replaced(data, strings), ensure_ascii=False)}\t"


def _json(text: str) -> Any:
    """Return the object or list that a text is in JSON; None where it is none."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        return json.loads(text)
    except ValueError:
        return None


def same_lengths(scout: RunInputs, probe: RunInputs) -> dict[str, Any] | None:
    """Return the probe's arguments with texts of as many tokens as the scout's; None without any.

    The probe's calls tell how texts reach the host components.
    """
    originals = dict(leaves(scout.arguments))
    places = [p for p, v in leaves(probe.arguments) if isinstance(v, str) and v != originals.get(p)]
    calls = []
    reader = RunInputs(scout.arguments, scout.processors, probe, final=True)
    reader.calls = scout.calls
    for index, (call, other) in enumerate(zip(scout.calls, probe.calls, strict=False)):
        try:
            encoded = reader.encode(call.args, other.args, (index,))
        except CaptureError:
            continue  # with other lengths it is called in another way
        if places_in(encoded):
            calls.append((call, encoded))
    scout.templates = reader.templates
    changed: dict[Place, Any] = {}
    for index, place in enumerate(places):
        concerned = [c for c in calls if place in places_in(c[1])]
        for text in _others_of(originals[place], index):
            arguments = replaced(scout.arguments, {place: text})
            if all(_has_length(*call, scout.processors, arguments) for call in concerned):
                changed[place] = text
                break
        else:
            return None
    return replaced(probe.arguments, changed) if changed else None


def _others_of(text: str, index: int) -> Iterator[str]:
    """Yield texts that may have as many tokens: the words in another order, single letters."""
    strings = [v for _, v in leaves(_json(text)) if isinstance(v, str) and v in text]
    if strings:
        longest = max(strings, key=len)
        yield from (text.replace(longest, other) for other in _others_of(longest, index))
        return
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


def disturb(scout: RunInputs, changed: Mapping[Place, Any]) -> dict[str, Any]:
    """Return the arguments with these values, and with other pictures, arrays, lists, generators.

    Each gets a value of its own, so that what is computed of one is not taken for another's.
    """
    changed = dict(changed)
    for index, (place, value) in enumerate(leaves(scout.arguments)):
        if isinstance(value, Image.Image):
            array = np.array(value)
            if array.dtype == np.uint8:
                picture = Image.fromarray(_noise(array, index), mode=value.mode)
                picture.info = dict(value.info)  # how it was stored, and is to be turned
                changed[place] = picture
        elif isinstance(value, np.ndarray) and value.dtype == np.uint8:
            changed[place] = _noise(value, index)
        elif isinstance(value, np.ndarray) and value.dtype.kind == "f":
            turned = value[::-1] if value.ndim else value
            changed[place] = turned * value.dtype.type(0.5) + value.dtype.type(0.25 + index * 2**-8)
        elif isinstance(value, torch.Generator):
            # A clone: only such generators have the same Python identity behind the dispatcher.
            changed[place] = torch.Generator().manual_seed(_SEED + index).clone_state()
    for index, place in enumerate(sorted(scout.used_lists, key=repr)):
        for number, value in enumerate(_other_numbers(value_at(scout.arguments, place), index)):
            changed[(*place, number)] = value
    for place, guards in scout.guards.items():
        if not any(symbol == "==" and result for symbol, _, result, _ in guards):
            changed[place] = float(value_at(scout.arguments, place)) * (1 + 2**-12)
    return replaced(scout.arguments, changed)  # type: ignore[no-any-return]


def _noise(array: np.ndarray, index: int) -> np.ndarray:
    random = np.random.default_rng([_SEED, index])
    return random.integers(0, 256, array.shape).astype(np.uint8)


def inputs_of(host: Host, arguments: Mapping[str, Any]) -> dict[Place, Any]:
    """Return the values of a run's arguments at the places from which inputs are computed."""
    places = host.input_places()
    return {p: v for p, v in leaves(arguments) if is_within(p, places)}


def _other_numbers(values: list[Any], index: int) -> list[Any]:
    """Return other numbers of their types: near them in their order, and indices in their range."""
    if any(isinstance(value, float) for value in values):
        return [v * (1 - 2 ** -(8 + index)) if isinstance(v, float) else v for v in values]
    if min(values) > 0:
        return [value - 1 for value in values]
    rotated = [*values[1:], values[0]]
    return rotated if rotated != values else [value + 1 for value in values]


def separated(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with copies of mutable leaves and lists, none of which is another's.

    What enters the pipeline is told apart by identity; and the caller's generators do not advance.
    """
    return {name: _copy(value) for name, value in arguments.items()}


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.clone_state()
    if isinstance(value, Tensor):
        return value.detach().clone(memory_format=torch.preserve_format)
    if isinstance(value, (np.ndarray, Image.Image)):
        return value.copy()
    parts = items(value)
    return value if parts is None else rebuilt(value, {key: _copy(part) for key, part in parts})
