"""The cache policies, one a file; `diffopt.policy` finds them."""
