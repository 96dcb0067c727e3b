"""The cache policies, one a file; `diffopt.caching.policy` finds them."""
