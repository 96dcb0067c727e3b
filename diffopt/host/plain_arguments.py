"""Arguments from where there are only plain values: a command line, JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diffopt.errors import DiffoptError, first_line
from diffopt.host.inputs import Host
from diffopt.host.schema import Schema


def as_traced(host: Host, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain arguments as the traced call had them.

    Numbers become a tensor where it had one, a single value stands for each image of a list, and
    a number has the type of the traced one where it is equal to it.
    """
    return {
        name: _as_traced(name, value, host.schema.get(name, {}))
        for name, value in arguments.items()
    }


def _as_traced(name: str, value: Any, traced: Schema) -> Any:
    if "list" in traced and not isinstance(value, list):
        return [value] * len(traced["list"])
    if "tensor" in traced and isinstance(value, (int, float, list)):
        try:
            return torch.tensor(value, dtype=getattr(torch, traced["tensor"][0]))
        except (ValueError, TypeError, RuntimeError) as error:
            raise DiffoptError(
                f"{name}: no tensor can be made of this: {first_line(error)}"
            ) from error
    bound = traced.get("value")
    if {type(value), type(bound)} == {int, float} and value == bound:
        return bound  # 7 and 7.0 are one number in JSON
    return value
