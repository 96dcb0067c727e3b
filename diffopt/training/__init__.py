"""Distillation: training a rewritten program to reproduce its reference."""
