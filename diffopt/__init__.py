"""diffopt: a compiler for diffusion inference."""

from diffopt.errors import CaptureError, DiffoptError
from diffopt.program import Program
from diffopt.capture import trace

__all__ = ["CaptureError", "DiffoptError", "Program", "trace"]
