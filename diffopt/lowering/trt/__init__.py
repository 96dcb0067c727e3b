"""TensorRT: building plans from ONNX models, saying what is in them, and running them."""
