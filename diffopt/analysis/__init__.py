"""What graphs mean: attention, residual streams, axes, types."""
