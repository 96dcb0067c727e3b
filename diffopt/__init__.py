"""diffopt: a compiler for diffusion inference."""

from diffopt.capture import trace
from diffopt.errors import CaptureError, DiffoptError
from diffopt.program import Program

__all__ = ["CaptureError", "DiffoptError", "Program", "trace"]
