"""Components as ONNX models. Importing this imports none of the packages that ONNX needs."""

from diffopt.lowering.onnx.component_models import component_model, result_strides, weight_value
from diffopt.lowering.onnx.export import NEEDS, export

__all__ = ["NEEDS", "component_model", "export", "result_strides", "weight_value"]
