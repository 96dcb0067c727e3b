"""Structured pruning: what is coupled, what matters, how it is removed."""
