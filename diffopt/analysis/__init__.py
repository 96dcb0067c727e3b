"""What graphs mean, read and never rewritten: attention, residual streams, axes, types."""
