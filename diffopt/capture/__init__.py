"""From a pipeline's own Python to a program."""
