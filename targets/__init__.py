"""Targets: hardware descriptions and lowerings, one file a family."""
