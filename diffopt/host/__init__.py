"""Arguments to inputs, outputs to results."""
