"""Saves tokenizers and image processors as files, and loads them.

The files are those of `save_pretrained`, which transformers' auto classes load. Where they would
not, `component.json` says how: the class of a tokenizer that is diffusers' own; and of a processor
its parts, each in a folder, as its own loading asks for all of them, also those that the pipeline
never calls (for videos, which takes torchvision).
"""

import importlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffopt import optional
from diffopt.errors import DiffoptError, first_line

_HOW = "component.json"
_PACKAGES = ("transformers", "diffusers")

METHODS = ("__call__", "apply_chat_template", "encode", "preprocess", "pad")
"""By which pipelines turn texts and pictures into tensors: files may ask for no other."""

_LOCAL = {"local_files_only": True, "trust_remote_code": False}
"""For what is loaded of a file: neither another's code nor anything from elsewhere."""


def result_of(
    name: str, component: Any, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Return what a method of a host component, one of those in `METHODS`, makes of arguments."""
    if method not in METHODS:
        raise DiffoptError(f"{method!r} is no method that a file may call of {name!r}")
    try:
        return getattr(component, method)(*args, **kwargs)
    except DiffoptError:
        raise
    except BaseException as error:  # transformers raises many types, and tokenizers' Rust its own
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DiffoptError(
            f"{name!r} fails on these arguments: {first_line(error)[:200]}"
        ) from error


def load_component(name: str, files: Mapping[str, bytes]) -> Any:
    """Load a tokenizer or image processor from its files."""
    optional.require("transformers", f"the tokenizer {name!r}", "transformers")
    try:
        return _load(name, files)
    except DiffoptError:
        raise
    except Exception as error:  # transformers raises many types
        raise DiffoptError(
            f"{name!r} cannot be loaded of its files: {first_line(error)[:200]}"
        ) from error


def _load(name: str, files: Mapping[str, bytes]) -> Any:
    transformers: Any = importlib.import_module("transformers")

    how = json.loads(files[_HOW]) if _HOW in files else {}
    if "parts" in how:
        return _assembled(name, files, how)
    _expect_own_files(name, files)
    with tempfile.TemporaryDirectory() as folder:
        for file, content in files.items():
            path = Path(folder, file)
            if ".." in path.parts or not path.is_relative_to(folder):
                raise DiffoptError(f"{name!r} has a file {file!r} outside its folder")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        if how:
            return _class(name, how).from_pretrained(folder, **_LOCAL)
        is_both = {"tokenizer_config.json", "preprocessor_config.json"} <= files.keys()
        if is_both or "processor_config.json" in files:
            return transformers.AutoProcessor.from_pretrained(folder, **_LOCAL)
        if "tokenizer_config.json" in files:
            return transformers.AutoTokenizer.from_pretrained(folder, **_LOCAL)
        return transformers.AutoImageProcessor.from_pretrained(folder, **_LOCAL)


def _expect_own_files(name: str, files: Mapping[str, bytes]) -> None:
    """Raise a `DiffoptError` for settings that have a tokenizer read other files than its own."""
    for file in (each for each in files if each.endswith("config.json")):
        for key, value in dict(json.loads(files[file])).items():
            is_file = key.endswith("_file") or key in ("vocab", "merges")
            if is_file and isinstance(value, str) and value not in files:
                raise DiffoptError(f"{name!r}: {file} names a file that it has not: {value[:80]!r}")


def save_component(component: Any) -> dict[str, bytes]:
    """Return the files from which `load_component` loads it; none if it cannot be saved."""
    kind = type(component)
    if not hasattr(component, "save_pretrained"):
        return {}
    package = kind.__module__.partition(".")[0]
    if hasattr(kind, "get_attributes") and package in _PACKAGES:
        return _saved_parts(component)
    with tempfile.TemporaryDirectory() as folder:
        component.save_pretrained(folder)
        paths = (path for path in sorted(Path(folder).rglob("*")) if path.is_file())
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    if package == "diffusers":
        files[_HOW] = _encoded(kind)
    return files


def _saved_parts(processor: Any) -> dict[str, bytes]:
    """Return the files of a processor's parts, and what else it has that is plain data."""
    kind = type(processor)
    names = kind.get_attributes()
    parts = {n: save_component(p) for n in names if (p := getattr(processor, n, None)) is not None}
    if not all(parts.values()):
        return {}
    files = {f"{name}/{file}": data for name, part in parts.items() for file, data in part.items()}
    values = {n: v for n, v in vars(processor).items() if n not in names and _is_plain(v)}
    return files | {_HOW: _encoded(kind, parts=sorted(parts), values=values)}


def _assembled(name: str, files: Mapping[str, bytes], how: Mapping[str, Any]) -> Any:
    """Return a processor of the parts that it had; others are None."""
    kind = _class(name, how)
    processor = kind.__new__(kind)
    vars(processor).update(dict.fromkeys(kind.get_attributes()))
    vars(processor).update(how["values"])
    for part in how["parts"]:
        own = {f.removeprefix(f"{part}/"): c for f, c in files.items() if f.startswith(f"{part}/")}
        setattr(processor, part, load_component(f"{name}.{part}", own))
    return processor


def _encoded(kind: type, **row: Any) -> bytes:
    where = kind.__module__
    if getattr(importlib.import_module(where.partition(".")[0]), kind.__name__, None) is kind:
        where = where.partition(".")[0]  # where later versions have it, too
    row = {"class": f"{where}:{kind.__qualname__}", **row}
    return json.dumps(row, indent=1, sort_keys=True).encode()


def _class(name: str, how: Mapping[str, Any]) -> Any:
    """Return the class of a tokenizer or processor; a `DiffoptError` for any other."""
    transformers = optional.require("transformers", f"the tokenizer {name!r}", "transformers")
    where, _, kind = str(how.get("class")).partition(":")
    known = where.partition(".")[0] in _PACKAGES
    found = getattr(optional.module_or_reason(where), kind, None) if known else None
    bases = (transformers.PreTrainedTokenizerBase, transformers.ProcessorMixin)
    if not (isinstance(found, type) and issubclass(found, bases)):
        raise DiffoptError(f"{name!r} is of the class {how.get('class')}, which is not known here")
    return found


def _is_plain(value: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
        return False
