"""Files: the container of engines and programs, caches, checkpoints, digests of weights."""
