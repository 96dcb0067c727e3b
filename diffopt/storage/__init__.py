"""Files: containers, caches, checkpoints, digests."""
