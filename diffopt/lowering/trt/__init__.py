"""TensorRT: building plans from ONNX models, reporting their contents, running them."""
