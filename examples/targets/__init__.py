"""Builds TensorRT plans of many models' components, without a GPU.

`python -m examples.targets` builds what `programs` makes and keeps what the builder says of the
plans; `document` writes the section of docs/tensorrt.md.
"""
