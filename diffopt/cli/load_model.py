"""Loads the MODEL of the command line, and completes the arguments of a call."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import json
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffopt import optional
from diffopt.capture.trace import trace
from diffopt.cli import model_memory
from diffopt.errors import DiffoptError, first_line
from diffopt.ir.program import Program
from diffopt.spec import suggest

KINDS = "a local diffusers directory, a hub id, a .program file, or package.module:function"
PROMPT = "a cat"  # short: every model has room for it


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_model(text: str, dtype: str = "fp32") -> Any:
    """Return the pipeline or the `Program` of a MODEL argument, a diffusers pipeline in a dtype."""
    if dtype not in DTYPES:
        raise DiffoptError(f"--dtype {dtype}: wants {', '.join(DTYPES)}{suggest(dtype, DTYPES)}")
    path = Path(text)
    is_diffusers = path.is_dir() or not (path.exists() or ":" in text)
    if dtype != "fp32" and not is_diffusers:
        raise DiffoptError(
            f"--dtype {dtype} is for diffusers pipelines; {text} has types of its own"
        )
    if path.suffix == ".program":
        if not path.is_file():
            raise DiffoptError(f"there is no file {text}")
        return Program.load(path)
    if path.exists():
        return _pipeline(path, dtype)
    if re.fullmatch(r"[\w.]+:\w+", text):
        return _function(text)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text):
        return _hub(text, dtype)
    raise DiffoptError(f"there is no {text}; MODEL is {KINDS}")


def _diffusers() -> Any:
    diffusers = optional.require("diffusers", "reading a model", "'diffopt[diffusers]'")
    for library in ("diffusers", "transformers"):
        logging: Any = importlib.import_module(f"{library}.utils.logging")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    return diffusers


def _from_pretrained(model: str | Path, dtype: str, absent: Iterable[str] = ()) -> Any:
    """Return a pipeline, with None for the components that it is to have none of."""
    pipeline = _diffusers().DiffusionPipeline
    without = dict.fromkeys(absent)
    with warnings.catch_warnings():
        # Older diffusers lack the new name of torch_dtype, and the old one warns.
        warnings.simplefilter("ignore", FutureWarning)
        return _quiet(pipeline.from_pretrained(model, torch_dtype=DTYPES[dtype], **without))


def _absent(path: Path) -> list[str]:
    """Return the components that a pipeline was saved without, as Stable Diffusion 3 without T5.

    diffusers wants to be told of those again that not every pipeline of the class may lack.
    """
    index = json.loads((path / "model_index.json").read_text())
    if not isinstance(index, dict):
        raise DiffoptError(f"{path / 'model_index.json'} is no table of a pipeline's components")
    return [name for name, entry in index.items() if entry == [None, None]]


def _pipeline(path: Path, dtype: str) -> Any:
    if not (path / "model_index.json").is_file():
        raise DiffoptError(f"{path} is no diffusers directory: it has no model_index.json")
    model_memory.check(path, dtype, DTYPES[dtype])
    try:
        return _from_pretrained(path, dtype, _absent(path))
    except (OSError, ValueError) as error:
        raise DiffoptError(f"{path} cannot be read: {first_line(error)}") from error


def _hub(name: str, dtype: str) -> Any:
    try:
        return _from_pretrained(name, dtype)
    except Exception as error:  # the hub's client raises types of several libraries
        raise DiffoptError(
            f"{name} is no local directory, and could not be had from the hub: {first_line(error)}"
        ) from error


def _function(text: str) -> Any:
    name, _, attribute = text.partition(":")
    sys.path.insert(0, "")  # a module beside the user's shell, as with `python -m`
    try:
        function = getattr(importlib.import_module(name), attribute)
    except ModuleNotFoundError as error:
        raise DiffoptError(f"{text}: {error}") from error
    except AttributeError:
        raise DiffoptError(f"{text}: module {name} has no '{attribute}'") from None
    finally:
        sys.path.remove("")
    if not callable(function):
        kind = type(function).__name__
        raise DiffoptError(f"{text} is a {kind}; name a function that returns a pipeline")
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError) as error:
        raise DiffoptError(f"{text} has to be callable without arguments: {error}") from error
    pipe = _quiet(function())
    if not callable(pipe):
        raise DiffoptError(f"{text}() returned a {type(pipe).__name__}, which cannot be called")
    return pipe


def _quiet(pipe: Any) -> Any:
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    return pipe


def _is_the_models(error: Exception) -> bool:
    """Tell whether an error was raised by another's code, and not by diffopt's."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return not Path(files[-1]).is_relative_to(Path(__file__).parents[1])


def read_settings(settings: Iterable[str]) -> dict[str, Any]:
    """Read `name=value` texts: Python literals, image and tensor files, or else plain words."""
    values = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name.isidentifier():
            raise DiffoptError(f"--set wants name=value, got '{setting}'")
        values[name] = _read(text)
    return values


def _read(text: str) -> Any:
    readers: dict[str, Callable[[str], Any]] = {
        ".png": Image.open,
        ".jpg": Image.open,
        ".jpeg": Image.open,
        ".pt": lambda name: torch.load(name, weights_only=True),
        ".npy": lambda name: torch.from_numpy(np.load(name)),
    }
    reader = readers.get(Path(text).suffix.lower())
    if reader:
        try:
            return reader(text)
        except (OSError, ValueError) as error:
            raise DiffoptError(f"--set: {text} cannot be read: {error}") from error
    if text in _JSON_WORDS:
        raise DiffoptError(
            f"--set: write {_JSON_WORDS[text]}, as in Python, for {text}, or the word itself in"
            f" quotes: \"'{text}'\""
        )
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


_JSON_WORDS = {"null": "None", "true": "True", "false": "False"}


@dataclass(frozen=True)
class TracedCall:
    """How a pipeline is called to trace it.

    Attributes:
        settings: Arguments of the call.
        steps: Of sampling; None: the pipeline's default.
        batch: The number of images.
        dynamic: Names of numbers that stay inputs, with commas; auto: all that can.
        check: Whether the pipeline runs for real; None: where that is quick.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    batch: int = 1
    dynamic: str = ""
    check: bool | None = None


def trace_model(text: str, call: TracedCall, dtype: str = "fp32") -> Program:
    """Return the program of a MODEL argument: read from its file, or traced."""
    return traced(load_model(text, dtype), call, text)


def traced(model: Any, call: TracedCall, text: str) -> Program:
    """Return the program of what `load_model` returned for `text`."""
    if isinstance(model, Program):
        if replace(call, check=call.check or None) != TracedCall():
            raise DiffoptError(f"{text} is traced already: trace its pipeline to change the call")
        return model
    arguments = call_arguments(model, call.settings, steps=call.steps, batch=call.batch)
    dynamic: Any = call.dynamic
    if dynamic != "auto":
        dynamic = tuple(filter(None, dynamic.split(",")))
    try:
        return trace(model, dynamic=dynamic, source=text, check=call.check, **arguments)
    except (ValueError, TypeError) as error:  # with which pipelines refuse arguments
        if not _is_the_models(error):
            raise
        raise DiffoptError(
            f"{text} refuses this call: {type(error).__name__}: {first_line(error)}"
        ) from error


def call_arguments(
    pipe: Any,
    settings: Mapping[str, Any],
    *,
    steps: int | None = None,
    batch: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Return arguments to call `pipe` with: `settings`, and defaults for required ones.

    A default's value does not matter: capture needs any call. With several images in a call, each
    has its own generator, and seeds count up.
    """
    parameters = inspect.signature(pipe).parameters
    # Pipelines with **kwargs ignore unknown names, and so misspelt ones.
    has_kwargs = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in settings.keys() - parameters.keys():
        if not has_kwargs or difflib.get_close_matches(name, parameters):
            raise DiffoptError(f"{_name(pipe)} has no argument '{name}'{suggest(name, parameters)}")
    generators = [torch.Generator().manual_seed(seed + index) for index in range(batch)]
    defaults = {
        "prompt": PROMPT if batch == 1 else [PROMPT] * batch,
        "class_labels": [0] * batch,
        "batch_size": batch,
        "generator": generators[0] if batch == 1 else generators,
        "num_inference_steps": steps,
    }
    if "prompt_embeds" in settings:
        del defaults["prompt"]
    if steps is None:
        del defaults["num_inference_steps"]
    arguments = {name: value for name, value in defaults.items() if name in parameters}
    arguments |= settings
    missing = [
        name
        for name, p in parameters.items()
        if p.default is p.empty
        and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and name not in arguments
    ]
    if missing:
        wanted = " ".join(f"--set {name}=…" for name in missing)
        raise DiffoptError(f"{_name(pipe)} needs {', '.join(missing)}; give {wanted}")
    return arguments


def _name(pipe: Any) -> str:
    return str(getattr(pipe, "__name__", type(pipe).__name__))
