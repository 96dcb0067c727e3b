"""Compares cache policies: with each other and fewer steps, and with other packages that cache.

- `python -m examples.caching` measures what `configurations` lists. `programs` makes the programs,
  and `document` writes the section of docs/caching.md, with the best by `ranking`; all else is in
  `examples.study`.
- `python -m examples.caching.peers` does the same next to other packages.
"""
