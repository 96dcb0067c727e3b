"""Components as ONNX models. Importing this imports none of the packages that ONNX needs."""

from diffopt.lowering.onnx.export import NEEDS, export, lacks, require

__all__ = ["NEEDS", "export", "lacks", "require"]
