"""Compares pruned, factored and retrained pipelines with each other, fewer steps, torch-pruning.

`python -m examples.pruning` measures what `configurations` lists; `programs` makes the programs,
`peers` those of torch-pruning, and says which layers both prune together. `document` writes the
section of docs/pruning.md, with the sentences of `findings`.
"""
