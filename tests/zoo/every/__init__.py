"""A tiny instance and a call of every pipeline of diffusers, from the names and types of arguments.

A family is a pattern of class names. It starts from a case of the zoo, whose components and
arguments it takes, and says what differs. All families that match a class add up, in their order.
"""

import copy
import functools
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

import diffusers
from transformers import PreTrainedTokenizerBase

from tests.zoo.case import Case, case
from tests.zoo.every import (
    audio_families,
    cascade_families,
    transformer_families,
    unet_families,
    video_families,
)
from tests.zoo.every.encoders import ENCODERS
from tests.zoo.every.family import ARGUMENTS, Family
from tests.zoo.every.left_out import LEFT_OUT
from tests.zoo.every.models import MODELS, make, recipe
from tests.zoo.schedulers import CASES

__all__ = ["LEFT_OUT", "every_case", "pipelines"]

FAMILIES = [
    *unet_families.FAMILIES,
    *transformer_families.FAMILIES,
    *cascade_families.FAMILIES,
    *video_families.FAMILIES,
    *audio_families.FAMILIES,
]
BASES = (diffusers.ModelMixin, diffusers.SchedulerMixin)


@functools.cache
def pipelines() -> dict[str, type]:
    """Return the public pipelines by name, a class with several names once."""
    found: dict[type, str] = {}
    for name in sorted(diffusers._class_to_module):
        made = getattr(diffusers, name, None) if name.endswith("Pipeline") else None
        if isinstance(made, type) and issubclass(made, diffusers.DiffusionPipeline):
            found.setdefault(made, name)
    return {name: made for made, name in found.items() if name != "DiffusionPipeline"}


def families(name: str) -> list[Family]:
    return [family for family in FAMILIES if re.search(family.pattern, name)]


def every_case(name: str) -> Case:
    """Return the case of a pipeline by its class's name."""
    made = pipelines()[name]

    def build() -> Any:
        module = sys.modules[made.__module__]
        if hasattr(module, "calculate_dimensions"):
            module.calculate_dimensions = small_area(module.calculate_dimensions)
        pipe = made(**components(name))
        for family in families(name):
            for attribute, value in family.attributes.items():
                setattr(pipe, attribute, value)
        return pipe

    return Case(name, case(name, build, dict).build, lambda seed: dict(arguments(name, seed)))


def small_area(function: Any) -> Any:
    """Return a function of the sizes of a picture, for less than the million pixels it is for."""
    function = getattr(function, "__wrapped__", function)
    return functools.wraps(function)(lambda area, ratio: function(32 * 32, ratio))


def components(name: str) -> dict[str, Any]:
    """Return the arguments of a pipeline's class."""
    signature = inspect.signature(pipelines()[name].__init__).parameters
    base: dict[str, Any] = {}
    makers: dict[str, Any] = {}
    changes: dict[str, dict[str, Any]] = {}
    for family in families(name):
        if family.base:
            base = CASES[family.base].build().components
        for part, how in family.components.items():
            if isinstance(how, dict):
                changes[part] = changes.get(part, {}) | how
            else:
                makers[part] = recipe(how) if isinstance(how, str) else how
                changes.pop(part, None)
    made, module = {}, sys.modules[pipelines()[name].__module__]
    for part, parameter in list(signature.items())[1:]:
        if part in makers:
            how = makers[part]
            made[part] = how(**changes.get(part, {})) if callable(how) else how
        elif base.get(part) is not None:
            made[part] = changed(base[part], changes.get(part))
        elif part in changes or parameter.default is inspect.Parameter.empty:
            made[part] = from_annotation(parameter.annotation, changes.get(part, {}), module)
    # Pipelines set attributes of tokenizers, which the zoo shares.
    tokenizers = {p: t for p, t in made.items() if isinstance(t, PreTrainedTokenizerBase)}
    return made | copy.deepcopy(tokenizers)


def changed(part: Any, changes: dict[str, Any] | None) -> Any:
    if changes is None:
        return part
    known = inspect.signature(type(part).__init__).parameters
    config = {key: value for key, value in part.config.items() if key in known}
    return type(part)(**config | changes)


def from_annotation(annotation: Any, changes: dict[str, Any], module: Any) -> Any:
    """Make the first class of an annotation that there is a recipe for."""
    for name in re.findall(r"\w+", inspect.formatannotation(annotation)):
        if name in MODELS or name in ENCODERS:
            return recipe(name)(**changes)
        made = getattr(module, name, None)
        if isinstance(made, type) and issubclass(made, BASES):
            return make(made, **changes)
    raise LookupError(f"no recipe for {inspect.formatannotation(annotation)}")


def arguments(name: str, seed: int) -> Iterator[tuple[str, Any]]:
    """Yield the arguments of a call, of those that the pipeline has."""
    signature = inspect.signature(pipelines()[name].__call__).parameters
    known = dict(ARGUMENTS)
    for family in families(name):
        if family.base:
            known |= CASES[family.base].inputs(seed)
            known |= {key: ARGUMENTS[key] for key in ("prompt", "image", "mask_image")}
        known |= family.arguments
    size = known["height"], known["width"]
    for key in signature:
        if key in known and known[key] is not ...:
            value = known[key]
            yield key, value(seed, size) if callable(value) else value
