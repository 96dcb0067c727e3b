"""Compares cache policies: with each other and fewer steps, and with other packages that cache.

- `python -m examples.caching` measures what `configurations` lists, on `models`. `study` makes and
  keeps programs, images and features, `measure` measures them into `results`, and `document` writes
  the section of docs/caching.md, with the best by `ranking`.
- `python -m examples.caching.peers` does the same next to other packages.
"""
