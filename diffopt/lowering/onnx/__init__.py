"""Components as ONNX models. Importing this imports none of the packages that ONNX needs."""

from diffopt.lowering.onnx.export import NEEDS, export

__all__ = ["NEEDS", "export"]
