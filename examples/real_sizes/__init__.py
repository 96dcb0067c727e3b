"""Pipelines in the sizes that are deployed, with random weights: to build and run."""
