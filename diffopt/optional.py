"""Imports of optional packages: when they are needed, quietly, and with one clear error."""

from __future__ import annotations

import importlib
import logging
import warnings
from typing import Any

from diffopt.errors import DiffoptError


def torchao(name: str) -> Any:
    """Import a module of torchao, which logs what its binaries lack on this machine."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError:
        raise DiffoptError(
            'quantization needs torchao: install it with pip install "diffopt[quantize]"'
        ) from None
    finally:
        logging.disable(level)
