"""Compares quantized pipelines with each other, fewer steps, and other packages.

`python -m examples.quantization` measures what `configurations` lists; `programs` makes the
programs. `large` times models whose matrix products matter, `peers` measures OpenVINO and NNCF on
the same graphs, and `document` writes the section of docs/quantization.md, with the sentences of
`findings`.
"""
