"""Captures a call of a pipeline's Python as a program."""
