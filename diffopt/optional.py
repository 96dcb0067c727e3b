"""Optional packages: imported when they are needed, with one clear error where they are not there.

Messages name packages as pip does, and diffopt's extra where one has the package.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import warnings
from typing import Any

from diffopt.errors import DiffoptError, first_line


def is_installed(module: str) -> bool:
    """Tell whether a module is there, without importing it."""
    return importlib.util.find_spec(module) is not None


def lacks(*modules: str, extra: str) -> str | None:
    """Say which of an extra's modules is not installed; None where all are."""
    for module in modules:
        if not is_installed(module):
            name = module.replace("_", "-")
            return f"{name} is not installed; install it with `pip install diffopt[{extra}]`"
    return None


def check(*modules: str, extra: str) -> None:
    """Raise a `DiffoptError` where one of an extra's modules is not installed."""
    if (reason := lacks(*modules, extra=extra)) is not None:
        raise DiffoptError(reason)


def release(package: str) -> str:
    """Return the release of an installed package: the first two numbers of its version."""
    return ".".join(importlib.metadata.version(package).split(".")[:2])


def too_old(package: str, needed: str) -> str | None:
    """Return why a package cannot read models of the release `needed`; None if it can."""
    here, least = ([int(n) for n in text.split(".")] for text in (release(package), needed))
    if here >= least:
        return None
    return f"its models need {package} {needed}, this is {release(package)}"


def require(module: str, what: str, install: str) -> Any:
    """Import a module; where it is not there a `DiffoptError` says how to install it.

    Args:
        module: Its dotted name, which begins with the package's.
        what: What needs it; the message begins so.
        install: What pip is to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DiffoptError(f"{what} needs {package}: pip install {install}") from error


def module_or_reason(module: str) -> Any:
    """Import a module, or return as text why it cannot be: missing, or broken."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # where shared libraries are missing, packages raise any kind
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            return "is not installed"
        return "cannot be imported: " + first_line(error)


def torchao(module: str) -> Any:
    """Import a module of torchao, which logs what its binaries lack on this machine."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return require(module, "quantization", "'diffopt[quantize]'")
    finally:
        logging.disable(level)
