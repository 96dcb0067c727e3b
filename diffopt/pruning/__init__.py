"""Structured pruning: coupling, importance, removal."""
