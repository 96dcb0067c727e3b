"""diffopt: a compiler for diffusion inference.

program = diffopt.trace(pipe, prompt="a cat")
program = diffopt.Pipeline.parse("unroll,hoist,simplify,fuse").run(program)
engine = diffopt.build(program, "cpu", "cat.engine")
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffopt.capture.trace import trace
    from diffopt.core import Pipeline
    from diffopt.engine.engine import Engine, build, finish, load, write
    from diffopt.errors import Cancelled, CaptureError, DiffoptError
    from diffopt.ir.program import Program

__all__ = [
    "Cancelled",
    "CaptureError",
    "DiffoptError",
    "Engine",
    "Pipeline",
    "Program",
    "build",
    "finish",
    "load",
    "trace",
    "write",
]

_MODULES = {
    "Cancelled": "errors",
    "CaptureError": "errors",
    "DiffoptError": "errors",
    "Engine": "engine.engine",
    "Pipeline": "core",
    "Program": "ir.program",
    "build": "engine.engine",
    "finish": "engine.engine",
    "load": "engine.engine",
    "trace": "capture.trace",
    "write": "engine.engine",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch takes seconds, `--help` should not."""
    if name not in _MODULES:
        raise AttributeError(f"module 'diffopt' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"diffopt.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
