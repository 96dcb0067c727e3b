"""Weights and activations in 8 and 4 bits."""
