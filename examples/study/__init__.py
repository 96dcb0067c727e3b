"""What the benchmarks of caching and quantization share: models, images, measurements, results.

`study` makes programs, images and features of the models in `models`, and keeps them on disk,
`measure` compares images and times engines, `results` is the JSON file, and `document` writes the
section of a document that is made from it. `command` is what their command lines share.
"""
